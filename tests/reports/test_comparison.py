"""Comparing methods: every trial once, numbers by hand, and no difference claimed where chance would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from grpo_fed import train
from grpo_fed.reports.comparison.compare import compare
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, verdict_of
from grpo_fed.runs.results import RESULTS
from grpo_fed.runs.statistics import Estimate, estimate, probability_of_improvement
from grpo_fed.scenario.scenario import Scenario
from tests.support.sample_run_folder import Made, write_run

SOURCE = """
name = "made"
rounds = 3
[[clients]]
name = "cart"
count = 2
env = "CartPole-v1"
[[clients]]
name = "swapped"
env = "CartPole-v1"
"""
Score = Callable[[str, int, int], float]
"""Of a method, a seed and a client."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.toml"
    path.write_text(SOURCE)
    return path


class Runner:
    """Writes run folders with scores that a test knows."""

    def __init__(self, score: Score, fails: tuple[tuple[str, int], ...] = ()) -> None:
        self.score, self.fails = score, fails
        self.ran: list[tuple[str, int]] = []

    def __call__(self, scenario: Scenario, folder: Path) -> None:
        trial = scenario.method, scenario.seed
        self.ran.append(trial)
        if trial in self.fails:
            raise RuntimeError("no such luck\nand more")

        def last(client: int) -> float:
            return self.score(scenario.method, scenario.seed, client)

        write_run(folder, scenario, Made(scores=last, returns=lambda number, client: last(client) * number / 3))


def by_method(found: Comparison) -> dict[str, str]:
    return {one.method: one.verdict for one in found.methods}


def test_every_method_is_run_with_every_seed(source: Path, tmp_path: Path):
    runner, heard = Runner(lambda method, seed, client: 1.0), []
    compare(source, ["local", "grpo"], [3, 5], tmp_path / "out", runner, watch=heard.append)
    assert runner.ran == [("local", 3), ("local", 5), ("grpo", 3), ("grpo", 5)]
    assert [(trial.method, trial.seed) for trial in heard] == runner.ran
    assert (tmp_path / "out" / "grpo" / "seed-5" / RESULTS).is_file()


def test_the_numbers_are_those_of_the_paper(source: Path, tmp_path: Path):
    scores = {
        "local": [[0.0, 10, 20], [2, 12, 22]],
        "fedavg": [[1.0, 9, 30], [3, 8, 40]],
    }
    runner = Runner(lambda method, seed, client: scores[method][seed][client])
    found = compare(source, ["local", "fedavg"], [0, 1], tmp_path / "out", runner)
    local, fedavg = found.methods
    np.testing.assert_array_equal(fedavg.scores, scores["fedavg"])
    # Sorted 0, 2, 10, 12, 20, 22: one of six goes at either end. 1, 3, 8, 9, 30, 40 likewise.
    assert local.iqm is not None
    assert fedavg.iqm is not None
    assert (local.iqm.value, fedavg.iqm.value) == (11.0, 12.5)
    assert fedavg.entries == {"cart": (1 + 9 + 3 + 8) / 4, "swapped": 35.0}
    # First client: 1 beats 0, 3 beats 0 and 2: 3 of 4. Second: none of 4. Third: all.
    assert fedavg.better is not None
    assert fedavg.better.value == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert local.better is None


def test_what_is_surely_better_or_worse_is_called_so(source: Path, tmp_path: Path):
    base = {"local": 100.0, "grpo": 200.0, "fedavg": 0.0, "lg": 100.0}
    # lg's seeds are those of local in another order.
    runner = Runner(lambda method, seed, client: base[method] + (4 - seed if method == "lg" else seed))
    found = compare(source, ["local", "grpo", "fedavg", "lg"], range(5), tmp_path / "out", runner)
    assert by_method(found) == {"local": "", "grpo": "better", "fedavg": "worse", "lg": "no difference"}
    text = (tmp_path / "out" / "comparison.md").read_text()
    head = "# made: grpo is better than local. fedavg is worse than local. No difference from local is seen for lg."
    assert text.splitlines()[0] == head
    assert "| `lg` | 102.0 [" in text
    assert "| 0.50 [" in next(line for line in text.splitlines() if line.startswith("| `lg`"))


def test_one_seed_can_tell_nothing(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: 100.0 if method == "grpo" else 0.0)
    found = compare(source, ["local", "grpo"], [0], tmp_path / "out", runner)
    assert by_method(found)["grpo"] == "one seed cannot tell"
    assert "One seed cannot tell grpo from local." in (tmp_path / "out" / "comparison.md").read_text()


def test_clients_of_one_run_are_not_so_many_witnesses():
    # Two equal methods; the clients of a run share its luck. Drawn client by client five seeds look like a difference
    # in two comparisons of five, and that is not to be told as one.
    draws = np.random.default_rng(0)
    claimed, taken_for_independent, times = 0, 0, 200
    for _ in range(times):
        ours, theirs = (draws.normal(size=(5, 1)) + 0.1 * draws.normal(size=(5, 8)) for _ in range(2))
        better, by_seed = (
            estimate(
                probability_of_improvement,
                ours,
                theirs,
                generator=np.random.default_rng(1),
                resamples=300,
                whole_seeds=together,
            )
            for together in (False, True)
        )
        claimed += verdict_of(better, by_seed, 5) != "no difference"
        taken_for_independent += not better.low <= 0.5 <= better.high
    assert taken_for_independent / times > 0.35
    assert claimed / times < 0.16  # five seeds and a percentile interval come to no less


def test_a_verdict_needs_both_intervals():
    above, across, below = Estimate(0.8, 0.6, 0.9), Estimate(0.6, 0.4, 0.8), Estimate(0.2, 0.1, 0.4)
    assert verdict_of(above, above, 5) == "better"
    assert verdict_of(above, across, 5) == verdict_of(across, below, 5) == "no difference"
    assert verdict_of(below, below, 5) == "worse"
    assert verdict_of(None, None, 0) == "no scores"


def test_what_has_finished_is_not_run_again(source: Path, tmp_path: Path):
    def score(method: str, seed: int, client: int) -> float:
        return float(len(method) + seed)

    first = Runner(score, fails=(("grpo", 1),))
    compare(source, ["local", "grpo"], [0, 1], tmp_path / "out", first)
    again = Runner(score)
    found = compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "out", again)
    assert again.ran == [("grpo", 1), ("lg", 0), ("lg", 1)]
    alone = compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "fresh", Runner(score))
    assert found.document() == alone.document()


def test_a_run_that_fails_is_left_out_and_named(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(seed), fails=(("grpo", 1),))
    found = compare(source, ["local", "grpo"], [0, 1, 2], tmp_path / "out", runner)
    assert found.methods[1].seeds == (0, 2)
    assert found.document()["left_out"] == [{"method": "grpo", "seed": 1, "why": "RuntimeError: no such luck"}]
    assert "- `grpo`, seed 1: RuntimeError: no such luck" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_method_that_never_finished_has_no_numbers(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(seed), fails=(("grpo", 0), ("grpo", 1)))
    found = compare(source, ["local", "grpo"], [0, 1], tmp_path / "out", runner)
    assert found.methods[1].iqm is None
    assert by_method(found)["grpo"] == "no scores"
    assert "| `grpo` | - | - | - | - | - | no scores | 0 |" in (tmp_path / "out" / "comparison.md").read_text()


def test_ctrl_c_stops_all_of_it_and_loses_nothing(source: Path, tmp_path: Path):
    inner = Runner(lambda method, seed, client: 1.0)

    def run(scenario: Scenario, folder: Path) -> None:
        if scenario.method == "grpo":
            raise KeyboardInterrupt
        inner(scenario, folder)

    with pytest.raises(KeyboardInterrupt):
        compare(source, ["local", "grpo"], [0], tmp_path / "out", run)
    compare(source, ["local", "grpo"], [0], tmp_path / "out", inner)
    assert inner.ran == [("local", 0), ("grpo", 0)]


def test_a_client_without_a_score_leaves_its_run_out(source: Path, tmp_path: Path):
    def run(scenario: Scenario, folder: Path) -> None:
        Runner(lambda method, seed, client: 1.0)(scenario, folder)
        if scenario.seed == 1:
            results = json.loads((folder / RESULTS).read_text())
            results["clients"]["swapped"]["return"] = None
            (folder / RESULTS).write_text(json.dumps(results))

    found = compare(source, ["local"], [0, 1], tmp_path / "out", run)
    assert [trial.problem for trial in found.runs] == ["", "no final return of swapped"]


def test_a_run_of_another_scenario_is_not_mixed_in(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: 1.0)
    compare(source, ["local"], [0], tmp_path / "out", runner)
    with pytest.raises(ValueError, match=r"seed-0: holds a run of another scenario; name another folder"):
        compare(source, ["local"], [0], tmp_path / "out", runner, overrides=["rounds=4"])
    assert len(runner.ran) == 1


@pytest.mark.parametrize(
    ("methods", "seeds", "baseline", "said"),
    [
        ([], [0], None, "needs one of each"),
        (["local"], [], None, "needs one of each"),
        (["local", "local"], [0], None, "methods: local stands there twice"),
        (["local"], [4, 4], None, "seeds: 4 stands there twice"),
        (["local"], [0], "grpo", "baseline grpo: is not among the methods local"),
        (["locla"], [0], None, "did you mean"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    source: Path, tmp_path: Path, methods: list[str], seeds: list[int], baseline: str | None, said: str
):
    runner = Runner(lambda method, seed, client: 1.0)
    with pytest.raises(ValueError, match=said):
        compare(source, methods, seeds, tmp_path / "out", runner, baseline=baseline)
    assert not runner.ran
    assert not (tmp_path / "out").exists()


def test_all_methods_are_in_one_figure(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(len(method) + seed))
    compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "out", runner)
    svg = ElementTree.parse(tmp_path / "out" / "figures" / "comparison.svg")
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    for method in ("local", "grpo", "lg"):
        assert texts.count(method) == 2  # beside its curve and beside its interval
    assert (tmp_path / "out" / "figures" / "comparison.png").stat().st_size > 20_000


def test_runs_that_ended_early_stay_where_they_were(source: Path, tmp_path: Path):
    def run(scenario: Scenario, folder: Path) -> None:
        Runner(lambda method, seed, client: 3.0)(scenario, folder)
        if scenario.seed == 1:
            lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
            (folder / "rounds.jsonl").write_text("".join(lines[:1]))

    found = compare(source, ["local"], [0, 1], tmp_path / "out", run)
    from grpo_fed.reports.comparison.page import _curve

    # Seed 0 has 1, 2, 3 by round and seed 1 stays at 1: of 1, 1, 1, 3, 3, 3 the middle four.
    rounds, value, *_ = _curve(found, found.methods[0])
    assert rounds.tolist() == [1, 2, 3]
    assert value.tolist() == [1.0, 1.5, 2.0]


def test_real_runs_are_compared(tmp_path: Path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        'name = "tiny"\nrounds = 2\nsteps = 64\nrollout = { num_envs = 4, horizon = 16 }\n'
        "objective = { minibatches = 1, epochs = 1 }\nevaluate = { episodes = 2 }\n"
        '[[clients]]\nname = "cart"\ncount = 2\nenv = "grpo_fed/CartPole-v1"'
    )
    heard: list[ComparedRun] = []
    found = compare(path, ["local"], [0, 1], tmp_path / "out", train, watch=heard.append)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    results = json.loads((tmp_path / "out" / "local" / "seed-1" / RESULTS).read_text())
    assert document["methods"]["local"]["scores"][1] == [one["return"] for one in results["clients"].values()]
    assert [trial.problem for trial in heard] == ["", ""]
    assert found.baseline == "local"
