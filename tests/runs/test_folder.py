"""The folder of a run: one process at a time writes into it, and no run is lost without being asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_fed.policy.shared_names import SharedNames
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import (
    FILES,
    FOLDERS,
    FolderTakenError,
    check_unfinished,
    check_usable,
    claim_folder,
    open_unfinished,
    reclaim_folder,
    remove_run,
)
from grpo_fed.runs.recorder import Recorder
from grpo_fed.scenario.scenario import Scenario

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no locks of folders")

HOLD = """
import sys
from pathlib import Path
from grpo_fed.runs.folder import claim_folder
with claim_folder(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""
TRY = """
import sys
from pathlib import Path
from grpo_fed.runs.folder import FolderTakenError, claim_folder
try:
    claim_folder(Path(sys.argv[1]))
except FolderTakenError as error:
    sys.exit(str(error))
"""


@contextmanager
def held_by_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the claim of a folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        try:
            yield holder
        finally:
            holder.kill()


def write_run(folder: Path) -> None:
    """Write all files that a run may leave, each with its name in it."""
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(name)
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)


# Locks ---------------------------------------------------------------------------------------------------------------


def test_a_second_claim_in_the_same_process_is_refused(tmp_path: Path):
    with (
        claim_folder(tmp_path / "run"),
        pytest.raises(FolderTakenError, match=r"run: another run is being written to it; name another folder"),
    ):
        claim_folder(tmp_path / "run")
    with claim_folder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_claim_of_another_process_is_refused(tmp_path: Path):
    with claim_folder(tmp_path / "run"):
        refused = subprocess.run(
            [sys.executable, "-c", TRY, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert "another run is being written to it" in refused.stderr


def test_replace_does_not_break_the_claim_of_another_process(tmp_path: Path):
    with held_by_process(tmp_path / "run"):
        (tmp_path / "run" / "rounds.jsonl").write_text("{}")
        with pytest.raises(FolderTakenError, match="another run is being written to it"):
            claim_folder(tmp_path / "run", replace=True)
        with pytest.raises(FolderTakenError, match="another run is being written to it"):
            reclaim_folder(tmp_path / "run")


def test_a_killed_process_releases_its_claim(tmp_path: Path):
    with held_by_process(tmp_path / "run") as holder:
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        claim_folder(tmp_path / "run").close()


# Which folders may be claimed ----------------------------------------------------------------------------------------


def test_an_unused_claim_removes_the_empty_folder_that_it_made(tmp_path: Path):
    claim_folder(tmp_path / "run").close()
    assert not list(tmp_path.iterdir())


def test_a_used_claim_leaves_the_folder(tmp_path: Path):
    with claim_folder(tmp_path / "run"):
        (tmp_path / "run" / "scenario.toml").write_text("name = 'a'")
    assert (tmp_path / "run" / "scenario.toml").read_text() == "name = 'a'"


def test_leftovers_of_a_run_without_a_round_may_be_replaced(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "rounds.jsonl").unlink()
    claim_folder(tmp_path).close()


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_recorded_run_is_refused_without_replace(tmp_path: Path, status: str):
    (tmp_path / "rounds.jsonl").write_text('{"round": 1, "clients": {}}\n')
    (tmp_path / "results.json").write_text(f'{{"status": "{status}"}}')
    with pytest.raises(FolderTakenError, match="holds a run; name another folder, or remove that run with --replace"):
        claim_folder(tmp_path)
    with claim_folder(tmp_path, replace=True):
        assert (tmp_path / "rounds.jsonl").is_file(), "the recorder removes the run, once the new one begins"


def test_a_refused_claim_is_released(tmp_path: Path):
    (tmp_path / "rounds.jsonl").write_text("{}")
    with pytest.raises(FolderTakenError, match="holds a run"):
        claim_folder(tmp_path)
    reclaim_folder(tmp_path).close()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "scenario.toml"])
def test_a_folder_with_a_users_file_alone_is_refused(tmp_path: Path, replace: bool, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run; name another folder") as refused:
        claim_folder(tmp_path, replace)
    assert not isinstance(refused.value, FolderTakenError)
    assert (tmp_path / name).read_text() == "mine"


def test_removing_a_run_leaves_other_files(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plots").mkdir()
    remove_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "plots"}


def test_a_damaged_results_file_is_an_error_when_a_run_goes_on(tmp_path: Path):
    (tmp_path / "results.json").write_text('{"status": ')
    with pytest.raises(ValueError, match=r"results\.json: is damaged"):
        check_unfinished(tmp_path)


# Killed in the first instant -----------------------------------------------------------------------------------------

TINY = Scenario.loads('name = "tiny"\nrounds = 1\n[[clients]]\nname = "cart"\nenv = "grpo_fed/CartPole-v1"\n')


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("replaces", [False, True])
def test_a_run_that_was_killed_at_its_first_files_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, replaces: bool
):
    folder = tmp_path / "run"
    if replaces:
        write_run(folder)
    count = 0

    def write_some(path: Path, data: str | bytes) -> None:
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        write_atomic(path, data)

    monkeypatch.setattr("grpo_fed.runs.recorder.write_atomic", write_some)
    shared = SharedNames((), {})
    try:
        Recorder(TINY, folder, "cpu").open(lambda record: None, shared)
    except KeyboardInterrupt:
        assert writes < 3
    if (folder / "scenario.toml").is_file():
        with pytest.raises(FolderTakenError, match="--replace"):
            claim_folder(folder)
        assert open_unfinished(folder)[0].clients == TINY.clients
        check_usable(folder)
    else:
        claim_folder(folder).close()


def test_the_rounds_are_removed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path)
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    remove_run(tmp_path)
    assert removed[-1] == "rounds.jsonl", "as long as it is there, the folder counts as that of a run"
