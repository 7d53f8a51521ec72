"""The server's round loop: who is asked for what, what is made of it, and what is written down."""

from __future__ import annotations

import itertools
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
from grpo_fed.federation.messages import Evaluate, Instruction, Measure, Train, Trained
from grpo_fed.federation.participation import ceil_fraction
from grpo_fed.federation.rounds import Federation, QuorumLostError
from grpo_fed.federation.server_step import with_measured_kl
from grpo_fed.runs.records import Failure, RoundRecord, record_to_line
from grpo_fed.runs.results import Result
from grpo_fed.runs.serialisation import from_json, to_json
from tests.support.numeric_clients import NumericTransport, numeric_federation

EVERY = "evaluate.every=1"
MEASURED = ('proximity.mode="measured"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")
QUADRATIC = ('proximity.mode="quadratic"', "proximity.kl_block=0.05", "proximity.kl_joint=0.08")


def run(
    *overrides: str, count: int = 4, fold: bool = False, out: Path | None = None, **post: Any
) -> tuple[Federation, NumericTransport, list[RoundRecord], Result]:
    """A whole federation of numbers."""
    scenario, commons, clients = numeric_federation(*overrides, count=count)
    for name, value in post.items():
        setattr(clients, name, value)
    federation = Federation(scenario, commons, clients, out, evaluate_with_next_round=fold)
    notes: list[RoundRecord] = []
    result = federation.run(notes.append)
    return federation, clients, notes, result


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def failing(names: set[str], kind: type[Instruction], *rounds: int, failure: str = "raised") -> Any:
    """Those clients have no answer to such an instruction in those rounds."""

    def fault(name: str, told: Instruction) -> Failure | None:
        wrong = name in names and isinstance(told, kind) and told.start.round in rounds
        return Failure(failure, f"{name} was told to") if wrong else None

    return fault


# A round --------------------------------------------------------------------------------------------------------------


def test_a_run_plays_trains_every_round_and_plays_again():
    federation, post, notes, _ = run("rounds=2", count=2)
    told = [(name, type(one), one.start.round) for name, one in post.sent]
    assert told == [
        *(("c-0", Evaluate, 0), ("c-1", Evaluate, 0)),
        *(("c-0", Train, 1), ("c-1", Train, 1)),
        *(("c-0", Train, 2), ("c-1", Train, 2)),
        *(("c-0", Evaluate, 2), ("c-1", Evaluate, 2)) * 2,
    ]
    trains = [one for _, one in post.sent if isinstance(one, Train)]
    assert [(one.begin, one.end) for one in trains] == [(0, 0.5), (0, 0.5), (0.5, 1), (0.5, 1)]
    plays = [one.plan for _, one in post.sent if isinstance(one, Evaluate)]
    assert [(play.number, play.deterministic) for play in plays] == [(0, True)] * 2 + [(2, True)] * 2 + [(2, False)] * 2
    assert [(note.round, note.env_steps, len(note.scores)) for note in notes] == [(0, 0, 2), (1, 256, 0), (2, 512, 2)]
    assert len({one.start.run for _, one in post.sent}) == 1
    assert federation.result is not None


def test_clients_with_the_same_shared_blocks_are_sent_the_same_array():
    """So that it is written for the wire once."""
    _, post, _, _ = run("rounds=1", *MEASURED)
    for kind in (Train, Measure, Evaluate):
        assert len({id(one.start.shared) for _, one in post.sent if isinstance(one, kind)}) <= 2
    asked = [one for _, one in post.sent if isinstance(one, Measure)]
    assert len({id(one.candidate) for one in asked}) == 1


def test_every_round_trains_from_what_the_last_one_made():
    _, post, _, _ = run("rounds=3", count=3)
    for number in (2, 3):
        before = [post.states[name][number - 1]["point"].astype(np.float64) for name in post.states]
        for name in post.states:
            assert post.states[name][number]["shared"] == pytest.approx(np.mean(before, 0), abs=1e-6)


@pytest.mark.parametrize("weights", ["steps", "episodes", "uniform", "progress"])
def test_a_client_counts_by_what_the_scenario_says(weights: str):
    steps, gains = {"c-0": 100, "c-1": 300}, {"c-0": 0.0, "c-1": math.log(3)}
    federation, post, _, _ = run("rounds=1", f'merge.weights="{weights}"', count=2, steps=steps, gains=gains)
    share = {"steps": 0.75, "episodes": 0.5, "uniform": 0.5, "progress": 0.6}[weights]  # logistic(log 3) = 3/4 to 1/2
    points = [post.states[name][1]["point"].astype(np.float64) for name in ("c-0", "c-1")]
    assert federation.state.shared == pytest.approx((1 - share) * points[0] + share * points[1], abs=1e-6)


def test_a_fold_saves_the_messages_for_playing_and_plays_the_same():
    """The score of round r comes with the answer to the training of round r + 1."""
    _, apart, one, _ = run(EVERY)
    _, folded, other, _ = run(EVERY, fold=True)
    assert [note.round for note in one] == [note.round for note in other] == [0, 1, 2, 3, 4]
    assert [note.scores for note in one] == [note.scores for note in other]
    assert sum(isinstance(told, Evaluate) for _, told in apart.sent) == 6 * 4
    assert sum(isinstance(told, Evaluate) for _, told in folded.sent) == 2 * 4
    firsts = [told.evaluate_first for _, told in folded.sent if isinstance(told, Train)]
    assert [first.number for first in firsts if first is not None] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_with_nothing_shared_nothing_is_merged():
    federation, post, notes, result = run('method="local"', *MEASURED)
    assert federation.state.shared.size == 0
    assert not any(isinstance(told, Measure) for _, told in post.sent)
    assert notes[-1].server is not None
    assert notes[-1].server.step is not None
    assert (notes[-1].server.step.blocks, result.method, result.env_steps) == ((), "local", 4 * 4 * 128)


# Who takes part -------------------------------------------------------------------------------------------------------


def trained(post: NumericTransport) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, told in post.sent:
        if isinstance(told, Train):
            found.setdefault(told.start.round, []).append(name)
    return found


def test_a_fraction_is_drawn_for_each_round_by_the_seed():
    rounds = "rounds=8"
    _, post, _, _ = run(rounds, "round.fraction=0.5", count=6)
    drawn = trained(post)
    assert all(len(names) == 3 and names == sorted(names) for names in drawn.values())
    assert len({tuple(names) for names in drawn.values()}) > 3
    assert {name for names in drawn.values() for name in names} == {f"c-{number}" for number in range(6)}
    assert trained(run(rounds, "round.fraction=0.5", count=6)[1]) == drawn
    assert trained(run(rounds, "round.fraction=0.5", "seed=1", count=6)[1]) != drawn


def test_who_rests_in_a_round_plays_with_what_it_knows_and_the_new_shared_blocks():
    _, post, notes, _ = run("rounds=3", "round.fraction=0.3", EVERY, count=3)
    drawn = trained(post)
    assert all(len(names) == 1 for names in drawn.values())
    for told in (told for _, told in post.sent if isinstance(told, Evaluate)):
        assert told.start.round <= 3
    assert [len(note.scores) for note in notes] == [3, 3, 3, 3]
    asked = {(name, told.plan.number): told.start.round for name, told in post.sent if isinstance(told, Evaluate)}
    for (name, number), last in asked.items():
        assert last == max((one for one, names in drawn.items() if name in names and one <= number), default=0)


@pytest.mark.parametrize(
    ("fraction", "count", "part"), [(0.5, 4, 2), (0.5, 5, 3), (0.1, 3, 1), (1.0, 7, 7), (0.1, 30, 3), (0.3, 10, 3)]
)
def test_a_part_is_rounded_up_but_not_for_a_rounding_error(fraction: float, count: int, part: int):
    assert ceil_fraction(fraction, count) == part


def test_a_client_without_an_answer_is_named_and_back_the_next_round(tmp_path: Path):
    _, post, notes, result = run(count=3, fault=failing({"c-1"}, Train, 2, failure="late"), out=tmp_path)
    assert trained(post) == {number: ["c-0", "c-1", "c-2"] for number in (1, 2, 3, 4)}
    assert result.missing == {"c-1": [(2, "late", "c-1 was told to")]}
    assert [len([one for one in note.clients if one.failure]) for note in notes] == [0, 0, 1, 0, 0]
    found = lines(tmp_path)
    assert [line["fed/clients_ok"] for line in found] == [3, 2, 3, 3]
    assert [line["fed/clients_failed"] for line in found] == [0, 1, 0, 0]
    assert found[1]["clients"]["c-1"]["failure"] == "late"
    assert json.loads((tmp_path / "results.json").read_text())["missing"] == {"c-1": [[2, "late", "c-1 was told to"]]}
    points = [post.states[name][2]["point"].astype(np.float64) for name in ("c-0", "c-2")]
    assert post.states["c-0"][3]["shared"] == pytest.approx(np.mean(points, 0), abs=1e-6)


def test_who_cannot_be_reached_is_waited_for_and_then_left_out():
    _, post, _, result = run("round.deadline=0.15", "rounds=2", count=3, unreachable={"c-2"})
    assert trained(post) == {1: ["c-0", "c-1"], 2: ["c-0", "c-1"]}
    assert [(number, kind) for number, kind, _ in result.missing["c-2"]] == [(1, "unreachable"), (2, "unreachable")]


def test_below_the_quorum_the_shared_blocks_stay_and_after_so_many_rounds_the_run_fails(tmp_path: Path):
    scenario, commons, post = numeric_federation("rounds=9", "round.quorum=0.75", "round.patience=2", count=4)
    few = {"c-0", "c-1"}
    post.fault = failing(few, Train, 2, 4, 5, 6)
    notes: list[RoundRecord] = []
    federation = Federation(scenario, commons, post, tmp_path)
    with pytest.raises(
        QuorumLostError, match=r"too few answers in rounds 4 to 5: round\.quorum = 0\.75 .* c-0 raised: c-0"
    ):
        federation.run(notes.append)
    assert [note.server is not None and note.server.step is not None for note in notes[1:]] == [True, False, True] + [
        False
    ] * 2
    assert (post.states["c-2"][2]["shared"] == post.states["c-2"][3]["shared"]).all()
    assert (post.states["c-2"][3]["shared"] != post.states["c-2"][4]["shared"]).any()
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["status"], found["rounds"]) == ("failed", 5)
    assert found["error"].startswith("Deserted: too few answers")
    assert federation.result is not None


def test_with_nobody_there_the_run_fails_and_says_so():
    with pytest.raises(QuorumLostError, match="c-0 unreachable"):
        run("round.deadline=0.1", "round.patience=2", count=2, unreachable={"c-0", "c-1"})


# Leaving and coming back ----------------------------------------------------------------------------------------------


def test_a_client_that_lies_apart_leaves_and_one_that_comes_near_is_back():
    scenario, commons, post = numeric_federation('merge.rule="huber"', "merge.threshold=0.3", "rounds=3", count=4)
    near = np.zeros(commons.size, np.float32)
    far = near.copy()
    far[commons.slices["actor"]] = 20.0
    post.goals = {"c-0": near, "c-1": near, "c-2": near, "c-3": far}

    def turn(note: RoundRecord) -> None:
        if note.round == 2:
            post.goals["c-3"] = post.states["c-3"][1]["shared"]
            post.states["c-3"][2]["point"][:] = post.states["c-3"][1]["shared"]

    notes: list[RoundRecord] = []
    result = Federation(scenario, commons, post).run(lambda note: (notes.append(note), turn(note))[0])
    left = [{one.client: one.departed for one in note.clients if one.departed} for note in notes]
    assert left == [{}, {"c-3": ("actor",)}, {"c-3": ("actor",)}, {}]
    assert [record_to_line(note)["fed/personal_groups"] for note in notes] == [0, 1, 1, 0]
    assert record_to_line(notes[1])["clients"]["c-3"]["personal_groups"] == ["actor"]
    assert result.clients["c-3"].personal_groups == ()


def test_who_does_not_take_part_keeps_the_groups_that_it_has_left():
    scenario, commons, post = numeric_federation('merge.rule="huber"', "merge.threshold=0.3", "rounds=2", count=4)
    near = np.zeros(commons.size, np.float32)
    post.goals = dict.fromkeys(("c-0", "c-1", "c-2"), near) | {"c-3": near + 20}
    post.fault = failing({"c-3"}, Train, 2)
    result = Federation(scenario, commons, post).run()
    assert result.clients["c-3"].personal_groups == tuple(commons.groups.names)
    assert [told.start.departed for name, told in post.sent if name == "c-3"][-1] == tuple(
        range(len(commons.groups.names))
    )


# Proximity ------------------------------------------------------------------------------------------------------------


def mean_kl(post: NumericTransport, number: int, old: np.ndarray, new: np.ndarray, only: str | None = None) -> float:
    """Of a step as all clients find it, in float64 and by no code of the library but the blocks' places."""
    step = new.astype(np.float64) - old
    for name, columns in post.shared_blocks.slices.items():
        if only not in (None, name):
            step[columns] = 0.0
    return float(np.mean([0.5 * (post.fisher(name) * step**2).sum() for name in post.states]))


@pytest.mark.parametrize("mode", [MEASURED, QUADRATIC])
def test_a_step_stays_within_its_budgets_and_what_is_logged_is_true(mode: tuple[str, ...]):
    _, post, notes, _ = run(*mode, "rounds=3")
    shared = [post.states["c-0"][number]["shared"] for number in (1, 2, 3)]
    for number in (1, 2):
        server = notes[number].server
        assert server is not None
        assert server.step is not None
        assert server.step.joint is not None
        assert mean_kl(post, number, shared[number - 1], shared[number]) == pytest.approx(server.step.joint, rel=1e-4)
        assert 0.02 < server.step.joint <= 0.08
        for block in server.step.blocks:
            alone = mean_kl(post, number, shared[number - 1], shared[number], block.block)
            assert alone == pytest.approx(block.kl, rel=1e-4)
            assert alone <= 0.05 * (1 + 1e-6)
        line = record_to_line(notes[number])
        for block in server.step.blocks:
            assert line[f"kl/{block.block}"] == block.kl
            assert line[f"alpha/{block.block}"] == block.alpha < 1
            assert line[f"budget/{block.block}"] == 0.05
            assert line[f"wanted/{block.block}"] == block.wanted
        assert (line["kl/joint"], line["budget/joint"]) == (server.step.joint, 0.08)


def test_what_each_client_measured_of_the_step_is_logged():
    _, post, notes, _ = run(*MEASURED, "rounds=2")
    old, new = (post.states["c-0"][number]["shared"].astype(np.float64) for number in (1, 2))
    for name, line in record_to_line(notes[1])["clients"].items():
        own = 0.5 * (post.fisher(name) * (new - old) ** 2).sum()
        assert line["kl/joint"] == pytest.approx(own, rel=1e-4)


def test_who_fails_while_it_measures_is_not_asked_again_and_does_not_count():
    _, post, notes, result = run(*MEASURED, "rounds=1", fault=failing({"c-0"}, Measure, 1))
    asked = [name for name, told in post.sent if isinstance(told, Measure)]
    assert asked.count("c-0") == 1
    assert asked.count("c-1") >= 2
    assert notes[1].server is not None
    assert notes[1].server.step is not None
    assert notes[1].server.step.clients == ("c-1", "c-2", "c-3")
    assert [kind for _, kind, _ in result.missing["c-0"]] == ["raised"]
    assert result.env_steps == 4 * 128


def test_where_nobody_measures_there_is_no_step_and_nobody_is_asked_twice():
    everybody = {f"c-{number}" for number in range(4)}
    federation, post, notes, _ = run(*MEASURED, "rounds=1", fault=failing(everybody, Measure, 1))
    assert (federation.state.shared == federation.shared_blocks.initial.numpy()).all()
    assert sum(isinstance(told, Measure) for _, told in post.sent) == 4
    assert notes[1].server is not None
    assert notes[1].server.step is not None
    assert set(notes[1].server.step.alphas) == {0.0}


def test_a_merge_that_goes_nowhere_asks_nobody():
    _, post, notes, _ = run(*MEASURED, 'merge.rule="huber"', "merge.threshold=0.0", "rounds=1")
    assert not any(isinstance(told, Measure) for _, told in post.sent)
    assert record_to_line(notes[1])["kl/joint"] == 0.0


def test_without_limits_the_whole_step_is_made_and_still_measured():
    limitless = ('proximity.mode="measured"', "proximity.kl_block=inf", "proximity.kl_joint=inf")
    federation, _, notes, _ = run(*limitless)
    assert (federation.state.shared == run()[0].state.shared).all()
    line = record_to_line(notes[1])
    assert line["budget/actor"] is None
    assert line["kl/actor"] > 0


def test_the_worst_client_counts_where_the_scenario_says_so():
    _, post, notes, _ = run(*MEASURED, 'proximity.over="worst"', "rounds=2")
    old, new = (post.states["c-0"][number]["shared"] for number in (1, 2))
    assert notes[1].server is not None
    assert notes[1].server.step is not None
    assert max(post.kl(name, old, new) for name in post.states) == pytest.approx(notes[1].server.step.joint, rel=1e-4)


def test_a_block_has_a_budget_of_its_own():
    _, _, notes, _ = run(*MEASURED, "rounds=1", 'proximity.blocks={ "actor" = 0.001 }')
    line = record_to_line(notes[1])
    assert (line["budget/actor"], line["budget/torso.0"]) == (0.001, 0.05)
    assert 0 < line["kl/actor"] <= 0.001


def test_a_predicted_step_is_measured_with_the_next_training():
    """As what clients answer: they know the blocks that their last round began with, and the new ones."""
    _, post, notes, _ = run(*QUADRATIC, "rounds=3")
    looks = {told.start.round: told.measure_last_step for _, told in post.sent if isinstance(told, Train)}
    assert looks == {1: False, 2: True, 3: True}
    old, new = (post.states["c-0"][number]["shared"] for number in (1, 2))
    line = record_to_line(notes[2])
    assert line["last_kl/joint"] == pytest.approx(mean_kl(post, 1, old, new), rel=1e-5)
    assert line["last_kl/actor"] == pytest.approx(mean_kl(post, 1, old, new, "actor"), rel=1e-5)
    assert "last_kl/joint" not in record_to_line(notes[1])


def test_a_step_that_broke_every_policy_is_seen_as_beyond_any_number_and_no_reason_to_stop():
    """Clients say of an infinite KL that it is the greatest number there is; their weighted mean may be more."""
    greatest = float(np.finfo(np.float64).max)
    kept = AcceptedStep((AcceptedBlock("actor", 1.0, math.inf, 1.0, 1.0),), 1.0, math.inf, 1.0)
    reply = Trained(np.zeros(0, np.float32), 1, 1, 0.0, 0.0, {}, kl=(greatest, greatest))
    weights = {"a": 1.0, "b": 6.0, "c": 6.0}  # their parts of 13, as floats, are more than 1 together
    found = with_measured_kl(kept, dict.fromkeys(weights, reply), weights, "mean")
    assert found is not None
    assert found.joint >= greatest
    assert found.blocks[0].kl == found.joint


def test_budgets_widen_where_clients_gain_and_tighten_where_they_lose():
    def budgets(gain: float, mode: tuple[str, ...], *overrides: str) -> list[float]:
        gains = {f"c-{number}": gain * (1 + 0.01 * number) for number in range(4)}
        notes = run(*mode, "proximity.adaptive=true", *overrides, gains=gains)[2]
        return [record_to_line(note)["budget/actor"] for note in notes[1:]]

    for mode in (MEASURED, QUADRATIC):
        assert budgets(1.0, mode) == pytest.approx([0.05, 0.075, 0.1125, 0.16875])
        assert budgets(-1.0, mode)[:2] == pytest.approx([0.05, 0.025])
        assert budgets(0.0, mode) == pytest.approx([0.05] * 4)
    assert budgets(1.0, MEASURED, "proximity.adaptive=false") == pytest.approx([0.05] * 4)


# Clusters -------------------------------------------------------------------------------------------------------------


def two_kinds(*overrides: str) -> tuple[Federation, NumericTransport, list[RoundRecord]]:
    """Three clients here and three there."""
    scenario, commons, post = numeric_federation('merge.rule="clusters"', "rounds=2", *overrides, count=6)
    here = np.zeros(commons.size, np.float32)
    post.goals = {f"c-{number}": here + (8.0 if number >= 3 else -8.0) for number in range(6)}
    federation, notes = Federation(scenario, commons, post), []
    federation.run(notes.append)
    return federation, post, notes


def test_clients_of_a_kind_share_and_the_others_do_not():
    federation, post, _ = two_kinds()
    points = federation.state.cluster_points
    for kind in ((0, 1, 2), (3, 4, 5)):
        own = [post.states[f"c-{number}"][2]["point"].astype(np.float64) for number in kind]
        for number in kind:
            assert points[f"c-{number}"] == pytest.approx(np.mean(own, 0), abs=1e-5)
            assert points[f"c-{number}"] is points[f"c-{kind[0]}"]
    begun = {name: told.start.shared for name, told in post.sent if isinstance(told, Train) and told.start.round == 2}
    assert begun["c-0"] is begun["c-2"]
    assert np.abs(begun["c-0"] - begun["c-3"]).mean() > 1


def test_it_is_told_and_kept_who_is_in_which_cluster():
    federation, _, notes = two_kinds()
    blocks = federation.shared_blocks.groups.as_blocks.names
    line = record_to_line(notes[2])
    assert [line[f"clusters/{block}"] for block in blocks] == [2] * len(blocks)
    for number in range(6):
        found = [line["clients"][f"c-{number}"][f"cluster/{block}"] for block in blocks]
        assert found == [number // 3] * len(blocks)  # of equal weight, the first by name is 0
    assert federation.result is not None
    assert federation.result.clients["c-4"].clusters == dict.fromkeys(blocks, 1)
    document = federation.result.to_json()["clients"]["c-4"]
    assert document["clusters"] == dict.fromkeys(blocks, 1)
    again = from_json(RoundRecord, json.loads(to_json(notes[2])))
    assert [one.clusters for one in again.clients] == [one.clusters for one in notes[2].clients]
    assert not notes[0].clients[0].clusters


def test_clients_that_are_told_to_be_together_have_the_same_blocks_whoever_is_drawn():
    """Numbers are given anew in each merge; who was not in it is in no cluster, and shares with nobody for certain."""
    federation, _, notes = two_kinds("round.fraction=0.5", "rounds=6", "merge.structure=-1.0", "seed=3")
    position, blocks = federation.state, federation.shared_blocks.slices
    told = {one.client: one.clusters for one in notes[-1].clients}
    drawn = {one.client for one in notes[-1].clients if one.steps}
    assert {name for name, clusters in told.items() if clusters} == drawn
    assert len(drawn) == 3
    divided = False
    for block, where in blocks.items():
        for one, other in itertools.combinations(sorted(drawn), 2):
            same = told[one][block] == told[other][block]
            points = [position.cluster_points[name][where].tobytes() for name in (one, other)]
            assert same == (points[0] == points[1])
            divided |= not same
    assert divided


@pytest.mark.parametrize("mode", [MEASURED, QUADRATIC])
def test_clusters_share_one_part_of_their_ways_and_the_mean_kl_of_these_is_within_the_budgets(mode: tuple[str, ...]):
    federation, post, notes = two_kinds(*mode)
    first = federation.shared_blocks.initial.numpy().astype(np.float64)
    begun = {name: told.start.shared for name, told in post.sent if isinstance(told, Train) and told.start.round == 2}
    fisher = np.mean([post.fisher(name) for name in begun], 0)
    kept = notes[1].server.step if notes[1].server else None
    assert kept is not None
    alphas = dict(zip(federation.shared_blocks.blocks, kept.alphas, strict=True))
    for block, columns in federation.shared_blocks.slices.items():
        for kind in ((0, 1, 2), (3, 4, 5)):
            own = np.mean([post.states[f"c-{number}"][1]["point"].astype(np.float64) for number in kind], 0)
            way = first[columns] + alphas[block] * (own - first)[columns]
            assert begun[f"c-{kind[0]}"][columns] == pytest.approx(way, abs=1e-5)
        if mode == QUADRATIC:  # the mean of the clients' own 1/2 d'Fd, each with its own step
            alone = [0.5 * (fisher * (begun[name] - first) ** 2)[columns].sum() for name in begun]
        else:
            alone = [0.5 * (post.fisher(name) * (begun[name] - first) ** 2)[columns].sum() for name in begun]
        logged = next(one.kl for one in kept.blocks if one.block == block)
        assert np.mean(alone) == pytest.approx(logged, rel=1e-3)
        assert np.mean(alone) <= 0.05 * (1 + 1e-4)


def test_where_nobody_has_a_weight_everything_stays_as_it_was():
    """No episode ended in round 2: clients stay in their clusters, and in the groups that they had left."""
    rules = ('merge.rule="clusters"',), ('merge.rule="huber"', "merge.threshold=0.3")
    for rule in rules:
        scenario, commons, post = numeric_federation(*rule, 'merge.weights="episodes"', "rounds=2", count=6)
        post.goals = {f"c-{number}": np.full(commons.size, 8.0 if number > 3 else -8.0) for number in range(6)}
        post.episodes = {1: 1, 2: 0}
        federation = Federation(scenario, commons, post)
        seen: list[tuple[bytes, ...]] = []

        def look(note: RoundRecord, federation: Federation = federation, seen: list[tuple[bytes, ...]] = seen) -> None:
            starts = federation.starts.values()
            seen.append(tuple(start.shared.tobytes() + bytes(start.departed) for start in starts))

        federation.run(look)
        assert len(set(seen[1])) > 1
        assert seen[2] == seen[1]


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
def test_a_run_stops_when_the_target_is_reached(fold: bool):
    _, _, notes, _ = run(EVERY, "rounds=9")
    iqm = [record_to_line(note)["eval/score_iqm"] for note in notes]
    target = (iqm[3] + iqm[2]) / 2
    assert max(iqm[1:3]) < target < iqm[3]
    _, post, told, result = run(EVERY, "rounds=9", f"stop.target={target}", fold=fold)
    last = 4 if fold else 3  # a score that rides with the next training comes when that is over
    assert (result.rounds, result.status, told[-1].round) == (last, "finished", last)
    assert max(trained(post)) == last
    assert [note.scores for note in told] == [note.scores for note in notes[: last + 1]]
    assert result.clients["c-0"].after == told[-1].scores["c-0"]


@pytest.mark.parametrize("fold", [False, True])
def test_a_run_stops_when_nothing_gets_better(fold: bool):
    """Round 1 is the first evaluation that counts; the policies get worse from then on."""
    scenario, commons, post = numeric_federation(EVERY, "rounds=9", "stop.patience=2")

    def worse(note: RoundRecord) -> None:
        post.goals = {name: post.numbers(name, 0) + 3 * (note.round + 1) for name in commons.clients}

    result = Federation(scenario, commons, post, evaluate_with_next_round=fold).run(worse)
    assert result.rounds == (4 if fold else 3)


# What is written down -------------------------------------------------------------------------------------------------


def test_a_line_has_all_that_is_known_of_a_round(tmp_path: Path):
    _, post, _, result = run(EVERY, *MEASURED, out=tmp_path)
    found = lines(tmp_path)
    assert [line["round"] for line in found] == [1, 2, 3, 4]
    assert [line["global_step"] for line in found] == [512, 1024, 1536, 2048]
    for line in found:
        assert {"time/round_s", "charts/SPS", "eval/score_min", "charts/episodic_return", "losses/approx_kl"} <= set(
            line
        )
        scores = [client["eval/episodic_return"] for client in line["clients"].values()]
        assert line["task/c"] == line["eval/episodic_return"] == pytest.approx(np.mean(scores))
        assert line["charts/episodes"] == 5
    assert found[-1]["comm/MB_total"] < (result.bytes_up + result.bytes_down) / 1e6
    total = sum(line["comm/MB_up"] + line["comm/MB_down"] for line in found)
    before = 4 * (8 + post.shared_blocks.initial.numpy().nbytes) / 1e6  # round 0's playing has no line
    assert found[-1]["comm/MB_total"] == pytest.approx(total + before)
    assert (result.bytes_up, result.bytes_down) == (post.bytes_up, post.bytes_down)


def test_results_say_what_became_of_all(tmp_path: Path):
    _, _, notes, result = run(EVERY, out=tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["scenario"], found["method"], found["seed"], found["status"]) == ("numbers", "grpo", 0, "finished")
    assert (found["rounds"], found["env_steps"], found["missing"]) == (4, 2048, {})
    assert (found["bytes_up"], found["bytes_down"]) == (result.bytes_up, result.bytes_down)
    assert list(found["clients"]) == ["c-0", "c-1", "c-2", "c-3"]
    for name, client in found["clients"].items():
        assert client["return_before"] == notes[0].scores[name]
        assert client["return"] == client["return_sampled"] == notes[-1].scores[name]
        assert client["return_best"] == max(note.returns[name] for note in notes[1:])
        assert (client["episodes"], client["env_steps"], client["personal_groups"]) == (20, 512, [])
    assert found["eval"]["score_mean"] == pytest.approx(np.mean(list(notes[-1].scores.values())))


def test_whatever_stops_a_run_finds_it_written_down(tmp_path: Path):
    scenario, commons, post = numeric_federation(EVERY)
    saved: list[Mapping[str, Any]] = []

    def stop(note: RoundRecord) -> None:
        if note.round == 2:
            raise KeyboardInterrupt

    federation = Federation(scenario, commons, post, tmp_path, before_results=saved.append)
    with pytest.raises(KeyboardInterrupt):
        federation.run(stop)
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["status"], found["error"], found["rounds"]) == ("interrupted", "KeyboardInterrupt", 2)
    assert len(lines(tmp_path)) == 2
    assert {name: start.round for name, start in saved[0].items()} == dict.fromkeys(commons.clients, 2)
    assert all(start.shared is federation.state.shared for start in saved[0].values())


def test_a_round_that_waits_for_its_scores_is_written_without_them_if_the_run_stops(tmp_path: Path):
    scenario, commons, post = numeric_federation(EVERY)

    def fault(name: str, told: Instruction) -> Failure | None:
        if told.start.round == 3:
            raise RuntimeError("the wire is cut")
        return None

    post.fault = fault
    with pytest.raises(RuntimeError, match="the wire is cut"):
        Federation(scenario, commons, post, tmp_path, evaluate_with_next_round=True).run()
    found = lines(tmp_path)
    assert [(line["round"], line["eval/score_iqm"] is None) for line in found] == [(1, False), (2, True)]
    assert json.loads((tmp_path / "results.json").read_text())["rounds"] == 2


MISTAKES = {
    'proximity.blocks={ "critic" = 0.1 }': r"proximity\.blocks: .critic. matches no shared block",
    'proximity.blocks={ "actor" = 0.1, "act*" = 0.2 }': r"proximity\.blocks: .*both match.*actor.*; narrow",
    'merge.blocks={ "critic" = 0.1 }': r"merge\.blocks: .critic. matches no block",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_what_is_wrong_with_the_scenario_is_found_before_anything_is_written(tmp_path: Path, override: str):
    scenario, commons, post = numeric_federation('merge.rule="huber"', override)
    with pytest.raises(ValueError, match=MISTAKES[override]):
        Federation(scenario, commons, post, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_where_nothing_is_shared_what_is_said_of_shared_blocks_rests():
    _, _, notes, result = run('method="local"', "rounds=1", 'proximity.blocks={ "actor" = 0.1 }')
    assert (result.status, len(notes)) == ("finished", 2)
    assert all(client.personal_groups == () for client in result.clients.values())


# Many -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "fisher"])
def test_a_mean_holds_one_model_and_not_one_for_each_client(rule: str):
    """Every point that was merged is gone by the next answer: nobody keeps them."""
    scenario, commons, _ = numeric_federation(f'merge.rule="{rule}"', "rounds=1", count=12)
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
                    alive.append(sum(one() is not None for one in points))
                else:
                    yield name, answer

    Federation(scenario, commons, Watched(commons)).run()
    assert len(alive) == 12
    assert max(alive) <= 1  # the one that the loop has in its hand
