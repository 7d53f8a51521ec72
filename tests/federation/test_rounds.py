"""The server's loop: which clients get which instructions, what becomes of their answers, and what is recorded."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.federation.messages import Evaluate, Instruction, Measure, Start, Train, Trained
from grpo_fed.federation.participation import QuorumLostError, ceil_fraction
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.server_step import with_measured_kl
from grpo_fed.runs.records import Failure, RoundRecord, record_to_line
from grpo_fed.runs.results import Result
from tests.support.numeric_clients import NumericTransport, numeric_federation

EVERY = "evaluate.every=1"
MEASURED = ('proximity.mode="measured"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")
QUADRATIC = ('proximity.mode="quadratic"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")


def run(
    *overrides: str, count: int = 4, delayed: bool = False, out: Path | None = None, **transport_fields: Any
) -> tuple[Federation, NumericTransport, list[RoundRecord], Result]:
    """Run a federation of numeric clients."""
    scenario, shared_blocks, clients = numeric_federation(*overrides, count=count)
    for name, value in transport_fields.items():
        setattr(clients, name, value)
    federation = Federation(scenario, shared_blocks, clients, out, evaluate_with_next_round=delayed)
    records: list[RoundRecord] = []
    result = federation.run(records.append)
    return federation, clients, records, result


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Read rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def make_fault(names: set[str], kind: type[Instruction], *rounds: int, failure: str = "raised") -> Any:
    """Make these clients fail on an instruction of this kind in these rounds."""

    def fault(name: str, instruction: Instruction) -> Failure | None:
        fails = name in names and isinstance(instruction, kind) and instruction.start.round in rounds
        return Failure(failure, f"{name} fails") if fails else None

    return fault


# A round --------------------------------------------------------------------------------------------------------------


def test_a_run_evaluates_before_and_after_its_training_rounds():
    federation, transport, records, _ = run("rounds=2", count=2)
    sent = [(name, type(instruction), instruction.start.round) for name, instruction in transport.sent]
    assert sent == [
        *(("c-0", Evaluate, 0), ("c-1", Evaluate, 0)),
        *(("c-0", Train, 1), ("c-1", Train, 1)),
        *(("c-0", Train, 2), ("c-1", Train, 2)),
        *(("c-0", Evaluate, 2), ("c-1", Evaluate, 2)) * 2,
    ]
    trains = [train for _, train in transport.sent_of(Train)]
    assert [(train.begin, train.end) for train in trains] == [(0, 0.5), (0, 0.5), (0.5, 1), (0.5, 1)]
    plans = [evaluate.plan for _, evaluate in transport.sent_of(Evaluate)]
    assert [(plan.number, plan.deterministic) for plan in plans] == [(0, True)] * 2 + [(2, True)] * 2 + [(2, False)] * 2
    assert [(record.round, record.env_steps, len(record.scores)) for record in records] == [
        (0, 0, 2),
        (1, 256, 0),
        (2, 512, 2),
    ]
    assert len({instruction.start.run for _, instruction in transport.sent}) == 1
    assert federation.result is not None


def test_clients_with_the_same_shared_blocks_are_sent_the_same_array():
    """It is then encoded once."""
    _, transport, _, _ = run("rounds=1", *MEASURED)
    for kind in (Train, Measure, Evaluate):
        assert len({id(instruction.start.shared) for _, instruction in transport.sent_of(kind)}) <= 2
    measures = [measure for _, measure in transport.sent_of(Measure)]
    assert len({id(measure.candidate) for measure in measures}) == 1


def test_every_round_trains_from_the_last_rounds_merge():
    _, transport, _, _ = run("rounds=3", count=3)
    for number in (2, 3):
        before = [transport.states[name][number - 1]["point"].astype(np.float64) for name in transport.states]
        for name in transport.states:
            assert transport.states[name][number]["shared"] == pytest.approx(np.mean(before, 0), abs=1e-6)


@pytest.mark.parametrize("weights", ["steps", "episodes", "uniform", "progress"])
def test_merge_weights_are_those_of_the_scenario(weights: str):
    steps, gains = {"c-0": 100, "c-1": 300}, {"c-0": 0.0, "c-1": math.log(3)}
    federation, transport, _, _ = run("rounds=1", f'merge.weights="{weights}"', count=2, steps=steps, gains=gains)
    share = {"steps": 0.75, "episodes": 0.5, "uniform": 0.5, "progress": 0.6}[weights]  # logistic(log 3) = 3/4 to 1/2
    points = [transport.states[name][1]["point"].astype(np.float64) for name in ("c-0", "c-1")]
    assert federation.state.shared == pytest.approx((1 - share) * points[0] + share * points[1], abs=1e-6)


def test_evaluation_with_the_next_round_saves_messages_and_gives_equal_scores():
    """The score of round r comes with the answer to the training of round r + 1."""
    _, direct, expected, _ = run(EVERY)
    _, saving, records, _ = run(EVERY, delayed=True)
    assert [record.round for record in expected] == [record.round for record in records] == [0, 1, 2, 3, 4]
    assert [record.scores for record in expected] == [record.scores for record in records]
    assert len(direct.sent_of(Evaluate)) == 6 * 4
    assert len(saving.sent_of(Evaluate)) == 2 * 4
    plans = [train.evaluate_first for _, train in saving.sent_of(Train)]
    assert [plan.number for plan in plans if plan is not None] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_a_federation_that_shares_nothing_merges_nothing():
    federation, transport, records, result = run('method="local"', *MEASURED)
    assert federation.state.shared.size == 0
    assert not transport.sent_of(Measure)
    assert records[-1].server is not None
    assert records[-1].server.step is not None
    assert (records[-1].server.step.blocks, result.method, result.env_steps) == ((), "local", 4 * 4 * 128)


# Who takes part -------------------------------------------------------------------------------------------------------


def clients_by_round(transport: NumericTransport) -> dict[int, list[str]]:
    """List the clients that were sent an instruction to train, by round."""
    clients: dict[int, list[str]] = {}
    for name, train in transport.sent_of(Train):
        clients.setdefault(train.start.round, []).append(name)
    return clients


def test_each_round_samples_a_fraction_by_the_seed():
    rounds = "rounds=8"
    _, transport, _, _ = run(rounds, "round.fraction=0.5", count=6)
    sampled = clients_by_round(transport)
    assert all(len(names) == 3 and names == sorted(names) for names in sampled.values())
    assert len({tuple(names) for names in sampled.values()}) > 3
    assert {name for names in sampled.values() for name in names} == {f"c-{number}" for number in range(6)}
    assert clients_by_round(run(rounds, "round.fraction=0.5", count=6)[1]) == sampled
    assert clients_by_round(run(rounds, "round.fraction=0.5", "seed=1", count=6)[1]) != sampled


def test_unsampled_clients_are_evaluated_with_their_latest_state():
    _, transport, records, _ = run("rounds=3", "round.fraction=0.3", EVERY, count=3)
    sampled = clients_by_round(transport)
    assert all(len(names) == 1 for names in sampled.values())
    for _, evaluate in transport.sent_of(Evaluate):
        assert evaluate.start.round <= 3
    assert [len(record.scores) for record in records] == [3, 3, 3, 3]
    asked = {(name, evaluate.plan.number): evaluate.start.round for name, evaluate in transport.sent_of(Evaluate)}
    for (name, number), last in asked.items():
        assert last == max((round for round, names in sampled.items() if name in names and round <= number), default=0)


@pytest.mark.parametrize(
    ("fraction", "count", "part"), [(0.5, 4, 2), (0.5, 5, 3), (0.1, 3, 1), (1.0, 7, 7), (0.1, 30, 3), (0.3, 10, 3)]
)
def test_a_fraction_of_clients_is_rounded_up(fraction: float, count: int, part: int):
    assert ceil_fraction(fraction, count) == part


def test_a_failed_client_is_recorded_and_sampled_in_the_next_round(tmp_path: Path):
    _, transport, records, result = run(count=3, fault=make_fault({"c-1"}, Train, 2, failure="late"), out=tmp_path)
    assert clients_by_round(transport) == {number: ["c-0", "c-1", "c-2"] for number in (1, 2, 3, 4)}
    assert result.missing == {"c-1": [(2, "late", "c-1 fails")]}
    assert [len([client for client in record.clients if client.failure]) for record in records] == [0, 0, 1, 0, 0]
    lines = read_lines(tmp_path)
    assert [line["fed/clients_ok"] for line in lines] == [3, 2, 3, 3]
    assert [line["fed/clients_failed"] for line in lines] == [0, 1, 0, 0]
    assert lines[1]["clients"]["c-1"]["failure"] == "late"
    assert json.loads((tmp_path / "results.json").read_text())["missing"] == {"c-1": [[2, "late", "c-1 fails"]]}
    points = [transport.states[name][2]["point"].astype(np.float64) for name in ("c-0", "c-2")]
    assert transport.states["c-0"][3]["shared"] == pytest.approx(np.mean(points, 0), abs=1e-6)


def test_unreachable_clients_are_left_out_after_the_deadline():
    _, transport, _, result = run("round.deadline=0.15", "rounds=2", count=3, unreachable={"c-2"})
    assert clients_by_round(transport) == {1: ["c-0", "c-1"], 2: ["c-0", "c-1"]}
    assert [(number, kind) for number, kind, _ in result.missing["c-2"]] == [(1, "unreachable"), (2, "unreachable")]


def test_rounds_below_the_quorum_change_nothing_and_end_the_run(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation(
        "rounds=9", "round.quorum=0.75", "round.patience=2", count=4
    )
    few = {"c-0", "c-1"}
    transport.fault = make_fault(few, Train, 2, 4, 5, 6)
    records: list[RoundRecord] = []
    federation = Federation(scenario, shared_blocks, transport, tmp_path)
    with pytest.raises(
        QuorumLostError, match=r"too few answers in rounds 4 to 5: round\.quorum = 0\.75 .* c-0 raised: c-0"
    ):
        federation.run(records.append)
    assert [record.server is not None and record.server.step is not None for record in records[1:]] == [
        True,
        False,
        True,
    ] + [False] * 2
    assert (transport.states["c-2"][2]["shared"] == transport.states["c-2"][3]["shared"]).all()
    assert (transport.states["c-2"][3]["shared"] != transport.states["c-2"][4]["shared"]).any()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["status"], results["rounds"]) == ("failed", 5)
    assert results["error"].startswith("QuorumLostError: too few answers")
    assert federation.result is not None


def test_a_run_without_reachable_clients_fails_with_the_reasons():
    with pytest.raises(QuorumLostError, match="c-0 unreachable"):
        run("round.deadline=0.1", "round.patience=2", count=2, unreachable={"c-0", "c-1"})


# Departures and returns ----------------------------------------------------------------------------------------------


def test_a_distant_client_departs_and_returns_when_it_comes_near():
    scenario, shared_blocks, transport = numeric_federation(
        'merge.rule="huber"', "merge.threshold=0.3", "rounds=3", count=4
    )
    near = np.zeros(shared_blocks.size, np.float32)
    far = near.copy()
    far[shared_blocks.slices["actor"]] = 20.0
    transport.goals = {"c-0": near, "c-1": near, "c-2": near, "c-3": far}
    records: list[RoundRecord] = []

    def come_near(record: RoundRecord) -> None:
        records.append(record)
        if record.round == 2:
            transport.goals["c-3"] = transport.states["c-3"][1]["shared"]
            transport.states["c-3"][2]["point"][:] = transport.states["c-3"][1]["shared"]

    result = Federation(scenario, shared_blocks, transport).run(come_near)
    departed = [{client.client: client.departed for client in record.clients if client.departed} for record in records]
    assert departed == [{}, {"c-3": ("actor",)}, {"c-3": ("actor",)}, {}]
    assert [record_to_line(record)["fed/personal_groups"] for record in records] == [0, 1, 1, 0]
    assert record_to_line(records[1])["clients"]["c-3"]["personal_groups"] == ["actor"]
    assert result.clients["c-3"].personal_groups == ()


def test_a_failed_client_stays_departed():
    scenario, shared_blocks, transport = numeric_federation(
        'merge.rule="huber"', "merge.threshold=0.3", "rounds=2", count=4
    )
    near = np.zeros(shared_blocks.size, np.float32)
    transport.goals = dict.fromkeys(("c-0", "c-1", "c-2"), near) | {"c-3": near + 20}
    transport.fault = make_fault({"c-3"}, Train, 2)
    result = Federation(scenario, shared_blocks, transport).run()
    assert result.clients["c-3"].personal_groups == tuple(shared_blocks.groups.names)
    assert [instruction.start.departed for name, instruction in transport.sent if name == "c-3"][-1] == tuple(
        range(len(shared_blocks.groups.names))
    )


# Proximity ------------------------------------------------------------------------------------------------------------


def mean_kl(
    transport: NumericTransport, number: int, old: np.ndarray, new: np.ndarray, only: str | None = None
) -> float:
    """Average the KL of a step over the clients, in float64; of the library it uses the blocks' columns alone."""
    step = new.astype(np.float64) - old
    for name, columns in transport.shared_blocks.slices.items():
        if only not in (None, name):
            step[columns] = 0.0
    return float(np.mean([0.5 * (transport.fisher(name) * step**2).sum() for name in transport.states]))


@pytest.mark.parametrize("mode", [MEASURED, QUADRATIC])
def test_a_step_stays_within_its_budgets_and_is_logged_correctly(mode: tuple[str, ...]):
    _, transport, records, _ = run(*mode, "rounds=3")
    shared = [transport.states["c-0"][number]["shared"] for number in (1, 2, 3)]
    for number in (1, 2):
        server = records[number].server
        assert server is not None
        assert server.step is not None
        assert server.step.joint is not None
        assert mean_kl(transport, number, shared[number - 1], shared[number]) == pytest.approx(
            server.step.joint, rel=1e-4
        )
        assert 0.02 < server.step.joint <= 0.08
        for block in server.step.blocks:
            alone = mean_kl(transport, number, shared[number - 1], shared[number], block.block)
            assert alone == pytest.approx(block.kl, rel=1e-4)
            assert alone <= 0.05 * (1 + 1e-6)
        line = record_to_line(records[number])
        for block in server.step.blocks:
            assert line[f"kl/{block.block}"] == block.kl
            assert line[f"alpha/{block.block}"] == block.alpha < 1
            assert line[f"budget/{block.block}"] == 0.05
            assert line[f"wanted/{block.block}"] == block.wanted
        assert (line["kl/joint"], line["budget/joint"]) == (server.step.joint, 0.08)


def test_each_clients_measured_kl_is_logged():
    _, transport, records, _ = run(*MEASURED, "rounds=2")
    old, new = (transport.states["c-0"][number]["shared"].astype(np.float64) for number in (1, 2))
    for name, line in record_to_line(records[1])["clients"].items():
        expected = 0.5 * (transport.fisher(name) * (new - old) ** 2).sum()
        assert line["kl/joint"] == pytest.approx(expected, rel=1e-4)


def test_a_client_that_fails_to_measure_is_left_out_of_the_step():
    _, transport, records, result = run(*MEASURED, "rounds=1", fault=make_fault({"c-0"}, Measure, 1))
    asked = [name for name, _ in transport.sent_of(Measure)]
    assert asked.count("c-0") == 1
    assert asked.count("c-1") >= 2
    assert records[1].server is not None
    assert records[1].server.step is not None
    assert records[1].server.step.clients == ("c-1", "c-2", "c-3")
    assert [kind for _, kind, _ in result.missing["c-0"]] == ["raised"]
    assert result.env_steps == 4 * 128


def test_a_round_without_measurements_makes_no_step():
    everyone = {f"c-{number}" for number in range(4)}
    federation, transport, records, _ = run(*MEASURED, "rounds=1", fault=make_fault(everyone, Measure, 1))
    assert (federation.state.shared == federation.shared_blocks.initial.numpy()).all()
    assert len(transport.sent_of(Measure)) == 4
    assert records[1].server is not None
    assert records[1].server.step is not None
    assert set(records[1].server.step.alphas) == {0.0}


def test_a_merge_that_moves_nothing_is_not_measured():
    _, transport, records, _ = run(*MEASURED, 'merge.rule="huber"', "merge.threshold=0.0", "rounds=1")
    assert not transport.sent_of(Measure)
    assert record_to_line(records[1])["kl/joint"] == 0.0


def test_a_step_without_limits_is_complete_and_measured():
    limitless = ('proximity.mode="measured"', "proximity.kl_block=inf", "proximity.kl_joint=inf")
    federation, _, records, _ = run(*limitless)
    assert (federation.state.shared == run()[0].state.shared).all()
    line = record_to_line(records[1])
    assert line["budget/actor"] is None
    assert line["kl/actor"] > 0


def test_the_worst_clients_kl_may_limit_the_step():
    _, transport, records, _ = run(*MEASURED, 'proximity.over="worst"', "rounds=2")
    old, new = (transport.states["c-0"][number]["shared"] for number in (1, 2))
    assert records[1].server is not None
    assert records[1].server.step is not None
    assert max(transport.kl(name, old, new) for name in transport.states) == pytest.approx(
        records[1].server.step.joint, rel=1e-4
    )


def test_a_block_may_have_its_own_budget():
    _, _, records, _ = run(*MEASURED, "rounds=1", 'proximity.blocks={ "actor" = 0.001 }')
    line = record_to_line(records[1])
    assert (line["budget/actor"], line["budget/torso.0"]) == (0.001, 0.05)
    assert 0 < line["kl/actor"] <= 0.001


def test_a_predicted_step_is_measured_with_the_next_training():
    """Clients have the shared blocks that their last round began with, and the new ones."""
    _, transport, records, _ = run(*QUADRATIC, "rounds=3")
    measures = {train.start.round: train.measure_last_step for _, train in transport.sent_of(Train)}
    assert measures == {1: False, 2: True, 3: True}
    old, new = (transport.states["c-0"][number]["shared"] for number in (1, 2))
    line = record_to_line(records[2])
    assert line["last_kl/joint"] == pytest.approx(mean_kl(transport, 1, old, new), rel=1e-5)
    assert line["last_kl/actor"] == pytest.approx(mean_kl(transport, 1, old, new, "actor"), rel=1e-5)
    by_client = [client["last_kl/actor"] for client in line["clients"].values()]
    assert np.mean(by_client) == pytest.approx(line["last_kl/actor"], rel=1e-5)
    assert "last_kl/joint" not in record_to_line(records[1])


def test_an_infinite_measured_kl_does_not_stop_the_run():
    """Clients report an infinite KL as the greatest float; the weighted mean of several may be beyond it."""
    greatest = float(np.finfo(np.float64).max)
    step = AcceptedStep((AcceptedBlock("actor", 1.0, math.inf, 1.0, 1.0),), 1.0, math.inf, 1.0)
    reply = Trained(np.zeros(0, np.float32), 1, 1, 0.0, 0.0, {}, kl=(greatest, greatest))
    weights = {"a": 1.0, "b": 6.0, "c": 6.0}  # their parts of 13, as floats, are more than 1 together
    measured = with_measured_kl(step, dict.fromkeys(weights, reply), weights, "mean")
    assert measured is not None
    assert measured.joint >= greatest
    assert measured.blocks[0].kl == measured.joint


def test_budgets_widen_with_gains_and_tighten_with_losses():
    def budgets(gain: float, mode: tuple[str, ...], *overrides: str) -> list[float]:
        gains = {f"c-{number}": gain * (1 + 0.01 * number) for number in range(4)}
        records = run(*mode, "proximity.adaptive=true", *overrides, gains=gains)[2]
        return [record_to_line(record)["budget/actor"] for record in records[1:]]

    for mode in (MEASURED, QUADRATIC):
        assert budgets(1.0, mode) == pytest.approx([0.05, 0.075, 0.1125, 0.16875])
        assert budgets(-1.0, mode)[:2] == pytest.approx([0.05, 0.025])
        assert budgets(0.0, mode) == pytest.approx([0.05] * 4)
    assert budgets(1.0, MEASURED, "proximity.adaptive=false") == pytest.approx([0.05] * 4)


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delayed", [False, True])
def test_a_run_stops_at_its_target(delayed: bool):
    _, _, records, _ = run(EVERY, "rounds=9")
    iqm = [record_to_line(record)["eval/score_iqm"] for record in records]
    target = (iqm[3] + iqm[2]) / 2
    assert max(iqm[1:3]) < target < iqm[3]
    _, transport, stopped, result = run(EVERY, "rounds=9", f"stop.target={target}", delayed=delayed)
    last = 4 if delayed else 3  # a score that comes with the next training arrives when that is over
    assert (result.rounds, result.status, stopped[-1].round) == (last, "finished", last)
    assert max(clients_by_round(transport)) == last
    assert [record.scores for record in stopped] == [record.scores for record in records[: last + 1]]
    assert result.clients["c-0"].after == stopped[-1].scores["c-0"]


@pytest.mark.parametrize("delayed", [False, True])
def test_a_run_stops_when_its_score_no_longer_improves(delayed: bool):
    """Round 1 is the first evaluation that counts; the policies get worse from then on."""
    scenario, shared_blocks, transport = numeric_federation(EVERY, "rounds=9", "stop.patience=2")

    def worse(record: RoundRecord) -> None:
        transport.goals = {name: transport.numbers(name, 0) + 3 * (record.round + 1) for name in shared_blocks.clients}

    result = Federation(scenario, shared_blocks, transport, evaluate_with_next_round=delayed).run(worse)
    assert result.rounds == (4 if delayed else 3)


# What is recorded -----------------------------------------------------------------------------------------------------


def test_a_line_has_all_metrics_of_the_round(tmp_path: Path):
    _, transport, _, result = run(EVERY, *MEASURED, out=tmp_path)
    lines = read_lines(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert [line["global_step"] for line in lines] == [512, 1024, 1536, 2048]
    for line in lines:
        assert {"time/round_s", "charts/SPS", "eval/score_min", "charts/episodic_return", "losses/approx_kl"} <= set(
            line
        )
        scores = [client["eval/episodic_return"] for client in line["clients"].values()]
        assert line["task/c"] == line["eval/episodic_return"] == pytest.approx(np.mean(scores))
        assert line["charts/episodes"] == 5
    assert lines[-1]["comm/MB_total"] < (result.bytes_up + result.bytes_down) / 1e6
    total = sum(line["comm/MB_up"] + line["comm/MB_down"] for line in lines)
    before = 4 * (8 + transport.shared_blocks.initial.numpy().nbytes) / 1e6  # the evaluation of round 0 has no line
    assert lines[-1]["comm/MB_total"] == pytest.approx(total + before)
    assert (result.bytes_up, result.bytes_down) == (transport.bytes_up, transport.bytes_down)


def test_results_have_every_clients_returns_and_counts(tmp_path: Path):
    _, _, records, result = run(EVERY, out=tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert (saved["scenario"], saved["method"], saved["seed"], saved["status"]) == (
        "numbers",
        "grpo",
        0,
        "finished",
    )
    assert (saved["rounds"], saved["env_steps"], saved["missing"]) == (4, 2048, {})
    assert (saved["bytes_up"], saved["bytes_down"]) == (result.bytes_up, result.bytes_down)
    assert list(saved["clients"]) == ["c-0", "c-1", "c-2", "c-3"]
    for name, client in saved["clients"].items():
        assert client["return_before"] == records[0].scores[name]
        assert client["return"] == client["return_sampled"] == records[-1].scores[name]
        assert client["return_best"] == max(record.returns[name] for record in records[1:])
        assert (client["episodes"], client["env_steps"], client["personal_groups"]) == (20, 512, [])
    assert saved["eval"]["score_mean"] == pytest.approx(np.mean(list(records[-1].scores.values())))


def test_an_interrupted_run_writes_its_results(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation(EVERY)
    saved: list[Mapping[str, Any]] = []

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    def save(starts: Mapping[str, Start]) -> Mapping[str, str]:
        saved.append(starts)
        return {}

    federation = Federation(scenario, shared_blocks, transport, tmp_path, before_results=save)
    with pytest.raises(KeyboardInterrupt):
        federation.run(stop)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["status"], results["error"], results["rounds"]) == ("interrupted", "KeyboardInterrupt", 2)
    assert len(read_lines(tmp_path)) == 2
    assert {name: start.round for name, start in saved[0].items()} == dict.fromkeys(shared_blocks.clients, 2)
    assert all(start.shared is federation.state.shared for start in saved[0].values())


@pytest.mark.parametrize("error", [RuntimeError("no disk"), KeyboardInterrupt()])
def test_whatever_happens_to_the_policies_there_are_results(tmp_path: Path, error: BaseException):
    def fail(starts: Mapping[str, Start]) -> Mapping[str, str]:
        raise error

    scenario, shared_blocks, transport = numeric_federation("rounds=1")
    federation = Federation(scenario, shared_blocks, transport, tmp_path, before_results=fail)
    if isinstance(error, Exception):
        federation.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            federation.run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["notes"] == [f"the policies could not be saved: {type(error).__name__}: {error}".rstrip(": ")]


def test_a_stopped_run_writes_its_last_round_without_scores(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation(EVERY)

    def fault(name: str, instruction: Instruction) -> Failure | None:
        if instruction.start.round == 3:
            raise RuntimeError("the wire is cut")
        return None

    transport.fault = fault
    with pytest.raises(RuntimeError, match="the wire is cut"):
        Federation(scenario, shared_blocks, transport, tmp_path, evaluate_with_next_round=True).run()
    lines = read_lines(tmp_path)
    assert [(line["round"], line["eval/score_iqm"] is None) for line in lines] == [(1, False), (2, True)]
    assert json.loads((tmp_path / "results.json").read_text())["rounds"] == 2


MISTAKES = {
    'proximity.blocks={ "critic" = 0.1 }': r"proximity\.blocks: .critic. matches no shared block",
    'proximity.blocks={ "actor" = 0.1, "act*" = 0.2 }': r"proximity\.blocks: .*both match.*actor.*; narrow",
    'merge.blocks={ "critic" = 0.1 }': r"merge\.blocks: .critic. matches no block",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_of_the_scenario_are_found_before_anything_is_written(tmp_path: Path, override: str):
    scenario, shared_blocks, transport = numeric_federation('merge.rule="huber"', "merge.threshold=0.1", override)
    with pytest.raises(ValueError, match=MISTAKES[override]):
        Federation(scenario, shared_blocks, transport, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_settings_of_shared_blocks_are_ignored_if_nothing_is_shared():
    _, _, records, result = run('method="local"', "rounds=1", 'proximity.blocks={ "actor" = 0.1 }')
    assert (result.status, len(records)) == ("finished", 2)
    assert all(client.personal_groups == () for client in result.clients.values())


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "fisher"])
def test_a_mean_keeps_one_model_in_memory(rule: str):
    """Every point that was merged is freed by the next answer."""
    scenario, shared_blocks, _ = numeric_federation(f'merge.rule="{rule}"', "rounds=1", count=12)
    points: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    class Watched(NumericTransport):
        def send(self, instructions: Mapping[str, Instruction], deadline: float | None) -> Any:
            for name, answer in super().send(instructions, deadline):
                if isinstance(answer, Trained):
                    point = answer.point.copy()
                    points.append(weakref.ref(point))
                    yield name, replace(answer, point=point)
                    del point
                    alive.append(sum(point() is not None for point in points))
                else:
                    yield name, answer

    Federation(scenario, shared_blocks, Watched(shared_blocks)).run()
    assert len(alive) == 12
    assert max(alive) <= 1  # the one that the loop holds
