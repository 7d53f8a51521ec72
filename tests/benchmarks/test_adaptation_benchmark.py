"""What the benchmark of adaptation counts as having caught up, by hand."""

from __future__ import annotations

import numpy as np

from benchmarks.adaptation import (
    METHODS,
    SEEDS,
    VETERAN,
    AdaptationRun,
    curves_by_method,
    format_table,
    plan_trials,
    select_runs,
    updates_to_catch_up,
)

SETTINGS = {(name, trial.seed): trial.settings for name, trial in plan_trials()}


def run_of(method: str, seed: int, last: tuple[tuple[float, ...], tuple[float, ...]]) -> AdaptationRun:
    newcomers = dict(zip(("newcomer-0", "newcomer-1"), last, strict=True))
    first = {} if method == VETERAN else dict.fromkeys(newcomers, (10.0, 20.0, 30.0))
    return AdaptationRun(method, seed, SETTINGS[method, seed], first, newcomers, {}, 256, 40_960, 1.0)


def runs_of(seed: int) -> list[AdaptationRun]:
    runs = [run_of(method, seed, ((100.0, 200.0, 440.0), (460.0, 300.0, 300.0))) for method in METHODS]
    return [*runs, run_of(VETERAN, seed, ((500.0,), (500.0,)))]


def test_updates_are_counted_until_a_newcomer_first_has_its_share():
    curves = np.array([[[449.0, 450.0, 10.0], [90.0, 89.0, 90.0], [1.0, 2.0, 3.0]]])
    veterans = np.array([[500.0, 100.0, 4.0]])  # shares 450, 90 and 3.6
    assert updates_to_catch_up(curves, veterans).tolist() == [[1.0, 0.0, np.inf]]


def test_only_seeds_with_all_runs_count():
    runs = [*runs_of(400), *runs_of(401)[:-1]]
    curves, veterans = curves_by_method(runs)
    assert veterans.tolist() == [[500.0, 500.0]]
    assert {name: array.shape for name, array in curves.items()} == dict.fromkeys((*METHODS, "random start"), (1, 2, 3))


def test_the_table_counts_those_that_caught_up_before_and_at_the_end():
    lines = list(format_table([*runs_of(400), *runs_of(401)]))
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    # of 100, 100, 460 and 460 the middle two
    assert cells[:3] == ["reptile", "280 [280, 280]", "250 [250, 250]"]
    assert cells[3:] == ["2 of 4", "2", "0 of 4", "never"]
    assert "| random start | 10 [10, 10] | 20 [20, 20] | 0 of 4 | 0 | 0 of 4 | never |" in lines
    assert lines[-1].startswith("| veteran, 40,960 steps | 500 [500, 500] |")
    assert list(format_table([])) == []


def test_lines_of_other_settings_do_not_count_and_all_trials_differ():
    trials = list(plan_trials())
    assert len({trial.settings for _, trial in trials}) == len(trials) == len(SEEDS) * (len(METHODS) + 1)
    old = AdaptationRun("reptile", 400, "other", {}, {}, {}, 256, 1, 1.0)
    (kept,) = select_runs([old, runs_of(400)[0]])
    assert kept.settings == SETTINGS["reptile", 400]


def test_newcomers_train_as_veterans_and_in_no_other_run():
    loaded = {name: trial.load() for name, trial in plan_trials([400])}
    assert [name for name, scenario in loaded.items() if scenario.clients[1].trains] == [VETERAN]
    assert len({str(scenario.clients[1].spread) for scenario in loaded.values()}) == 1
    assert {name for name, scenario in loaded.items() if scenario.rounds != 40} == {"fedavg, 20 rounds"}
