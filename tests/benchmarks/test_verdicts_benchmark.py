"""What the benchmarks of twins, newcomers and learned groups count, by hand."""

from __future__ import annotations

from benchmarks import joining, learned_groups, verdicts
from benchmarks.joining import JoiningRun
from benchmarks.learned_groups import KINDS, RATE_SEEDS, SEEDS, SENSORS, GroupsRun
from benchmarks.verdicts import VerdictRun


def test_false_alarms_are_counted_by_client_and_warnings_by_round():
    alone = {"cart-0": {"costs": 7}, "cart-1": {}, "cart-2": {"pays": 9, "costs": 30}, "cart-3": {}}
    sharing = {"cart-0": {}, "backwards-0": {"costs": 8}, "backwards-1": {"costs": 11}}
    last = {"cart-0": (0.05, -0.2, 0.3), "backwards-0": (-0.9, -1.0, -0.7), "backwards-1": (-0.5, -0.8, -0.05)}
    runs = [
        VerdictRun("cart", 1000, "", alone, {}, {}, 1.0),
        VerdictRun("twins", 1000, "", sharing, last, {}, 1.0),
    ]
    rows = list(verdicts.format_table(runs))
    assert "| cart | 1 | 2 of 4 (50.0%) | 1 of 4 (25.0%) |" in rows
    assert "| cart | 0 of 1 | 0 | - | 0 | 0 | +5 to +5 % |" in rows
    assert "| backwards | 2 of 2 | 1 | 8 to 11 | 1 | 0 | -90 to -50 % |" in rows
    assert not list(verdicts.format_table([]))


def test_every_planned_trial_has_a_file_and_settings_of_its_own():
    trials = list(verdicts.plan_trials())
    assert all(trial.path.is_file() for trial in trials)
    assert len({trial.settings for trial in trials}) == len(trials) == 10 + 10 + 2 * 5


def test_newcomers_are_right_if_they_share_all_but_what_they_cannot():
    def run(seed: int, **out: tuple[str, ...]) -> JoiningRun:
        names = ("cart-0", "long", "swapped", "permuted")
        scores = dict.fromkeys(names, 500.0 - seed)
        return JoiningRun(seed, "", {"cart-0": {"actor": [22]}} if seed else {}, out, scores, scores, scores, 1.0)

    none: dict[str, tuple[str, ...]] = {"cart-0": ()}
    rows = list(
        joining.format_table(
            [
                run(0, long=(), swapped=("actor",), permuted=("torso.0", "actor"), **none),
                run(1, long=("actor",), swapped=(), permuted=("torso.0",), **none),
            ]
        )
    )
    assert rows[2:] == [
        "| long | nothing | 1 of 2 | 1 of 2 | 1 of 2 | 500, 499 | 500, 499 |",
        "| swapped | actor | 1 of 2 | 1 of 2 | 1 of 2 | 500, 499 | 500, 499 |",
        "| permuted | torso.0 | 1 of 2 | 2 of 2 | 0 of 2 | 500, 499 | 500, 499 |",
        "| veterans | nothing | 1 of 2 | | | 500, 499 | before: 500, 499 |",
    ]
    assert not list(joining.format_table([]))


def test_rewired_carts_are_counted_by_what_they_have_left():
    left = {
        "exactly": dict.fromkeys(SENSORS, 5),
        "more": {**dict.fromkeys(SENSORS, 5), "torso.0.bias": 5},
        "part": {SENSORS[0]: 9},
        "other": {"actor.weight:rows[0]": 5},
        "none": {},
    }
    assert {word: learned_groups.judge(groups) for word, groups in left.items()} == {word: word for word in left}
    assert learned_groups.judge({"torso.0": 5}) == "more"
    scores = {"cart-0": 500.0, "cart-1": 400.0, "rewired-0": 300.0, "rewired-1": 100.0}
    gone = {"cart-1": {"actor": 8}, "rewired-0": left["exactly"]}
    rows = list(learned_groups.format_table([GroupsRun("learned", 1600, "", gone, scores, 1.0)]))
    assert rows[3] == "| learned | 1 | 0 | 0 | 0 | 1 | 1 of 2 | 450, 400 | 200, 100 |"
    assert not list(learned_groups.format_tables([]))
    pairs = [
        GroupsRun(kind, seed, "", {}, scores | {"rewired-0": own}, 1.0)
        for seed, block, learned in ((1600, 300.0, 500.0), (1601, 100.0, 50.0))
        for kind, own in (("block", block), ("learned", learned))
    ]
    assert learned_groups.differences(pairs).tolist() == [100.0, -25.0]
    assert "blocks, by seed: +38 [-25, +100], in 1 of 2 seeds below 0." in list(learned_groups.format_table(pairs))[-1]


def test_other_learning_rates_have_tables_and_seeds_of_their_own():
    kinds = {(kind, trial.seed) for kind, trial in learned_groups.plan_trials()}
    assert {seed for kind, seed in kinds if kind in KINDS} == {*SEEDS}
    assert {seed for kind, seed in kinds if kind == "block, twice the learning rate"} == {*RATE_SEEDS}
    scores = {"cart-0": 500.0, "rewired-0": 300.0}
    runs = [
        GroupsRun(kind, 1610, "", {}, scores | {"rewired-0": own}, 1.0)
        for kind, own in (("learned", 1.0), ("learned, half the learning rate", 400.0))
    ]
    lines = list(learned_groups.format_tables(runs))
    assert "| learned | 0 | 0 | 0 | 0 | 1 | 0 of 1 | 500, 500 | 1, 1 |" in lines
    assert lines[-1] == "| learned | 0 | 0 | 0 | 0 | 1 | 0 of 1 | 500, 500 | 400, 400 |"
    assert "At half the learning rate (seeds 1610 to 1610):" in lines
