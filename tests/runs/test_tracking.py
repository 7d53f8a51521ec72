"""Tracking: MLflow gets every round once, whether the run or the server fails, and no run waits for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fed.engines.alone import train
from grpo_fed.flower import Grouped
from grpo_fed.reports.charts import PALETTE
from grpo_fed.runs.colours import pick_colour
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.tracking import Tracker, default_store, replay, resolve_store
from grpo_fed.runs.tracking.origin import RunOrigin
from grpo_fed.runs.tracking.run_page import client_page, clients_table, page_at_end
from grpo_fed.runs.tracking.selection import (
    client_metrics,
    client_quantiles,
    is_same_round,
    metric_keys,
    tracked_metrics,
)
from grpo_fed.runs.tracking.spool import Spool
from grpo_fed.runs.tracking.store import find_secrets
from grpo_fed.runs.tracking.ui import open_pages
from grpo_fed.runs.tracking.views import make_view_tags, make_views
from grpo_fed.scenario.scenario import Scenario
from tests.support.forked_writer import ForkedWriter
from tests.support.goal_app import GoalClient, run_rounds
from tests.support.in_memory_grid import InMemoryGrid, enter_run
from tests.support.tracking_runs import BLOCKS, Database, document, files_with_words, line, scenario

ROOT = Path(__file__).parents[2]
NAME = "grpo seed 0, objective.clip=0.2, flower"
"""The name of the run of `finished`."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture(autouse=True, scope="module")
def forked_writers() -> Iterator[None]:
    """Import MLflow once for all writers of this process; that of the run that is killed is a command of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_fed.runs.tracking.tracker.start_writer", ForkedWriter)
        yield


def track_rounds(
    uri: str, folder: Path, given: Scenario, rounds: range, status: Any = "finished", resumed: bool = False
) -> Tracker:
    """Track rounds, without training."""
    folder.mkdir(exist_ok=True)
    tracker = Tracker.open(uri, folder, given, resumed, models=False)
    for number in rounds:
        tracker.round(line(given, number))
    tracker.close(document(given, rounds[-1], status), status)
    return tracker


# What is tracked ------------------------------------------------------------------------------------------------------


def test_only_finite_numbers_under_known_keys_are_tracked():
    given = {
        "round": 3,
        "global_step": 10,
        "eval/score_iqm": 1.5,
        "kl/torso.0": 2,
        "losses/entropy": None,
        "losses/kl": float("inf"),
        "losses/approx_kl": float("nan"),
        "time/round_s": True,
        "secrets/password": 5.0,
        "fed/<script>": 1.0,
        "notes": ["a"],
        "clients": {"ant": {"eval/episodic_return": 7.0, "failure": "late", "forged": 1.0}},
    }
    assert tracked_metrics(given) == {"global_step": 10.0, "eval/score_iqm": 1.5, "kl/torso.0": 2.0}
    assert dict(client_metrics(given)) == {"ant": {"eval/episodic_return": 7.0, "fed/clients_failed": 1.0}}


def test_many_clients_are_summarised_by_quantiles():
    given = {"clients": {f"c{k}": {"eval/episodic_return": float(k * k)} for k in range(11)}}
    assert client_quantiles(given) == {
        "eval/episodic_return_min": 0.0,
        "eval/episodic_return_p10": 1.0,
        "eval/episodic_return_p50": 25.0,
        "eval/episodic_return_p90": 81.0,
        "eval/episodic_return_max": 100.0,
    }
    four = {"clients": {f"c{k}": {"kl/joint": value} for k, value in enumerate([3.0, 1.0, 2.0, 8.0])}}
    assert client_quantiles(four)["kl/joint_p90"] == pytest.approx(np.quantile([1, 2, 3, 8], 0.9))


def test_a_repeated_round_equals_the_first_but_for_its_times():
    first, second = line(scenario(), 2), line(scenario(), 2)
    second["time/round_s"] = second["charts/SPS"] = 1.25
    assert is_same_round(first, second)
    second["clients"]["cart-0"]["losses/entropy"] += 1e-9
    assert not is_same_round(first, second)


def test_the_page_begins_with_the_result():
    given = scenario()
    begin = {"scenario": "carts", "description": "", "clients": dict.fromkeys("abc"), "params": {"rounds": 4}}
    begin["params"] |= {"method": "grpo", "seed": 0}
    page = page_at_end(begin, document(given, 4), "finished")
    assert page.startswith(
        "**Return 41.0** (interquartile mean of 3 clients; mean from 1.0 to 41.0, worst client 40.0)"
    )
    assert "| backwards | 1.0 | 42.0 | actor |" in page
    failed = document(given, 2, "failed") | {"error": "ValueError: no"}
    assert page_at_end(begin, failed, "failed").startswith("**Failed after 2 of 4 rounds**: ValueError: no.")


def test_clusters_replace_personal_groups_on_the_page():
    given = scenario()
    done = document(given, 4)
    for name, client in done["clients"].items():
        client |= {"personal_groups": [], "clusters": {"torso.0": 0, "actor": int(name == "backwards")}}
    begin = {"scenario": "carts", "description": "", "params": {"rounds": 4, "method": "clusters", "seed": 0}}
    page = page_at_end({**begin, "clients": done["clients"]}, done, "finished")
    assert "| client | before | after | clusters |" in page
    assert "| backwards | 1.0 | 42.0 | actor #1 |" in page
    assert client_page(done["clients"]["backwards"]).endswith("In another cluster than most: `actor #1`.")
    assert client_page(done["clients"]["cart-0"]).endswith("In another cluster than most: none.")
    table = clients_table(done)
    assert (table["columns"][-1], [row[-1] for row in table["data"]]) == ("clusters", ["", "", "actor #1"])
    clustered = line(given, 2) | {"clusters/actor": 2}
    clustered["clients"]["backwards"]["cluster/actor"] = 1
    assert tracked_metrics(clustered)["clusters/actor"] == 2.0
    assert dict(client_metrics(clustered))["backwards"]["cluster/actor"] == 1.0
    views = make_views(sorted(metric_keys([clustered])))
    charts = [chart.metrics for view in views for section in view.sections.values() for chart in section]
    assert ("clusters/actor",) in charts
    assert ("cluster/actor",) in charts


def test_a_client_that_learned_nothing_is_named_after_the_result():
    given = scenario()
    done = document(given, 3)
    done["clients"]["backwards"] |= {"env_steps": 0, "return": None}
    done["missing"] = {"backwards": [[2, "raised", "RuntimeError: out of coal"]], "cart-0": [[1, "late", "no answer"]]}
    begin = {"scenario": "carts", "description": "", "params": {"rounds": 3, "method": "grpo", "seed": 0}}
    page = page_at_end({**begin, "clients": done["clients"]}, done, "finished").split("\n\n")
    assert page[0].startswith("**Return ")
    assert (
        page[1]
        == "**backwards learned nothing**: it gave no valid answer, in round 2 raised: RuntimeError: out of coal"
    )
    assert "cart-0 learned nothing" not in " ".join(page)


def test_saved_views_show_the_metrics_that_exist():
    metrics = tracked_metrics(line(scenario(), 1)) | {"losses/entropy": 1.0}
    tags = make_view_tags(make_views(sorted(metrics)), now=5)
    assert [json.loads(tag)["name"] for tag in tags.values()] == ["Federation", "Clients", "By method"]
    for tag in tags.values():
        state = json.loads(json.loads(tag)["state"])
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
        assert {name for chart in state["compareRunCharts"] for name in chart["selectedMetricKeys"]} <= set(metrics)
    federation = json.loads(json.loads(tags["mlflow.sharedViewState.federation"])["state"])
    drawn = [chart["selectedMetricKeys"] for chart in federation["compareRunCharts"]]
    assert sorted(f"kl/{block}" for block in BLOCKS) in drawn


def test_colours_differ_for_three_times_as_many_clients_as_the_palette_has():
    assert [pick_colour(number) for number in range(len(PALETTE))] == list(PALETTE)
    assert len({pick_colour(number) for number in range(3 * len(PALETTE))}) == 3 * len(PALETTE)


# Stores -------------------------------------------------------------------------------------------------------------


def test_an_argument_overrides_the_environment_and_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    nothing: dict[str, str] = {}
    there = {"MLFLOW_TRACKING_URI": "http://there:5000"}
    assert default_store() == tmp_path / "runs" / "mlflow.db"
    assert resolve_store(None, nothing).file == default_store()
    assert resolve_store(None, there).uri == "http://there:5000"
    assert resolve_store("sqlite:///mine.db", there).uri == f"sqlite:///{tmp_path}/mine.db"
    assert resolve_store("mine.db", there).file == tmp_path / "mine.db"
    assert resolve_store("mine.db", there).artifacts == tmp_path / "mlartifacts"
    assert resolve_store("off", there) is None


@pytest.mark.parametrize(
    "wrong", ["runs", "file:///tmp/runs", "http://", "ftp://host", "./mlruns", "sqlite:/x", "http://x:y"]
)
def test_an_address_without_a_store_is_refused(wrong: str, tmp_path: Path):
    with pytest.raises(ValueError, match="name a server"):
        Tracker.open(wrong, tmp_path, scenario())


@pytest.mark.parametrize(
    ("place", "why"), [("here", "is a folder"), ("text.db", "no sqlite database"), ("text.db/x.db", "is a file")]
)
def test_a_file_that_is_no_database_is_refused(place: str, why: str, tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "text.db").write_text("name = 'a scenario, perhaps'")
    (tmp_path / "empty.db").touch()
    with pytest.raises(ValueError, match=why):
        Tracker.open(f"sqlite:///{tmp_path}/{place}", tmp_path, scenario())
    assert resolve_store(f"sqlite:///{tmp_path}/empty.db", {}).file == tmp_path / "empty.db"


def test_a_run_does_not_wait_for_a_damaged_database(tmp_path: Path):
    (tmp_path / "x.db").write_bytes(b"SQLite format 3\0" + b"but no more of it" * 100)
    tracker = track_rounds(f"sqlite:///{tmp_path}/x.db", tmp_path / "run", scenario(), range(2))
    assert "did not take all" in str(tracker.trouble)
    log = (tmp_path / "run" / "tracking" / "writer.log").read_text()
    assert "not a database" in log
    assert "will be retried" not in log  # mlflow's own retries would go on for more than a minute


def test_only_the_environment_of_the_writer_has_the_password():
    web = resolve_store("https://ann:p%40ss-word@host:5000/x", {})
    assert web.uri == "https://host:5000/x"
    assert web.environment["MLFLOW_TRACKING_USERNAME"] == "ann"
    assert web.environment["MLFLOW_TRACKING_PASSWORD"] == "p@ss-word"
    assert web.environment["MLFLOW_TRACKING_URI"] == "https://host:5000/x"
    base = resolve_store("postgresql://ann:hush-hush@host/db", {})
    assert base.uri == "postgresql://***@host/db"
    assert base.environment["MLFLOW_TRACKING_URI"] == "postgresql://ann:hush-hush@host/db"
    assert "hush" not in repr(base) + repr(web)
    assert "p@ss" not in repr(web)
    assert set(find_secrets({**web.environment, "HOME": "/somewhere"})) == {"p@ss-word", "p%40ss-word"}
    assert "hush-hush" in find_secrets(base.environment)


def test_tracking_off_writes_and_starts_nothing(tmp_path: Path):
    tracker = track_rounds("off", tmp_path / "run", scenario(), range(3))
    assert (tracker.run_id, tracker.link, tracker.trouble) == (None, None, None)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_tracker_writes_nothing_before_the_first_round(tmp_path: Path):
    Tracker.open(f"sqlite:///{tmp_path}/x.db", tmp_path / "run", scenario())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_no_process_and_its_records_to_replay(tmp_path: Path):
    tracker = Tracker.open(f"sqlite:///{tmp_path}/x.db", tmp_path / "run", scenario())
    tracker.round(line(scenario(), 1))
    writer = tracker._writer
    assert writer is not None
    tracker.close(None, "interrupted", patience=0.0)  # before it has imported MLflow
    assert writer.returncode == -signal.SIGKILL
    assert f"grpo-fed replay {tmp_path / 'run'} sends it" in str(tracker.trouble)
    assert tracker.spool.has_unsent


def test_an_unwritable_folder_does_not_stop_the_run(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    tracker = Tracker.open(f"sqlite:///{tmp_path}/x.db", tmp_path / "run", scenario())
    tracker.round(line(scenario(), 1))
    assert "round 1 is not tracked" in str(tracker.trouble)
    tracker.close(None, "failed")
    assert "the end of the run is not tracked" in str(tracker.trouble)


def test_tracking_imports_neither_mlflow_nor_torch_into_the_run():
    modules = "grpo_fed.runs.tracking.tracker, grpo_fed.runs.tracking.store, grpo_fed.runs.tracking.ui"
    code = f"import sys, {modules}; sys.exit(bool({{'mlflow', 'torch', 'flwr'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The spool ------------------------------------------------------------------------------------------------------------


def test_a_partial_line_is_skipped_and_the_next_one_is_read(tmp_path: Path):
    spool = Spool(tmp_path)
    spool.folder.mkdir()
    spool.append("round", {"line": {"round": 1}})
    with spool.path.open("a") as file:
        file.write('{"kind": "round", "time": 5, "li')
    assert [record.content["line"]["round"] for record in spool.read()] == [1]
    spool.end_partial_line()
    spool.append("round", {"line": {"round": 2}})
    records = list(spool.read())
    assert [record.content["line"]["round"] for record in records] == [1, 2]
    assert [record.content["line"]["round"] for record in spool.read(records[0].end)] == [2]
    assert list(spool.read(records[1].end)) == []


# The runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and track a run that has figures."""
    folder, given = tmp_path_factory.mktemp("runs") / "carts-0", scenario(rounds=2)
    origin = RunOrigin("flower", ("seed=0", "objective.clip=0.2"), register=True)
    tracker = Tracker.open(database.uri, folder, given, origin=origin)
    train(given, folder, lambda record: tracker.round(line(given, record.round)))
    (folder / "figures").mkdir()
    (folder / "figures" / "returns.svg").write_text("<svg/>")
    tracker.close(document(given, 2), "finished")
    assert tracker.trouble is None
    assert tracker.run_id == database.runs("carts")[NAME]
    return folder


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # in mlflow itself
def test_clients_of_a_flower_strategy_have_child_runs(
    finished: Path, database: Database, monkeypatch: pytest.MonkeyPatch
):
    enter_run(monkeypatch)
    clients = {node: GoalClient(node, {"torso.weight": 1.0}, name=name) for node, name in enumerate(("ant", "bee"), 1)}
    strategy = Grouped(blocks={"torso": ["torso.*"]}, joint_budget=1.0, mlflow=database.uri, experiment="apps")
    run_rounds(strategy, InMemoryGrid(clients), 2)
    runs = database.runs("apps")
    assert set(runs) == {"Grouped persistence", "ant", "bee"}
    parent = runs.pop("Grouped persistence")
    assert database.params(parent)["joint_budget"] == "1.0"
    assert [(step, 0 < kl <= 1) for step, kl in database.metric(parent, "kl/joint")] == [(1, True), (2, True)]
    for client, run in runs.items():
        assert database.tags(run)["mlflow.parentRunId"] == parent
        assert database.tags(run)["grpo_fed.client"] == client
        assert database.metric(run, "train/loss") == [(1, 1.0), (2, 1.0)]
    assert {database.status(run) for run in [parent, *runs.values()]} == {"FINISHED"}


def test_clients_have_child_runs_of_the_federations_run(finished: Path, database: Database):
    runs = database.runs("carts")
    assert set(runs) == {NAME, "cart-0", "cart-1", "backwards"}
    parent = runs.pop(NAME)
    assert database.metric(parent, "eval/score_iqm") == [(0, 1.0), (1, 11.0), (2, 21.0)]
    assert database.metric(parent, "kl/actor") == [(0, 0.02), (1, 0.02), (2, 0.02)]
    assert {"global_step", "comm/MB_total", "task/cart", "fed/clients_ok"} <= database.keys(parent)
    assert min(database.keys(parent)) == "achieved/evaluation_return"  # MLflow's pages sort charts by name
    assert database.metric(parent, "achieved/training_return") == database.metric(parent, "charts/episodic_return")
    for k, client in enumerate(["cart-0", "cart-1", "backwards"]):
        run = runs[client]
        assert database.metric(run, "eval/episodic_return") == [(0, k), (1, 10 + k), (2, 20 + k)]
        assert database.tags(run)["mlflow.parentRunId"] == parent
        assert database.tags(run)["mlflow.runColor"] == PALETTE[k]
        assert database.params(run)["env"] == "grpo_fed/CartPole-v1"
        assert database.keys(run) - database.keys(parent) <= {"losses/entropy", "model/return", "model/return_before"}
    assert database.params(runs["backwards"])["kwargs.swap_actions"] == "True"
    assert database.tags(runs["backwards"])["personal_groups"] == "actor"
    assert database.tags(parent)["mlflow.note.content"].startswith("**Return 21.0**")
    assert database.params(parent)["objective.clip"] == "0.2"
    assert {"engine": "flower", "version.mlflow": "3.17.2"}.items() <= database.tags(parent).items()
    assert database.metric(parent, "system/system_memory_usage_megabytes")
    assert {database.status(run) for run in [parent, *runs.values()]} == {"FINISHED"}


def test_files_of_a_run_are_sent(finished: Path, database: Database):
    kept = database.artifacts(database.runs("carts")[NAME])
    assert kept.is_relative_to(database.path.parent / "mlartifacts" / "carts")
    for name in ("scenario.toml", "results.json", "rounds.jsonl", "figures/returns.svg"):
        assert (kept / name).read_bytes() == (finished / name).read_bytes()
    assert list(kept.glob("checkpoints/round-0002/*"))


def test_an_experiment_has_the_saved_views(finished: Path, database: Database):
    views = [key for key in database.experiment_tags("carts") if key.startswith("mlflow.sharedViewState.")]
    assert sorted(views) == [f"mlflow.sharedViewState.{key}" for key in ("by-method", "clients", "federation")]


def test_a_sent_spool_is_removed_and_its_ids_stay(finished: Path):
    assert {path.name for path in (finished / "tracking").iterdir()} == {"sent.json", "writer.log", "lock"}
    assert replay(finished, from_run=True) == 0


def test_a_clients_model_predicts_without_our_code(finished: Path, database: Database, tmp_path: Path):
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "observations.npy", observations)
    run = database.runs("carts")["backwards"]
    code = f"""
import sys, numpy, torch, mlflow.pytorch
mlflow.set_tracking_uri({database.uri!r})
model = mlflow.pytorch.load_model("runs:/{run}/carts-backwards")
numpy.save("actions.npy", model(torch.from_numpy(numpy.load("observations.npy"))).numpy())
assert "grpo_fed" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    ours = load_policy(finished, "backwards")
    expected = [ours.predict(observation) for observation in observations]
    assert len(set(map(int, expected))) == 2
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), expected)


def test_models_and_tasks_have_names_and_models_their_returns_and_a_registered_version(
    finished: Path, database: Database
):
    runs, names = database.runs("carts"), ["carts-backwards", "carts-cart-0", "carts-cart-1"]
    models = dict(database.rows("select name, model_id from logged_models order by name"))
    assert list(models) == names
    versions = "select name, version, source, run_id from model_versions order by name"
    sources = [(name, 1, f"models:/{models[name]}", runs[name.removeprefix("carts-")]) for name in names]
    assert database.rows(versions) == sources
    query = "select metric_name, metric_step, metric_value from logged_model_metrics where model_id = ? order by 1"
    returns = [("model/return", 2, 22.0), ("model/return_before", 2, 1.0)]
    assert database.rows(query, models["carts-backwards"]) == returns
    query = "select d.name from inputs i join datasets d on d.dataset_uuid = i.source_id where i.destination_id = ?"
    carts = [("grpo_fed/CartPole-v1",), ("grpo_fed/CartPole-v1(swap_actions=True)",)]
    assert sorted(database.rows(query, runs[NAME])) == carts
    assert database.rows(query, runs["backwards"]) == carts[1:]


def test_a_run_that_reached_no_store_may_go_to_another(database: Database, tmp_path: Path):
    tracker = track_rounds("http://127.0.0.1:9", tmp_path / "run", scenario("mistyped", carts=1), range(3))
    assert "did not take all" in str(tracker.trouble)
    assert replay(tmp_path / "run", database.uri) == 5  # how it began, three rounds and the end
    parent = database.runs("mistyped")["grpo seed 0"]
    assert database.metric(parent, "global_step") == [(0, 0.0), (1, 384.0), (2, 768.0)]
    with pytest.raises(ValueError, match="goes on there, not at"):
        replay(tmp_path / "run", "http://127.0.0.1:9")


def test_a_resumed_run_continues_its_runs_without_duplicate_points(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri)
    given = scenario("resumed", carts=1)
    track_rounds(database.uri, tmp_path / "run", given, range(4), "interrupted")
    runs = database.runs("resumed")
    assert {database.status(run) for run in runs.values()} == {"KILLED"}
    tracker = track_rounds("", tmp_path / "run", given, range(2, 6), resumed=True)
    assert tracker.trouble is None
    assert database.runs("resumed") == runs
    assert database.metric(runs["cart"], "eval/episodic_return") == [(n, 10.0 * n) for n in range(6)]
    assert {database.status(run) for run in runs.values()} == {"FINISHED"}
    with pytest.raises(ValueError, match="and goes on there"):
        Tracker.open("http://elsewhere:5000", tmp_path / "run", given, resumed=True)


def test_a_killed_run_is_sent_completely_and_marked_as_killed(database: Database, tmp_path: Path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from tests.support.tracking_runs import line, scenario
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.tracking import Tracker
given = scenario("killed", carts=1)
tracker = Tracker.open({database.uri!r}, Path("."), given)
for number in range(3):
    tracker.round(line(given, number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 120  # the writer goes on by itself
    while not (database.is_made and "KILLED" in map(database.status, database.runs("killed").values())):
        assert time.monotonic() < until
        time.sleep(0.1)
    with Spool(tmp_path).locked(60):
        runs = database.runs("killed")
    assert database.metric(runs["cart"], "eval/episodic_return") == [(0, 0.0), (1, 10.0), (2, 20.0)]
    assert {database.status(run) for run in runs.values()} == {"KILLED"}
    assert database.tags(runs["grpo seed 0"])["mlflow.note.content"].startswith("**Killed after round 2 of 4**")
    track_rounds(database.uri, tmp_path, scenario("killed", carts=1), range(3, 5), resumed=True)
    assert database.metric(runs["cart"], "eval/episodic_return") == [(n, 10.0 * n) for n in range(5)]


def test_a_client_that_joins_later_gets_a_run_of_its_own(database: Database, tmp_path: Path):
    given, joined = scenario("joined", carts=1), scenario("joined", carts=1)
    joined = joined.model_copy(
        update={"clients": [*joined.clients, joined.clients[0].model_copy(update={"name": "doe"})]}
    )
    tracker = Tracker.open(database.uri, tmp_path / "run", given)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scenario.toml").write_text(given.dumps())
    for number in range(4):
        tracker.round(line(given if number < 2 else joined, number))
    tracker.close(document(joined, 3), "finished")
    assert tracker.trouble is None
    runs = database.runs("joined")
    assert {*runs} == {"grpo seed 0", "cart", "backwards", "doe"}
    assert database.metric(runs["doe"], "eval/episodic_return") == [(2, 22.0), (3, 32.0)]
    assert database.params(runs["doe"]) == {"client": "doe", "method": "grpo", "joined": "2"}
    assert database.status(runs["doe"]) == "FINISHED"


def test_a_federation_of_many_clients_is_one_run_with_a_table(database: Database, tmp_path: Path):
    given = scenario("many", carts=64)
    track_rounds(database.uri, tmp_path / "run", given, range(2))
    ((name, run),) = database.runs("many").items()
    assert name == "grpo seed 0"
    assert database.metric(run, "eval/episodic_return_p50") == [(0, 32.0), (1, 42.0)]
    table = json.loads((database.artifacts(run) / "clients.json").read_text())
    assert table["data"][-1][:3] == ["backwards", "grpo_fed/CartPole-v1", 74.0]
    assert json.loads(database.tags(run)["mlflow.loggedArtifacts"]) == [{"path": "clients.json", "type": "table"}]


# Failures -------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_outage_delays_no_round_and_loses_no_point(finished: Path, database: Database, tmp_path: Path):
    """One run goes through a server's death and restart; another ends during the outage and is replayed after it.

    They share the two servers, each of which takes ten seconds of a processor.
    """
    given, port = scenario("outage", carts=1, rounds=90), free_port()
    server_uri = f"http://127.0.0.1:{port}"
    took: dict[str, list[float]] = {"up": [], "down": [], "back": []}

    def track(when: str, rounds: range) -> None:
        for number in rounds:
            began = time.perf_counter()
            tracker.round(line(given, number))
            took[when].append(time.perf_counter() - began)
            time.sleep(0.05)

    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker.open(server_uri, run, given, models=False)
    with open_pages(uri=database.uri, port=port) as up:
        track("up", range(30))
        until = time.monotonic() + 60
        while Spool(run).load_state("").position == 0 and time.monotonic() < until:
            time.sleep(0.1)  # until some of it has arrived
        assert tracker.run_id is not None
        assert up.server is not None
        os.killpg(up.server.pid, signal.SIGKILL)
        track("down", range(30, 60))
    began, ended = end_in_an_outage(tmp_path / "replayed", port)
    with open_pages(uri=database.uri, port=port):
        track("back", range(60, 91))
        tracker.close(document(given, 90), "finished")
        assert replay(tmp_path / "replayed", server_uri) == 5
        assert replay(tmp_path / "replayed", from_run=True) == 0
    assert tracker.trouble is None
    assert "MlflowException" in (run / "tracking" / "writer.log").read_text()  # the outage is in the log
    runs = database.runs("outage")
    for name, k in (("cart", 0), ("backwards", 1)):
        assert database.metric(runs[name], "eval/episodic_return") == [(n, 10.0 * n + k) for n in range(91)]
    assert database.metric(runs["grpo seed 0"], "comm/MB_total") == [(n, 0.1 * n) for n in range(91)]
    assert database.status(runs["grpo seed 0"]) == "FINISHED"
    assert statistics.median(took["down"]) < 5 * statistics.median(took["up"])
    assert sum(took["down"]) < 1.0  # one request that waits for its time-out takes ten times as long
    runs = database.runs("replayed")
    assert database.metric(runs["cart"], "eval/episodic_return") == [(0, 0.0), (1, 10.0), (2, 20.0)]
    stamps = [stamp for (stamp,) in database.rows("select timestamp from metrics where run_uuid = ?", runs["cart"])]
    assert all(1000 * began - 2 <= stamp <= 1000 * ended for stamp in stamps)


def end_in_an_outage(run: Path, port: int) -> tuple[float, float]:
    """Track a run of three rounds to a server that is away, and return when it began and ended."""
    given = scenario("replayed", carts=1)
    run.mkdir()
    began = time.time()
    tracker = Tracker.open(f"http://ann:hush-hush@127.0.0.1:{port}", run, given, models=False)
    for number in range(3):
        tracker.round(line(given, number))
    tracker.close(document(given, 2), "finished")
    ended = time.time()
    assert "grpo-fed replay" in str(tracker.trouble)
    assert not files_with_words(run, ["hush-hush"])
    with pytest.raises(TimeoutError, match="5 of 5 records are not sent"):
        replay(run, from_run=True)
    return began, ended


def test_a_folder_without_a_tracked_run_has_nothing_to_replay(tmp_path: Path):
    with pytest.raises(ValueError, match="no run was tracked in it"):
        replay(tmp_path)


def test_a_deleted_run_does_not_stop_the_others(database: Database, tmp_path: Path):
    given = scenario("deleted", carts=1)
    track_rounds(database.uri, tmp_path / "run", given, range(2), "interrupted")
    runs = database.runs("deleted")
    database.rows("update runs set lifecycle_stage = 'deleted' where run_uuid = ? returning name", runs["cart"])
    tracker = track_rounds(database.uri, tmp_path / "run", given, range(2, 4), resumed=True)
    assert tracker.trouble is None
    assert [step for step, _ in database.metric(runs["backwards"], "eval/episodic_return")] == [0, 1, 2, 3]
    assert "left out" in (tmp_path / "run" / "tracking" / "writer.log").read_text()
