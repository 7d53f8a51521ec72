"""Comparisons of methods: every run once, numbers by hand, and no difference claimed that may be chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from grpo_fed import train
from grpo_fed.reports.comparison.compare import compare
from grpo_fed.reports.comparison.page import method_curve
from grpo_fed.reports.comparison.profiles import draw_improvement, draw_profiles
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, decide_verdict
from grpo_fed.reports.paper import PAPERS
from grpo_fed.runs.history import read_history
from grpo_fed.runs.results import RESULTS
from grpo_fed.runs.statistics import Estimate, estimate, probability_of_improvement
from grpo_fed.scenario.scenario import Scenario
from tests.support.sample_run_folder import SampleRun, write_run

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
"""The final return for a method, a seed and a client."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "made.toml"
    path.write_text(SOURCE)
    return path


class Runner:
    """Writes run folders with scores that a test knows."""

    def __init__(self, score: Score, fails: tuple[tuple[str, int], ...] = ()) -> None:
        self.score, self.fails = score, fails
        self.runs: list[tuple[str, int]] = []

    def __call__(self, scenario: Scenario, folder: Path) -> None:
        run = scenario.method, scenario.seed
        self.runs.append(run)
        if run in self.fails:
            raise RuntimeError("no such luck\nand more")

        def last(client: int) -> float:
            return self.score(scenario.method, scenario.seed, client)

        write_run(folder, scenario, SampleRun(scores=last, returns=lambda number, client: last(client) * number / 3))


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {method.method: method.verdict for method in comparison.methods}


def test_every_method_is_run_with_every_seed(source: Path, tmp_path: Path):
    runner, watched = Runner(lambda method, seed, client: 1.0), []
    compare(source, ["local", "grpo"], [3, 5], tmp_path / "out", runner, watch=watched.append)
    assert runner.runs == [("local", 3), ("local", 5), ("grpo", 3), ("grpo", 5)]
    assert [(run.method, run.seed) for run in watched] == runner.runs
    assert (tmp_path / "out" / "grpo" / "seed-5" / RESULTS).is_file()


def test_the_statistics_are_those_of_the_paper(source: Path, tmp_path: Path):
    scores = {
        "local": [[0.0, 10, 20], [2, 12, 22]],
        "fedavg": [[1.0, 9, 30], [3, 8, 40]],
    }
    runner = Runner(lambda method, seed, client: scores[method][seed][client])
    comparison = compare(source, ["local", "fedavg"], [0, 1], tmp_path / "out", runner)
    local, fedavg = comparison.methods
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


def test_a_method_that_is_better_in_every_seed_is_called_better(source: Path, tmp_path: Path):
    base = {"local": 100.0, "grpo": 200.0, "fedavg": 0.0, "lg": 100.0}
    # lg's seeds are those of local in another order.
    runner = Runner(lambda method, seed, client: base[method] + (4 - seed if method == "lg" else seed))
    comparison = compare(source, ["local", "grpo", "fedavg", "lg"], range(5), tmp_path / "out", runner)
    assert verdicts(comparison) == {"local": "", "grpo": "better", "fedavg": "worse", "lg": "no difference"}
    text = (tmp_path / "out" / "comparison.md").read_text()
    head = "# made: grpo is better than local. fedavg is worse than local. lg shows no difference from local."
    assert text.splitlines()[0] == head
    assert "| `lg` | 102.0 [" in text
    assert "| 0.50 [" in next(line for line in text.splitlines() if line.startswith("| `lg`"))


def test_one_seed_gives_no_verdict(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: 100.0 if method == "grpo" else 0.0)
    comparison = compare(source, ["local", "grpo"], [0], tmp_path / "out", runner)
    assert verdicts(comparison)["grpo"] == "one seed cannot tell"
    assert "One seed cannot tell grpo from local." in (tmp_path / "out" / "comparison.md").read_text()


def test_clients_of_one_run_are_not_independent_samples():
    # Two equal methods whose clients share the luck of their run. Resampled client by client, five seeds show a
    # difference in two comparisons of five, which must not be claimed.
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
        claimed += decide_verdict(better, by_seed, 5) != "no difference"
        taken_for_independent += not better.low <= 0.5 <= better.high
    assert taken_for_independent / times > 0.35
    assert claimed / times < 0.16  # five seeds and a percentile interval reach no less


def test_a_verdict_needs_both_intervals():
    above, across, below = Estimate(0.8, 0.6, 0.9), Estimate(0.6, 0.4, 0.8), Estimate(0.2, 0.1, 0.4)
    assert decide_verdict(above, above, 5) == "better"
    assert decide_verdict(above, across, 5) == decide_verdict(across, below, 5) == "no difference"
    assert decide_verdict(below, below, 5) == "worse"
    assert decide_verdict(None, None, 0) == "no scores"


def test_finished_runs_are_not_repeated(source: Path, tmp_path: Path):
    def score(method: str, seed: int, client: int) -> float:
        return float(len(method) + seed)

    first = Runner(score, fails=(("grpo", 1),))
    compare(source, ["local", "grpo"], [0, 1], tmp_path / "out", first)
    again = Runner(score)
    comparison = compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "out", again)
    assert again.runs == [("grpo", 1), ("lg", 0), ("lg", 1)]
    alone = compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "fresh", Runner(score))
    assert comparison.document() == alone.document()


def test_a_failed_run_is_left_out_and_named(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(seed), fails=(("grpo", 1),))
    comparison = compare(source, ["local", "grpo"], [0, 1, 2], tmp_path / "out", runner)
    assert comparison.methods[1].seeds == (0, 2)
    assert comparison.document()["left_out"] == [{"method": "grpo", "seed": 1, "why": "RuntimeError: no such luck"}]
    assert "- `grpo`, seed 1: RuntimeError: no such luck" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_method_without_finished_runs_has_no_scores(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(seed), fails=(("grpo", 0), ("grpo", 1)))
    comparison = compare(source, ["local", "grpo"], [0, 1], tmp_path / "out", runner)
    assert comparison.methods[1].iqm is None
    assert verdicts(comparison)["grpo"] == "no scores"
    assert "| `grpo` | - | - | - | - | - | no scores | 0 |" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_comparison_continues_after_ctrl_c(source: Path, tmp_path: Path):
    inner = Runner(lambda method, seed, client: 1.0)

    def run(scenario: Scenario, folder: Path) -> None:
        if scenario.method == "grpo":
            raise KeyboardInterrupt
        inner(scenario, folder)

    with pytest.raises(KeyboardInterrupt):
        compare(source, ["local", "grpo"], [0], tmp_path / "out", run)
    compare(source, ["local", "grpo"], [0], tmp_path / "out", inner)
    assert inner.runs == [("local", 0), ("grpo", 0)]


def test_a_run_with_a_client_without_score_is_left_out(source: Path, tmp_path: Path):
    def run(scenario: Scenario, folder: Path) -> None:
        Runner(lambda method, seed, client: 1.0)(scenario, folder)
        if scenario.seed == 1:
            results = json.loads((folder / RESULTS).read_text())
            results["clients"]["swapped"]["return"] = None
            (folder / RESULTS).write_text(json.dumps(results))

    comparison = compare(source, ["local"], [0, 1], tmp_path / "out", run)
    assert [run.problem for run in comparison.runs] == ["", "no final return of swapped"]


def test_a_folder_with_a_run_of_another_scenario_is_refused(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: 1.0)
    compare(source, ["local"], [0], tmp_path / "out", runner)
    with pytest.raises(ValueError, match=r"seed-0: holds a run of another scenario; name another folder"):
        compare(source, ["local"], [0], tmp_path / "out", runner, overrides=["rounds=4"])
    assert len(runner.runs) == 1


@pytest.mark.parametrize(
    ("methods", "seeds", "baseline", "message"),
    [
        ([], [0], None, "needs at least one of each"),
        (["local"], [], None, "needs at least one of each"),
        (["local", "local"], [0], None, "methods: local is listed twice"),
        (["local"], [4, 4], None, "seeds: 4 is listed twice"),
        (["local"], [0], "grpo", "baseline grpo: is not among the methods local"),
        (["locla"], [0], None, "did you mean"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    source: Path, tmp_path: Path, methods: list[str], seeds: list[int], baseline: str | None, message: str
):
    runner = Runner(lambda method, seed, client: 1.0)
    with pytest.raises(ValueError, match=message):
        compare(source, methods, seeds, tmp_path / "out", runner, baseline=baseline)
    assert not runner.runs
    assert not (tmp_path / "out").exists()


def test_all_methods_are_in_one_figure(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(len(method) + seed))
    compare(source, ["local", "grpo", "lg"], [0, 1], tmp_path / "out", runner)
    svg = ElementTree.parse(tmp_path / "out" / "figures" / "comparison.svg")
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    for method in ("local", "grpo", "lg"):
        assert texts.count(method) == 2  # beside its curve and beside its interval
    assert (tmp_path / "out" / "figures" / "comparison.png").stat().st_size > 20_000


def test_profiles_improvement_and_a_table_of_latex_are_written(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: float(len(method) + seed))
    comparison = compare(source, ["local", "fedavg"], [0, 1], tmp_path / "out", runner, paper=PAPERS["icml"])
    names = {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert names == {"comparison", "profiles", "improvement"}
    assert {path.stem for path in (tmp_path / "out" / "paper").glob("*.pdf")} == names
    drawing = draw_improvement(comparison)
    assert drawing is not None
    # fedavg ends at 6 and 7, local at 5 and 6: of four pairs three are won and one is a tie
    assert drawing.alt.startswith("Probability of improvement over local: fedavg 0.88, ")
    profiles = draw_profiles(comparison)
    assert profiles is not None
    assert profiles.alt == "Performance profiles; half of the returns are above: local 5.5, fedavg 6.5."
    rows = (tmp_path / "out" / "comparison.tex").read_text().splitlines()
    assert rows[1] == r"\begin{tabular}{lrrrrrlr}"
    assert rows[6].startswith(r"fedavg & 6.50 [6.00, 7.00] & 6.50 & 6.50 & 0.88 [")
    assert rows[6].endswith(r" & 2 \\")
    assert "figures/profiles.png" in (tmp_path / "out" / "comparison.md").read_text()


def test_curves_may_count_bytes(source: Path, tmp_path: Path):
    runner = Runner(lambda method, seed, client: 3.0)
    comparison = compare(source, ["local", "fedavg"], [0], tmp_path / "out", runner, axis="bytes")
    history = read_history(tmp_path / "out" / "fedavg" / "seed-0")
    sent = np.cumsum([line["comm/MB_up"] + line["comm/MB_down"] for line in history.lines])
    assert method_curve(comparison, comparison.methods[1], "bytes").rounds.tolist() == pytest.approx(sent.tolist())
    svg = (tmp_path / "out" / "figures" / "comparison.svg").read_text()
    assert ">MB sent by all<" in svg


def test_the_curve_of_a_shorter_run_keeps_its_last_return(source: Path, tmp_path: Path):
    def run(scenario: Scenario, folder: Path) -> None:
        Runner(lambda method, seed, client: 3.0)(scenario, folder)
        if scenario.seed == 1:
            lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
            (folder / "rounds.jsonl").write_text("".join(lines[:1]))

    comparison = compare(source, ["local"], [0, 1], tmp_path / "out", run)
    # Seed 0 has 1, 2, 3 by round and seed 1 stays at 1: of 1, 1, 1, 3, 3, 3 the middle four.
    curve = method_curve(comparison, comparison.methods[0])
    assert curve.rounds.tolist() == [1, 2, 3]
    assert curve.mean.tolist() == [1.0, 1.5, 2.0]


def test_real_runs_are_compared(tmp_path: Path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        'name = "tiny"\nrounds = 2\nsteps = 64\nrollout = { num_envs = 4, horizon = 16 }\n'
        "objective = { minibatches = 1, epochs = 1 }\nevaluate = { episodes = 2 }\n"
        '[[clients]]\nname = "cart"\ncount = 2\nenv = "grpo_fed/CartPole-v1"'
    )
    watched: list[ComparedRun] = []
    comparison = compare(path, ["local"], [0, 1], tmp_path / "out", train, watch=watched.append)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    results = json.loads((tmp_path / "out" / "local" / "seed-1" / RESULTS).read_text())
    assert document["methods"]["local"]["scores"][1] == [client["return"] for client in results["clients"].values()]
    assert [run.problem for run in watched] == ["", ""]
    assert comparison.baseline == "local"
