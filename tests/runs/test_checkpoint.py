"""Checkpoints are complete or missing, and give back what was written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord, SiteRecord


def make_checkpoint(number: int) -> Checkpoint:
    """Make a checkpoint of a round with two clients."""
    rng = np.random.default_rng(number)
    arrays = {"a": rng.standard_normal((3, 2)), "b": rng.integers(0, 9, 4, dtype=np.uint64), "none": np.zeros((0, 1))}
    return Checkpoint(number, {"steps": {"x": number}}, {"x": arrays, "y.z": {"a": np.array(True)}})


def read_states(folder: Path) -> dict[str, checkpoint.Arrays]:
    """Read the clients' states from the latest checkpoint."""
    latest = checkpoint.latest(folder)
    assert latest is not None
    return latest.states()


def latest_round(folder: Path) -> int | None:
    """Read the round of the latest checkpoint."""
    latest = checkpoint.latest(folder)
    return None if latest is None else latest.round


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, make_checkpoint(3), keep=2)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert (latest.round, latest.parts) == (3, {"steps": {"x": 3}})
    for client, arrays in make_checkpoint(3).clients.items():
        for name, array in arrays.items():
            assert latest.states()[client][name].dtype == array.dtype
            assert np.array_equal(latest.states()[client][name], array)


def test_the_latest_checkpoints_by_number_remain(tmp_path: Path) -> None:
    for number in (8, 9, 10, 9999, 10000):
        checkpoint.write(tmp_path, make_checkpoint(number), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["round-10000", "round-9999"]
    assert latest_round(tmp_path) == 10000


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the writer at each file: the checkpoint before remains the latest, and the next write succeeds."""
    checkpoint.write(tmp_path, make_checkpoint(1), keep=2)
    write_atomic = checkpoint.write_atomic
    for count in range(4):
        remaining = [count]

        def write_some(path: Path, data: str | bytes, private: bool = False, remaining: list[int] = remaining) -> None:
            if remaining[0] == 0:
                raise KeyboardInterrupt
            remaining[0] -= 1
            write_atomic(path, data, private)

        monkeypatch.setattr(checkpoint, "write_atomic", write_some)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path, make_checkpoint(2), keep=2)
        assert latest_round(tmp_path) == 1
    monkeypatch.setattr(checkpoint, "write_atomic", write_atomic)
    checkpoint.write(tmp_path, make_checkpoint(2), keep=2)
    assert latest_round(tmp_path) == 2


def flip_bit(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zero_end(file: Path) -> None:
    """Replace the second half of a file by zeros, as a page that never reached the disk."""
    half = file.stat().st_size // 2
    file.write_bytes(file.read_bytes()[:half].ljust(file.stat().st_size, b"\0"))


def cut_end(file: Path) -> None:
    """Remove the last bytes of a file."""
    file.write_bytes(file.read_bytes()[:-5])


def take_from_before(file: Path) -> None:
    """Replace a file by that of the checkpoint before."""
    file.write_bytes(Path(str(file).replace("round-0002", "round-0001")).read_bytes())


def link_elsewhere(file: Path) -> None:
    """Replace a file by a link to the same content outside of the run."""
    file.rename(file.parents[4] / "elsewhere")
    file.symlink_to(file.parents[4] / "elsewhere")


DAMAGES = [flip_bit, zero_end, cut_end, take_from_before, Path.unlink, link_elsewhere]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.json", "shared.safetensors", "clients/x.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, damage: Callable[[Path], None]):
    run = tmp_path / "a" / "b" / "c" / "run"
    run.mkdir(parents=True)
    for number in (1, 2):
        checkpoint.write(run, make_federated(run, number, float(number)), keep=2)
    damage(run / "checkpoints" / "round-0002" / name)
    latest = checkpoint.latest(run)
    assert latest is not None
    assert latest.round == 1
    assert latest.shared is not None
    assert latest.shared["actor.bias"].tolist() == [1.0]
    (problem,) = latest.passed_over
    assert "round-0002: is damaged: " in problem


def test_swapped_states_of_clients_are_noticed(tmp_path: Path):
    for number in (1, 2):
        checkpoint.write(tmp_path, make_checkpoint(number), keep=2)
    clients = tmp_path / "checkpoints" / "round-0002" / "clients"
    (clients / "x.safetensors").rename(clients / "z")
    (clients / "y.z.safetensors").rename(clients / "x.safetensors")
    (clients / "z").rename(clients / "y.z.safetensors")
    assert latest_round(tmp_path) == 1


def test_a_checkpoint_under_the_name_of_another_is_noticed(tmp_path: Path):
    for number in (1, 2):
        checkpoint.write(tmp_path, make_checkpoint(number), keep=2)
    (tmp_path / "checkpoints" / "round-0002").rename(tmp_path / "checkpoints" / "round-0003")
    assert latest_round(tmp_path) == 1


def test_without_a_whole_checkpoint_there_is_an_error_with_the_cure(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None
    checkpoint.write(tmp_path, make_checkpoint(1), keep=2)
    flip_bit(tmp_path / "checkpoints" / "round-0001" / "state.json")
    with pytest.raises(ValueError, match=r"round-0001: is damaged: state.json does not have.*with --out and --replace"):
        checkpoint.latest(tmp_path)


def reseal(folder: Path) -> None:
    """Write the digests of a checkpoint's files as they are now, as somebody could who made the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    lines = (f"{sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    "state",
    [
        "[1, 2]",
        "{}",
        '{"round": 2, "clients": null, "origins": {}, "parts": {}}',
        "null",
        "[" * 100_000,
        '{"round": 2, "clients": [["x"]], "origins": {}, "parts": {}}',
        '{"round": 2, "clients": ["../../x"], "origins": {}, "parts": {}}',
        '{"round": 2, "clients": ["x"], "origins": {"x": "../../../escaped.safetensors"}, "parts": {}}',
        '{"round": 2, "clients": ["x"], "origins": {"x": "/tmp/escaped.safetensors"}, "parts": {}}',
        '{"round": 2, "clients": ["x"], "origins": {"x": 5}, "parts": {}}',
        '{"round": 2, "clients": ["unknown"], "origins": {}, "parts": {}}',
    ],
)
def test_a_checkpoint_with_another_state_is_damaged(tmp_path: Path, state: str) -> None:
    for number in (1, 2):
        checkpoint.write(tmp_path, make_checkpoint(number), keep=2)
    (tmp_path / "checkpoints" / "round-0002" / "state.json").write_text(state)
    reseal(tmp_path / "checkpoints" / "round-0002")
    assert latest_round(tmp_path) == 1


def test_the_digests_are_in_the_form_of_sha256sum(tmp_path: Path):
    checkpoint.write(tmp_path, make_checkpoint(1), keep=1)
    folder = tmp_path / "checkpoints" / "round-0001"
    written = (folder / "SHA256SUMS").read_text()
    reseal(folder)
    assert (folder / "SHA256SUMS").read_text() == written


# Federations ---------------------------------------------------------------------------------------------------------


def make_federated(folder: Path, number: int, shared: float = 0.0) -> Checkpoint:
    """Make a checkpoint that links to the clients' files, each from the client's own latest round."""
    files = {}
    for client, last in (("x", number), ("y.z", 1)):
        files[client] = folder / client / f"round-{last:04d}.safetensors"
        files[client].parent.mkdir(exist_ok=True)
        save_file({"a": np.full(2, last)}, files[client])
    return Checkpoint(number, {"steps": {}}, files=files, shared={"actor.bias": np.array([shared])})


def test_a_federations_checkpoint_links_to_the_clients_files(tmp_path: Path) -> None:
    given = make_federated(tmp_path, 3, 0.5)
    checkpoint.write(tmp_path, given, keep=2)
    folder = tmp_path / "checkpoints" / "round-0003"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "SHA256SUMS",
        "state.json",
        "shared.safetensors",
        "clients/x.safetensors",
        "clients/y.z.safetensors",
    }
    for client, file in given.files.items():
        assert (folder / "clients" / f"{client}.safetensors").samefile(file)
        file.unlink()
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert latest.shared is not None
    assert latest.shared["actor.bias"].tolist() == [0.5]
    assert latest.original_names == {"x": "round-0003.safetensors", "y.z": "round-0001.safetensors"}
    assert {client: int(arrays["a"][0]) for client, arrays in latest.states().items()} == {"x": 3, "y.z": 1}


def test_a_checkpoint_has_copies_on_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.write(tmp_path, make_federated(tmp_path, 1), keep=1)
    assert set(read_states(tmp_path)) == {"x", "y.z"}


def test_the_best_checkpoint_remains_beside_the_latest(tmp_path: Path) -> None:
    for number, best in ((1, None), (2, 1), (3, 2), (4, 2), (5, 2)):
        checkpoint.write(tmp_path, make_federated(tmp_path, number), keep=2, best=best)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert latest_round(tmp_path) == 5


def test_records_in_a_checkpoint_are_read_back(tmp_path: Path) -> None:
    step = AcceptedStep((AcceptedBlock("actor", 0.1, math.inf, 0.5, None),), 0.2, math.inf, None, ("x",))
    record = RoundRecord(
        2,
        9,
        0.1,
        7,
        [
            ClientRecord("x", "t", 1, 1, {"losses/kl": 0.1}, 0.5, 0.1, ("a",), {"actor": 1}, Failure("late", "asleep")),
            ClientRecord("y", "t"),
        ],
        ServerRecord(step, {"joint": 0.5}, 1, 2, 3, ("krum: kept x",)),
        (SiteRecord("north", ("x", "y"), step, ("a",), {"actor": 0.7}, left={"a": 0.7}),),
    )
    checkpoint.write(tmp_path, Checkpoint(2, {"record": record, "step": step}), keep=1)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert latest.part("record", RoundRecord) == record
    assert latest.part("step", AcceptedStep) == step
