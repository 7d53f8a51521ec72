"""The numbers of the benchmark of rounds that do not wait, by hand."""

from __future__ import annotations

import math

from benchmarks.buffered import CASES, RATES, Run, load_scenario


def make_run(times: list[float], **scores: list[float]) -> Run:
    return Run("poles", "buffered", 500, times, scores, {}, {}, 1.0)


def test_a_target_is_reached_by_the_mean_of_ten_seconds():
    run = make_run([4.0, 8.0, 12.0, 16.0], a=[0.0, 500.0, 450.0, 460.0], b=[0.0, 500.0, 430.0, 500.0])
    # means 0, 500, 440, 480; of ten seconds 0, 250, 313 (0, 500, 440), 473 (500, 440, 480)
    assert run.time_to(450) == 16.0
    assert run.time_to(250) == 8.0
    assert run.time_to(480) == math.inf


def test_the_end_is_the_last_fifty_seconds():
    run = make_run([10.0, 60.0, 61.0], fast=[100.0, 200.0, 300.0], slow=[0.0, 10.0, 20.0])
    assert run.final("fast") == 250.0
    assert run.final() == (250.0 + 15.0) / 2


def test_every_variant_is_a_scenario_that_waits_or_not():
    for case in CASES:
        for variant in case.variants:
            scenario = load_scenario(case.name, variant, 500)
            assert scenario.seed == 500
            assert (scenario.round.mode == "sync") == (variant == "waits")


def test_the_other_learning_rates_are_half_and_twice_that_of_the_scenario():
    usual = load_scenario("poles", "buffered", 500)
    others = [[load_scenario(case.name, variant, 1500) for variant in case.variants] for case in RATES]
    for scenarios, factor in zip(others, (0.5, 2.0), strict=True):
        assert [scenario.round.mode for scenario in scenarios] == ["sync", "buffered"]
        for scenario in scenarios:
            assert scenario.objective.learning_rate == factor * usual.objective.learning_rate
    unchanged = others[0][1].model_copy(update={"objective": usual.objective, "seed": 500})
    assert unchanged == usual
