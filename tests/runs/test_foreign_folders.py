"""A run folder of somebody else: nothing is written outside it, imported from it, or sent where it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fed.runs.folder import FILES, FOLDERS, open_unfinished, read_scenario
from grpo_fed.runs.history import read_history
from grpo_fed.runs.tracking import Tracker, replay
from grpo_fed.runs.tracking.spool import SendState, Spool
from grpo_fed.runs.tracking.store import resolve_store
from grpo_fed.runs.tracking.tracker import start_writer
from grpo_fed.runs.tracking.ui import open_pages
from grpo_fed.scenario.scenario import Scenario

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
"""
SCENARIO = """
name = "theirs"
rounds = 2
steps = 64
rollout = { num_envs = 2, horizon = 32 }
[[clients]]
name = "cart"
env = "%s"
"""


def make_folder(folder: Path, env: str = "grpo_fed/CartPole-v1") -> Path:
    """Make the folder of a run without a round."""
    folder.mkdir(parents=True)
    (folder / "scenario.toml").write_text(SCENARIO % env)
    (folder / "rounds.jsonl").write_text("")
    return folder


# Links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [*(name for name in FILES if name != "engine.json"), *FOLDERS, "policies/x", "checkpoints/round-0001/clients"],
)
def test_a_folder_with_a_link_in_it_is_refused(tmp_path: Path, name: str):
    folder, outside = make_folder(tmp_path / "run"), tmp_path / "outside"
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    is_file = "." in name
    if link.exists():
        link.rename(outside)
    elif is_file:
        outside.write_text("{}")
    else:
        outside.mkdir()
    link.symlink_to(outside)
    for read in (open_unfinished, read_history):
        with pytest.raises(ValueError, match=rf"{name}: is a link; put what it leads to in its place"):
            read(folder)


def test_a_run_may_be_named_by_a_link(tmp_path: Path):
    make_folder(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    assert read_history(tmp_path / "latest").clients == ("cart",)


# Imports -------------------------------------------------------------------------------------------------------------


def import_evil(folder: Path, here: Path, command: list[str]) -> str:
    """Run a command of the package in a folder; return what it says."""
    words = [sys.executable, "-P", "-m", "grpo_fed", *command]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(here.parent), "MLFLOW_TRACKING_URI": "off"}
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert not list(folder.rglob("ran")), "code of the folder was executed"
    return done.stderr


def test_no_module_is_imported_from_the_folder_of_a_run(tmp_path: Path):
    folder = make_folder(tmp_path / "runs" / "theirs", "evil:Env-v0")
    (folder / "evil.py").write_text(EVIL)
    assert "evil cannot be imported" in import_evil(folder, folder, ["run", "--resume", "."])
    (folder / "scenario.toml").write_text(SCENARIO % "theirs.evil:Env-v0")
    said = import_evil(folder, tmp_path / "runs", ["run", "--resume", "theirs"])
    assert "from which nothing is imported" in said.replace("\n", " ")


def test_a_folder_without_rounds_is_no_place_to_import_from_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_folder(tmp_path / "theirs")
    (folder / "rounds.jsonl").unlink()
    (folder / "evil_module.py").write_text(EVIL)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    read_scenario(folder)
    with pytest.raises(ModuleNotFoundError, match="the folder of a run, from which nothing is imported"):
        __import__("evil_module")
    assert not (folder / "ran").exists()


def test_the_process_that_sends_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_folder(tmp_path / "theirs")
    (folder / "json.py").write_text(EVIL)
    monkeypatch.chdir(folder)
    spool = Spool(folder)
    spool.folder.mkdir()
    spool.append("resume", {})
    store = resolve_store(f"sqlite:///{tmp_path}/x.db")
    assert store is not None
    with start_writer(spool, store) as writer:
        pass  # its input is closed, so it ends
    assert writer.returncode == 1, "a run without a beginning cannot be sent"
    assert not (folder / "ran").exists()


# Stores --------------------------------------------------------------------------------------------------------------


def track_at(folder: Path, store: str) -> Path:
    """Let a folder say that its run is tracked in a store, with a record that has not been sent."""
    spool = Spool(make_folder(folder))
    spool.folder.mkdir()
    spool.save_state(SendState(store, "r", 0, "1", "abc"))
    spool.append("resume", {})
    return folder


def test_a_store_that_the_folder_alone_names_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine:5000")
    folder = track_at(tmp_path / "run", "http://theirs:5000")
    scenario = Scenario.load(folder / "scenario.toml")
    message = "is tracked at http://theirs:5000, and you at http://mine:5000.*--tracking-from-run"
    with pytest.raises(ValueError, match=message):
        Tracker.open(None, folder, scenario, resumed=True)
    with pytest.raises(ValueError, match=message):
        replay(folder)
    with pytest.raises(ValueError, match=message), open_pages(folder):
        pass
    trusted = Tracker.open(None, folder, scenario, resumed=True, from_run=True)
    assert trusted.store is not None
    assert trusted.store.uri == "http://theirs:5000"


@pytest.mark.parametrize("store", ["http://mine:5000", "sqlite:///{}/runs/mlflow.db"])
def test_the_store_that_would_be_used_anyway_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if store.startswith("http"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = track_at(tmp_path / "run", store.format(tmp_path))
    tracker = Tracker.open(None, folder, Scenario.load(folder / "scenario.toml"), resumed=True)
    assert tracker.store is not None
    assert tracker.store.uri == store.format(tmp_path)


@pytest.mark.parametrize("sent", ["[]", '{"store": 5}', '{"store": "off", "position": "x"}', "[" * 100_000])
def test_a_damaged_send_state_is_a_new_one(tmp_path: Path, sent: str):
    spool = Spool(tmp_path)
    spool.folder.mkdir()
    spool.sent_path.write_text(sent)
    assert spool.load_state("here") == SendState("here")
    spool.path.write_text("[" * 100_000 + "\n" + json.dumps({"kind": "resume", "time": 1}) + "\n")
    assert [record.kind for record in spool.read()] == ["resume"]
