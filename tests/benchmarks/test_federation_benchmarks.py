"""The federation's benchmarks: their measures of rounds and times, by hand, and the help of every benchmark."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import federation, merges, scarce, structure
from benchmarks.contestants import IdleClients, RoundClock
from benchmarks.federation import IDLE, OURS, PEER, Measurement, Work
from benchmarks.report import CHAPTERS, format_chapter
from benchmarks.structure_runs import Cell, StructureRun, chance_threshold
from benchmarks.structure_runs import Trial as StructureTrial
from benchmarks.structure_runs import read_runs as read_structure_runs
from benchmarks.trials import Run, Trial, read_runs, select_runs
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text())
GROUPS = {"torso.0": "torso.0", "actor.left": "actor", "actor.right": "actor"}


def run(method: str = "grpo", seed: int = 0, **given: Any) -> Run:
    """Six rounds of two straight and two contrary clients."""
    names = ("cart-0", "cart-1", "backwards-0", "backwards-1")
    plain = {
        "scenario": "contrary",
        "variant": "",
        "settings": f"{method}-{seed}",
        "returns": {name: [10.0] * 6 for name in names},
        "scores": {name: [None] * 5 + [20.0] for name in names},
        "before": dict.fromkeys(names, 5.0),
        "personal": {name: [[]] * 6 for name in names},
        "groups": GROUPS,
        "steps": 0,
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "machine": "m",
        "versions": {},
    }
    return Run(**{**plain, "method": method, "seed": seed, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_shows_its_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = import_module(f"benchmarks.{command}")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{command}" in capsys.readouterr().out


# Structure


def planted_run(
    case: str, moves: list[tuple[int, str, str, bool]], names: str = "cart-0 cart-1 swapped-0", **given: Any
):
    """A run of ten rounds with three blocks, in which clients leave (True) and come back."""
    scores = {name: 100.0 + number for number, name in enumerate(names.split())}
    plain = {"cell": Cell(case, 2.5e-3, "linear", 4), "method": "grpo", "seed": 0, "rounds": 10, "groups": 3}
    return StructureRun(
        **{**plain, "moves": moves, "scores": scores, "training": scores, "played": 0, "seconds": 1.0, **given}
    )


def test_a_planted_client_is_found_in_the_round_in_which_it_left_its_block_for_good():
    assert planted_run("cart-swapped", [(5, "swapped-0", "actor", True)]).found() == {"swapped-0": 5}
    assert planted_run("cart-swapped", [(5, "swapped-0", "torso.0", True)]).found() == {"swapped-0": None}
    came_back = [(5, "swapped-0", "actor", True), (9, "swapped-0", "actor", False)]
    assert planted_run("cart-swapped", came_back).found() == {"swapped-0": None}


def test_a_late_client_is_found_by_leaving_anything_counted_from_its_change():
    late = planted_run("cart-late", [(18, "late-0", "torso.0", True)], "cart-0 late-0", rounds=30)
    assert late.found() == {"late-0": 4}


def test_what_was_wrongly_out_counts_clients_blocks_and_rounds():
    # swapped-0 is out of torso.1 in rounds 7 to 10 (4), cart-0 out of the actor in rounds 3 to 5 (3); 10 rounds of
    # 3 + 3 + 2 pairs should have been shared.
    moves = [
        (5, "swapped-0", "actor", True),
        (7, "swapped-0", "torso.1", True),
        (3, "cart-0", "actor", True),
        (6, "cart-0", "actor", False),
    ]
    run = planted_run("cart-swapped", moves)
    assert run.wrongly_out() == (7, 80)
    assert run.honest_out()
    assert not planted_run("cart-swapped", moves[:2]).honest_out()


def test_of_two_halves_the_one_that_left_was_the_planted_one():
    run = planted_run("cart-halves", [(5, "cart-0", "actor", True), (6, "cart-1", "actor", True)])
    assert run.found() == {"cart-0": 5, "cart-1": 6}
    assert run.wrongly_out() == (0, 70)


def test_tables_name_the_cells_that_miss_a_target():
    found = planted_run("cart-swapped", [(5, "swapped-0", "actor", True)])
    missed = planted_run("cart-alike", [(5, "cart-0", "actor", True)])
    tables = list(structure.format_tables([found, missed]))
    assert "| cart-swapped | 0.0025 | linear | 100% | 5 | 0.0% | 0 | 1 |" in tables
    assert tables[-1] == (
        "- cart-alike, rate 0.0025, linear, 4 epochs: wrongly out 6.7%, an honest client out in 1 of 1 runs"
    )
    assert list(structure.format_tables([found]))[-1] == "- none"


def test_the_threshold_by_chance_is_the_distance_of_two_random_walks():
    # 2048 steps in updates of 8 x 128, 4 epochs of 4 minibatches: 32 steps of Adam, so 2.5e-3 sqrt(64) = 0.02.
    scenario = StructureTrial(Cell("cart-alike", 5e-3, "linear", 4), "grpo", 0).load()
    assert chance_threshold(scenario) == pytest.approx(5e-3 * 8)


def test_every_planned_run_is_a_valid_scenario_and_is_planned_once():
    for plan in structure.PARTS.values():
        trials = list(plan())
        assert len({(trial.cell, trial.method, trial.seed) for trial in trials}) == len(trials)
        for trial in trials[:: max(1, len(trials) // 4)]:
            assert trial.load().seed == trial.seed


def test_a_line_of_results_is_read_back(tmp_path: Path):
    run = planted_run("cart-swapped", [(5, "swapped-0", "actor", True)])
    (tmp_path / "runs.jsonl").write_text(json.dumps(asdict(run)) + "\n")
    assert read_structure_runs(tmp_path / "runs.jsonl") == [run]


# Scarce samples


def test_a_run_is_averaged_over_rounds_then_clients():
    finished = run(returns={"a": [10.0, 20.0], "b": [None, 45.0]}, scores={"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert scarce.mean_training_return(finished) == (15 + 45) / 2
    assert scarce.mean_evaluation_score(finished) == 2.5


def test_differences_use_pairs_of_the_same_seed():
    ours = [run("fedavg", seed, returns={"a": [value]}) for seed, value in enumerate([10.0, 20.0, 30.0])]
    control = [run("local", seed, returns={"a": [value]}) for seed, value in [(2, 25.0), (0, 5.0)]]
    pairs = list(scarce.pair_by_seed(ours, control))
    assert [(one.seed, other.seed) for one, other in pairs] == [(0, 0), (2, 2)]
    gain = scarce.estimate_gain(pairs, scarce.mean_training_return)
    # Both are 5 better, though the runs themselves are far from each other: the interval is a point.
    assert (gain.value, gain.low, gain.high) == (5.0, 5.0, 5.0)


def test_the_table_compares_methods_with_the_control():
    runs = [
        run(method, seed, variant="60 x 256", returns={"a": [value + seed]}, scores={"a": [value]})
        for method, value in (("local", 200.0), ("fedavg", 280.0))
        for seed in (0, 2)
    ]
    rows = list(scarce.format_table(runs))[2:]
    assert rows == [
        "| 60 x 256 | local | 201 [200, 202] |  | 200 [200, 200] |  | 2 |",
        "| 60 x 256 | fedavg | 281 [280, 282] | +80 [+80, +80] | 280 [280, 280] | +80 [+80, +80] | 2 |",
    ]


def test_the_poles_train_for_15360_or_61440_steps():
    planned = [trial.load() for trial in scarce.plan_trials(1, ["grpo"])]
    assert [each.rounds * each.steps for each in planned] == [15_360] * 5 + [61_440]
    batches = [each.rollout.num_envs * each.rollout.horizon for each in planned]
    assert [each.steps // batch for each, batch in zip(planned, batches, strict=True)] == [1, 1, 1, 4, 1, 1]
    played = [each.steps * each.evaluate.every for each in planned]
    assert played == [1024] * 5 + [4096]


# Trials


def test_a_line_belongs_to_its_scenario_method_seed_and_overrides(tmp_path: Path):
    trial = Trial("contrary", "lg", 3)
    others = [replace(trial, seed=4), replace(trial, method="local"), replace(trial, overrides=("rounds=3",))]
    assert len({trial.settings, *(other.settings for other in others)}) == 4
    loaded = trial.load()
    assert (loaded.method, loaded.seed, loaded.policy.shared) == ("lg", 3, ["actor"])
    done = run("lg", 3, settings=trial.settings)
    lines = tmp_path / "runs.jsonl"
    lines.write_text(json.dumps(vars(done)) + "\n")
    assert select_runs([*others, trial], read_runs(lines)) == [done]


# The federation beside the peer


def measured(contestant: str, seconds: list[float], repetition: int = 0, **work: Any) -> Measurement:
    given = {"task": "CartPole-v1", "clients": 64, "rounds": 4, "steps": 2048, **work}
    return Measurement(contestant, Work(**given), repetition, seconds, 10 * seconds[-1], 300.0, "m", {})


def test_the_time_of_a_round_excludes_the_first_two():
    assert measured(OURS, [90.0, 50.0, 1.0, 3.0, 2.0]).round == 2.0


def test_the_table_shows_the_ratio_of_medians_over_repetitions():
    ours = [measured(OURS, [9, 9, each, each], number) for number, each in enumerate([1.0, 2.0, 30.0])]
    peers = [measured(PEER, [9, 9, each, each], number) for number, each in enumerate([20.0, 50.0])]
    *_, row = federation.format_tables([*ours, *peers])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["64 x 2,048", "2.00", "35.00", "17.5"]
    assert cells[5:7] == ["8", "20"]
    assert cells[7:9] == ["", ""]
    assert cells[9:] == ["20.0", "350.0", "17.5", "2"]


def test_the_table_of_idle_clients_shows_time_per_client():
    idle = {"task": federation.NO_TASK, "clients": 1000}
    *_, row = federation.format_tables(
        [measured(IDLE, [1, 1, 0.2, 0.2], **idle), measured(PEER, [1, 1, 14, 14], **idle)]
    )
    assert row == "| 1,000 | 200.0 | 0.200 | 300 | 14,000 | 70.0 | 1 |"


def test_written_measurements_are_read_back(tmp_path: Path):
    measurement = measured(OURS, [1.0, 2.0, 3.0])
    federation.append_measurement(measurement, tmp_path / "federation.jsonl")
    assert federation.read_measurements(tmp_path / "federation.jsonl") == [measurement]


def test_the_clock_excludes_time_before_the_first_and_after_the_last_round():
    clock = RoundClock()
    clock.times = [1.0, 3.0, 6.0, 100.0]
    assert list(clock.seconds) == [2.0, 3.0]


def test_a_round_with_a_failed_client_raises_an_error():
    failed = ClientRecord("a", "a", failure=Failure("died", "it was killed"))
    with pytest.raises(RuntimeError, match="it was killed"):
        RoundClock()(RoundRecord(1, 2, 0.1, 0, [failed], ServerRecord(None, {}, 0, 0, 0)))


def test_idle_clients_send_back_as_many_numbers_all_changed():
    shared = np.zeros(5, np.float32)
    instructions = {name: Train(Start("run", 1, shared), 0.0, 0.5) for name in ("a", "b")}
    answers = IdleClients().answer(instructions)
    for answer in answers.values():
        assert isinstance(answer, Trained)
        assert (answer.point != shared).all()


# Merges


def test_exactly_the_planted_replies_depart():
    shared_blocks = merges.resolve_shared_blocks(merges.make_scenario(1))
    assert abs(shared_blocks.size - 100_000) < 1000
    made = merges.make_replies(shared_blocks, 10, 0.1)
    departed = merges.huber(made, shared_blocks.initial, shared_blocks.groups, threshold=merges.THRESHOLD).departed
    actor = [block == "actor" for block in shared_blocks.groups.blocks]
    assert departed.tolist() == [actor, *[[False] * len(actor)] * 9]


def test_the_table_of_merges_shows_what_each_is_compared_with():
    seconds = {"copy": [0.1, 0.2, 0.3], "mean": [0.3], "huber, no client departs": [0.9]}
    results = {"clients": 1000, "parameters": 100_103, "rounds": 3, "seconds": seconds, "evidence_mb": 34.4}
    rows = list(merges.format_tables({**results, "memory": {"100": {"before_mb": 266.0, "more_mb": 0.4}}}))
    assert "| copy | 200.0 |  |  |  |  |" in rows
    assert "| mean | 300.0 | copy | 1.50 | 2 | 1 |" in rows
    assert "| huber, no client departs | 900.0 | mean | 3.00 | 6 | 3 |" in rows
    assert "| 100 | 266 | 0.4 |" in rows


# The page


def test_a_chapter_without_tables_is_left_out():
    assert format_chapter(*CHAPTERS["scarce"], []) == ""
    text = format_chapter(*CHAPTERS["scarce"], ["| a | b |"])
    assert text.startswith("# Scarce samples\n")
    assert "| a | b |" in text
    assert "python -m benchmarks.scarce" in text
