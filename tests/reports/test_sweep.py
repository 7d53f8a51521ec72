"""Sweeps: which runs they plan, how runs are shared out, and what the table says."""

from __future__ import annotations

import json
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from grpo_fed.reports.comparison.compare import run_locally
from grpo_fed.reports.sweep.grid import SweepPlan, sweep
from grpo_fed.reports.sweep.page import SweepResult, rank_points
from grpo_fed.reports.sweep.points import SweptRun, folder_name
from grpo_fed.reports.sweep.pool import RunPool
from grpo_fed.reports.sweep.search import PRUNED, Study, search
from grpo_fed.reports.sweep.values import Axis, Space
from grpo_fed.runs.tracking.groups import main as finish
from grpo_fed.runs.tracking.groups import open_group
from grpo_fed.runs.tracking.spool import Spool
from grpo_fed.runs.tracking.store import resolve_store
from grpo_fed.runs.tracking.tracker import QUIET
from grpo_fed.runs.tracking.views import make_group_view, make_view_tags
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_federation import TINY, tiny
from tests.support.tracking_runs import line, scenario

SMALL = TINY.replace("rounds = 2", "rounds = 1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a scenario that trains in half a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(SMALL)
    return path


# What is varied ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("objective.clip=0.1,0.2", ("0.1", "0.2")),
        ("seed=0..4", ("0", "1", "2", "3", "4")),
        ("seed=-1..0", ("-1", "0")),
        ("policy.hidden=[8],[8,8]", ("[8]", "[8,8]")),
        ('clients.0.kwargs={ a = "x,y" },{}', ('{ a = "x,y" }', "{}")),
    ],
)
def test_a_grid_has_values_or_a_range(text: str, values: tuple[str, ...]):
    assert Axis.parse(text).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective.clip", "--grid objective.clip: must be KEY=VALUES"),
        ("seed=4..0", "--grid seed=4..0: a range goes up"),
        ("objective.clip=0.1,0.1", "0.1 is listed twice"),
        ("objective.clip=0.1,", "a value is missing"),
    ],
)
def test_a_grid_that_is_none_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Axis.parse(text)


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("a.b=log:1e-4..1e-2", Space("a.b", "log", 1e-4, 1e-2)),
        ("a.b=0.1..0.3", Space("a.b", "linear", 0.1, 0.3)),
        ("a.b=int:1..8", Space("a.b", "int", 1, 8)),
        ("a.b=x,y", Space("a.b", "choice", choices=("x", "y"))),
    ],
)
def test_a_space_is_a_range_with_a_scale_or_a_choice(text: str, space: Space):
    assert Space.parse(text) == space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=lin:1..2", "lin is no scale; there are linear, log and int"),
        ("a=log:0..1", "a logarithmic range begins above 0"),
        ("a=2..1", "2 is not below 1"),
        ("a=int:1.5..3", "the ends of int are whole numbers"),
        ("a=x", "write a=LOW..HIGH"),
    ],
)
def test_a_space_that_is_none_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Space.parse(text)


def test_a_plan_has_all_combinations_with_the_seeds_innermost(source: Path, tmp_path: Path):
    axes = [Axis.parse("seed=0..1"), Axis.parse("objective.clip=0.1,0.2"), Axis.parse("steps=64,128")]
    plan = SweepPlan.make(source, axes, ["rounds=3"], tmp_path / "out")
    folders = [str(run.folder.relative_to(tmp_path / "out")) for run in plan.runs]
    assert folders[:3] == [
        "objective.clip=0.1,steps=64/seed-0",
        "objective.clip=0.1,steps=64/seed-1",
        "objective.clip=0.1,steps=128/seed-0",
    ]
    assert len({*folders}) == len(folders) == 8
    assert [run.scenario.objective.clip for run in plan.runs] == [0.1] * 4 + [0.2] * 4
    assert {run.scenario.rounds for run in plan.runs} == {3}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["objective.clp=0.1"], "--grid objective.clp=0.1: unknown key; did you mean clip?"),
        (["objective.clip=0.1,-1"], "--grid objective.clip=-1: must be greater than 0"),
        (["seed=0..1", "seed=2"], "--grid seed: is given twice"),
    ],
)
def test_a_mistake_in_a_grid_names_its_key_before_anything_is_written(
    source: Path, tmp_path: Path, grid: list[str], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(source, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        sweep(source, ["seed=0"], tmp_path / "out")


def test_names_of_folders_are_short_safe_and_unlike():
    names = [folder_name([("a", value)]) for value in ("[1,2]", "[1 2]", "x" * 200, "x" * 201)]
    assert len({*names}) == 4
    assert all(len(name) < 140 and re.fullmatch(r"[\w.,=+-]+", name) for name in names)


def test_names_in_mlflow_have_the_last_parts_of_keys_where_these_are_unlike():
    short = SweptRun((("objective.clip", "0.1"), ("policy.hidden", "[8]")), 3, tiny(), Path("out"))
    assert short.short_label == "clip=0.1 hidden=[8] seed=3"
    alike = SweptRun((("merge.rule", "mean"), ("sites.rule", "mean")), 3, tiny(), Path("out"))
    assert alike.short_label == "merge.rule=mean sites.rule=mean seed=3"


# The table -----------------------------------------------------------------------------------------------------------


def made(value: str, seed: int, score: float | None, status: str = "finished", problem: str = "") -> SweptRun:
    values = (("objective.clip", value),)
    return SweptRun(values, seed, tiny(), Path("out", value, f"seed-{seed}"), score, status, problem)


def test_the_table_is_sorted_by_the_mean_over_seeds_with_its_standard_deviation():
    runs = [
        made("0.1", 0, 10.0),
        made("0.1", 1, 20.0),
        made("0.2", 0, 12.0),
        made("0.2", 1, 24.0),
        made("0.3", 0, 99.0, "stopped", "pruned"),
        made("0.4", 0, None, "failed", "it diverged"),
    ]
    result = SweepResult(tiny(), rank_points(runs), tuple(runs), Path("out"))
    # means 15 and 18; deviations sqrt(50) and sqrt(72); runs that were stopped early do not count
    assert [(point.name, point.mean) for point in result.points] == [
        ("objective.clip = 0.2", 18.0),
        ("objective.clip = 0.1", 15.0),
        ("objective.clip = 0.3", None),
        ("objective.clip = 0.4", None),
    ]
    assert [point.spread for point in result.points] == [pytest.approx(72**0.5), pytest.approx(50**0.5), None, None]
    assert result.metrics() == {
        "sweep/best_return": 18.0,
        "sweep/best_spread": pytest.approx(72**0.5),
        "sweep/runs": 6,
        "sweep/points": 4,
    }
    assert (
        "**Best: `objective.clip = 0.2`**, return 18.0 (mean of 2 seeds, standard deviation 8.49 over seeds)."
        in result.page()
    )
    assert result.problems == ["objective.clip=0.4 seed=0: failed: it diverged", "stopped early: 1 run"]


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_what_is_left_and_names_what_fails(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    whole = run_locally(Scenario.load(source, ["seed=0"]), out / "base" / "seed-0", workers=0)
    (out / "workers.log").touch()
    before = (out / "base" / "seed-0" / "results.json").stat().st_mtime_ns
    (out / "base" / "seed-2").mkdir()
    (out / "base" / "seed-2" / "notes.txt").write_text("mine")
    seen: list[SweptRun] = []
    result = sweep(source, ["seed=0..2"], out, workers=1, watch=seen.append)
    assert [run.status for run in result.runs] == ["finished", "finished", "failed"]
    assert [run.seed for run in seen] == [0, 1, 2]
    assert (out / "base" / "seed-0" / "results.json").stat().st_mtime_ns == before
    assert result.runs[0].score == whole.score_iqm
    assert result.runs[1].score == run_locally(Scenario.load(source, ["seed=1"]), tmp_path / "alone", 0).score_iqm
    assert "is not empty and holds no run" in result.runs[2].problem
    document = json.loads((out / "sweep.json").read_text())
    assert [run["status"] for run in document["points"][0]["runs"]] == ["finished", "finished", "failed"]
    assert document["best"] == {}


def test_a_run_that_another_process_writes_is_waited_for(source: Path, tmp_path: Path):
    class Sharing(FakeWorker):
        def train(self, run: SweptRun, track: str | None, group: Any, decide: Any = None) -> SweptRun:
            if run.seed == 0 and not self.trained:
                self.trained.append((0.0, -1))
                FakeWorker().train(run, None, None)  # the other process ends it
                return replace(run, status="taken")
            return super().train(run, track, group)

    worker, pool = Sharing(), RunPool(0, tmp_path / "workers.log")
    pool.workers = [worker]  # type: ignore[list-item]
    plan = SweepPlan.make(source, [Axis.parse("seed=0..1")], [], tmp_path / "out")
    runs = pool.train_all(plan.runs, None, lambda run: None, lambda run: None)
    assert [run.status for run in runs] == ["finished", "finished"]
    assert [seed for _, seed in worker.trained] == [-1, 1]  # the run that was taken is not trained again


# Optuna --------------------------------------------------------------------------------------------------------------


class FakeWorker:
    """Scores a trial by its learning rate, without training; the first seed reports four rounds."""

    def __init__(self) -> None:
        self.trained: list[tuple[float, int]] = []

    def train(self, run: SweptRun, track: str | None, group: Any, decide: Any = None) -> SweptRun:
        rate = run.scenario.objective.learning_rate
        self.trained.append((rate, run.seed))
        run.folder.mkdir(parents=True)
        status, reason = "finished", None
        for number in range(1, 5) if decide is not None else ():
            if (answer := decide(number, rate * number)) != "go":
                status, reason = "stopped", answer
                break
        (run.folder / "results.json").write_text(json.dumps(results_of(rate + run.seed, status, reason)))
        return run.read()


def results_of(score: float, status: str, reason: str | None) -> dict[str, Any]:
    """Make the content of results.json."""
    client = {"env": "CartPole-v1", "return_before": 0.0, "return": score, "return_sampled": score}
    client |= {"return_best": score, "episodes": 1, "env_steps": 1, "personal_groups": []}
    return {
        "scenario": "tiny",
        "seed": 0,
        "device": "cpu",
        "status": status,
        **({} if reason is None else {"reason": reason}),
        "rounds": 4,
        "seconds": 1.0,
        "env_steps": 1,
        "eval": {},
        "clients": {"ant": client},
    }


def make_study(source: Path, out: Path, trials: int = 8) -> Study:
    spaces = [Space.parse("objective.learning_rate=log:1e-4..1e-1")]
    study = Study(source, trials, spaces, ("0", "1"), [], out, prune=True)
    study.open()
    return study


def test_optuna_chooses_values_and_prunes_by_rounds(source: Path, tmp_path: Path):
    pytest.importorskip("optuna")
    study, worker, seen = make_study(source, tmp_path), FakeWorker(), []
    while study.train_one(worker, None, None, seen.append):  # type: ignore[arg-type]
        pass
    runs = study.runs()
    pruned = [run for run in runs if run.status == "stopped"]
    rates = [rate for rate, seed in worker.trained if seed == 0]
    assert len(rates) == 8
    assert pruned
    assert {run.problem for run in pruned} == {PRUNED}
    # a pruned trial is below the median of those before it, and its second seed is not trained
    for run in pruned:
        rate = run.scenario.objective.learning_rate
        before = rates[: rates.index(rate)]
        assert rate < sorted(before)[len(before) // 2]
        assert (rate, 1) not in worker.trained
    result = rank_points(runs)
    assert result[0].mean == pytest.approx(max(rates) + 0.5)
    assert not make_study(source, tmp_path).train_one(worker, None, None, seen.append)  # type: ignore[arg-type]


def test_a_trial_whose_process_was_killed_is_taken_up(source: Path, tmp_path: Path):
    pytest.importorskip("optuna")

    class Killed(Exception):
        pass

    class Dying(FakeWorker):
        def train(self, run: SweptRun, track: str | None, group: Any, decide: Any = None) -> SweptRun:
            self.trained.append((run.scenario.objective.learning_rate, run.seed))
            raise Killed

    dying, worker = Dying(), FakeWorker()
    with pytest.raises(Killed):
        make_study(source, tmp_path).train_one(dying, None, None, lambda run: None)  # type: ignore[arg-type]
    study = make_study(source, tmp_path, trials=1)
    assert study.train_one(worker, None, None, lambda run: None)  # type: ignore[arg-type]
    assert worker.trained == [dying.trained[0], (dying.trained[0][0], 1)]
    assert not study.train_one(worker, None, None, lambda run: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("over", "grid", "message"),
    [
        ([], [], "--optuna: needs keys to choose"),
        (["seed=int:0..4"], [], "--over seed: no seed is better than another"),
        (["objective.clip=0.1..0.2"], ["steps=64,128"], "--grid steps: with --optuna a grid has seeds alone"),
        (["objective.clp=0.1..0.2"], [], "--over objective.clp=0.1: unknown key; did you mean clip?"),
        (["objective.clip=-1.0..0.2"], [], "--over objective.clip=-1.0: must be greater than 0"),
    ],
)
def test_a_mistake_in_a_search_names_its_key(
    source: Path, tmp_path: Path, over: list[str], grid: list[str], message: str
):
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=re.escape(message)):
        search(source, 2, over, tmp_path / "out", grid)
    assert not (tmp_path / "out").exists()


# MLflow --------------------------------------------------------------------------------------------------------------


def test_all_that_open_a_group_at_once_get_the_same(tmp_path: Path):
    with ThreadPoolExecutor(8) as threads:
        groups = list(threads.map(lambda _: open_group(tmp_path / "out", "sweep", "carts"), range(8)))
    assert len({group.unique for group in groups}) == 1
    assert groups[0].name == "sweep out"


def test_the_view_of_a_group_shows_its_runs_alone():
    (tag,) = make_view_tags([make_group_view("abcdef0123", "sweep out", ["eval/score_iqm"])], 1).values()
    state = json.loads(json.loads(tag)["state"])
    assert state["searchFilter"] == "tags.`grpo_fed.role` = 'federation' and tags.`grpo_fed.group` = 'abcdef0123'"
    assert state["orderByKey"] == "metrics.`eval/score_iqm`"
    assert [chart["metricKey"] for chart in state["compareRunCharts"]] == ["eval/score_iqm"]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # in mlflow itself
def test_the_runs_of_a_group_have_one_parent_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from grpo_fed.runs.tracking.mlflow_runs import MlflowRuns

    store = resolve_store(str(tmp_path / "mlflow.db"))
    assert store is not None
    for name, value in {**QUIET, **store.environment}.items():
        monkeypatch.setenv(name, value)
    group, given = open_group(tmp_path / "out", "sweep", "carts"), scenario()
    for seed in range(2):
        folder = tmp_path / "out" / f"seed-{seed}"
        spool = Spool(folder)
        spool.folder.mkdir(parents=True)
        begin = {"run": f"run-{seed}", "scenario": "carts", "description": "", "folder": folder.name}
        begin |= {
            "params": {"method": "grpo", "seed": seed, "rounds": 4},
            "clients": {"cart": {"task": "cart", "env": "CartPole-v1"}},
        }
        spool.append("begin", {**begin, "group": asdict(group.with_label(f"seed={seed}"))})
        spool.append("round", {"line": line(given, 1)})
        runs = MlflowRuns(spool, store.uri)
        for record in spool.read():
            runs.send([record])
    (tmp_path / "out" / "sweep.json").write_text("{}")
    content = {"group": asdict(group), "page": "**Best**", "metrics": {"sweep/best_return": 5.0}}
    finish({**content, "folder": str(tmp_path / "out")})
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        names = dict(database.execute("select run_uuid, name from runs"))
        rows = database.execute("select run_uuid, key, value from tags")
        tags = {(names[run], key): value for run, key, value in rows}
        metrics = list(database.execute("select run_uuid, key, value from metrics"))
        views = [key for (key,) in database.execute("select key from experiment_tags") if "sharedViewState" in key]
    (parent,) = [run for run, name in names.items() if name == "sweep out"]
    assert {tags[f"seed={seed}", "mlflow.parentRunId"] for seed in range(2)} == {parent}
    assert tags["sweep out", "mlflow.note.content"] == "**Best**"
    assert (parent, "sweep/best_return", 5.0) in metrics
    assert f"mlflow.sharedViewState.sweep-{group.unique[:8]}" in views
