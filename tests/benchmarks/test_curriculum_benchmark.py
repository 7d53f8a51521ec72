"""What the benchmark of curricula counts as steps saved, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.curriculum import (
    JUDGED,
    KINDS,
    MORE_SEEDS,
    REPEATED,
    SEEDS,
    UNIFORM,
    CurriculumRun,
    format_table,
    format_tables,
    mean_ratio,
    plan_trials,
    select_runs,
    steps_by_kind,
)

SETTINGS = {(kind, trial.seed): trial.settings for kind, trial in plan_trials()}


def run_of(kind: str, seed: int, steps: int | None) -> CurriculumRun:
    return CurriculumRun(kind, seed, SETTINGS[kind, seed], [0, 3, 18], steps, 1000, 1.0)


def runs_of(seed: int, judged: int | None, uniform: int = 800) -> list[CurriculumRun]:
    steps = dict.fromkeys(KINDS, uniform) | {JUDGED: judged}
    return [run_of(kind, seed, each) for kind, each in steps.items()]


def test_a_ratio_is_a_geometric_mean():
    assert mean_ratio(np.log([[0.5], [2.0]])) == pytest.approx(1.0)
    assert mean_ratio(np.log([[[0.25], [1.0]], [[0.5], [0.5]]])).tolist() == pytest.approx([0.5, 0.5])


def test_a_run_that_never_gets_there_counts_with_all_of_its_steps():
    runs = [*runs_of(600, 400), *runs_of(601, None), *runs_of(602, 200)[:-1]]  # the last seed is incomplete
    assert steps_by_kind(runs, KINDS)[JUDGED].tolist() == [400, 1000]
    assert steps_by_kind(runs, KINDS)[UNIFORM].tolist() == [800, 800]


def test_the_table_has_ratios_by_seed():
    lines = list(format_table([*runs_of(600, 400), *runs_of(601, None)], KINDS))
    row = next(line for line in lines if line.startswith(f"| {JUDGED} |"))
    # ratios 400 / 800 and 1000 / 800, whose geometric mean is 0.79
    assert row == f"| {JUDGED} | 700 | 400 to 1,000, 1 never | 0.79 [0.50, 1.25] | 1 of 2 |"
    assert f"| {UNIFORM} | 800 | 800 to 800 | 1 |  |" in lines
    assert list(format_tables([])) == []


def test_more_seeds_have_a_table_of_their_own():
    more = [run_of(UNIFORM, 610, 800), run_of(REPEATED, 610, 200), run_of(UNIFORM, 611, 800)]
    lines = list(format_tables([*runs_of(600, 400), *more]))
    assert lines[-1] == f"| {REPEATED} | 200 | 200 to 200 | 0.25 [0.25, 0.25] | 1 of 1 |"
    assert "On the seeds 610 to 619:" in lines


def test_lines_of_other_settings_do_not_count_and_all_trials_differ():
    trials = list(plan_trials())
    assert len({trial.settings for _, trial in trials}) == len(trials) == len(SEEDS) * len(KINDS) + 2 * len(MORE_SEEDS)
    old = CurriculumRun(JUDGED, 600, "other", [0], 100, 1000, 1.0)
    (kept,) = select_runs([old, runs_of(600, 400)[0]])
    assert kept.settings == SETTINGS[UNIFORM, 600]


def test_all_rows_are_judged_on_the_same_poles():
    loaded = {kind: trial.load() for kind, trial in plan_trials([600])}
    assert len({str(scenario.clients[1]) for scenario in loaded.values()}) == 1
    assert {scenario.rounds for scenario in loaded.values()} == {80}
    assert [kind for kind, scenario in loaded.items() if scenario.clients[0].curriculum is None] == [
        "a pole for each cart"
    ]
