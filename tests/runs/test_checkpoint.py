"""Checkpoints are whole or not there."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord


def after(number: int) -> Checkpoint:
    rng = np.random.default_rng(number)
    arrays = {"a": rng.standard_normal((3, 2)), "b": rng.integers(0, 9, 4, dtype=np.uint64), "none": np.zeros((0, 1))}
    return Checkpoint(number, {"steps": {"x": number}}, {"x": arrays, "y.z": {"a": np.array(True)}})


def states_of(folder: Path) -> dict[str, checkpoint.Arrays]:
    found = checkpoint.latest(folder)
    assert found is not None
    return found.states()


def round_of(folder: Path) -> int | None:
    found = checkpoint.latest(folder)
    return None if found is None else found.round


def test_what_was_written_is_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, after(3), keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.round, found.parts) == (3, {"steps": {"x": 3}})
    for client, arrays in after(3).clients.items():
        for name, array in arrays.items():
            assert found.states()[client][name].dtype == array.dtype
            assert np.array_equal(found.states()[client][name], array)


def test_the_latest_are_kept_and_rounds_count_as_numbers(tmp_path: Path) -> None:
    for number in (8, 9, 10, 9999, 10000):
        checkpoint.write(tmp_path, after(number), keep=2)
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["round-10000", "round-9999"]
    assert round_of(tmp_path) == 10000


def test_a_checkpoint_cut_off_in_the_middle_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the writer is stopped at, the one before is what a reader finds; and the next write succeeds."""
    checkpoint.write(tmp_path, after(1), keep=2)
    whole = checkpoint.write_atomic
    for survives in range(3):
        left = [survives]

        def stops(path: Path, data: str | bytes, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            whole(path, data)

        monkeypatch.setattr(checkpoint, "write_atomic", stops)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path, after(2), keep=2)
        assert round_of(tmp_path) == 1
    monkeypatch.setattr(checkpoint, "write_atomic", whole)
    checkpoint.write(tmp_path, after(2), keep=2)
    assert round_of(tmp_path) == 2


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for number in (1, 2):
        checkpoint.write(tmp_path, after(number), keep=2)
    file = tmp_path / "checkpoints" / "round-0002" / "clients" / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"round-0002: cannot be read as a checkpoint.*to go on from round-0001"):
        states_of(tmp_path)


@pytest.mark.parametrize("state", ["[1, 2]", "{}", '{"round": 2, "clients": null, "origins": {}, "parts": {}}', "null"])
def test_a_checkpoint_whose_state_is_something_else_is_damaged_too(tmp_path: Path, state: str) -> None:
    for number in (1, 2):
        checkpoint.write(tmp_path, after(number), keep=2)
    (tmp_path / "checkpoints" / "round-0002" / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"round-0002: cannot be read as a checkpoint.*to go on from round-0001"):
        checkpoint.latest(tmp_path)


def test_a_clients_file_that_is_cut_or_gone_is_found_before_anything_goes_on(tmp_path: Path) -> None:
    for number in (1, 2):
        checkpoint.write(tmp_path, after(number), keep=2)
    file = tmp_path / "checkpoints" / "round-0002" / "clients" / "x.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-5]), file.unlink):
        damage()
        with pytest.raises(ValueError, match=r"round-0002: cannot be read as a checkpoint.*to go on from round-0001"):
            checkpoint.latest(tmp_path)


# Of a federation ------------------------------------------------------------------------------------------------------


def federated(folder: Path, number: int, shared: float = 0.0) -> Checkpoint:
    """Clients whose states lie somewhere else, each from its own last round."""
    files = {}
    for client, last in (("x", number), ("y.z", 1)):
        files[client] = folder / client / f"round-{last:04d}.safetensors"
        files[client].parent.mkdir(exist_ok=True)
        save_file({"a": np.full(2, last)}, files[client])
    return Checkpoint(number, {"steps": {}}, files=files, shared={"actor.bias": np.array([shared])})


def test_a_federation_keeps_its_shared_blocks_and_a_second_name_of_each_clients_file(tmp_path: Path) -> None:
    given = federated(tmp_path, 3, 0.5)
    checkpoint.write(tmp_path, given, keep=2)
    place = tmp_path / "checkpoints" / "round-0003"
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert names == {"state.json", "shared.safetensors", "clients/x.safetensors", "clients/y.z.safetensors"}
    for client, file in given.files.items():
        assert (place / "clients" / f"{client}.safetensors").samefile(file)
        file.unlink()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.shared is not None
    assert found.shared["actor.bias"].tolist() == [0.5]
    assert found.original_names == {"x": "round-0003.safetensors", "y.z": "round-0001.safetensors"}
    assert {client: int(arrays["a"][0]) for client, arrays in found.states().items()} == {"x": 3, "y.z": 1}


def test_where_a_disk_gives_no_second_names_a_checkpoint_has_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.write(tmp_path, federated(tmp_path, 1), keep=1)
    assert set(states_of(tmp_path)) == {"x", "y.z"}


def test_the_best_round_stays_beside_the_latest(tmp_path: Path) -> None:
    for number, best in ((1, None), (2, 1), (3, 2), (4, 2), (5, 2)):
        checkpoint.write(tmp_path, federated(tmp_path, number), keep=2, best=best)
    assert sorted(place.name[-1] for place in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert round_of(tmp_path) == 5


def test_records_in_the_notes_become_json(tmp_path: Path) -> None:
    kept = AcceptedStep((AcceptedBlock("actor", 0.1, math.inf, 0.5, None),), 0.2, math.inf, None, ("x",))
    note = RoundRecord(
        2,
        9,
        0.1,
        7,
        [
            ClientRecord("x", "t", 1, 1, {"losses/kl": 0.1}, 0.5, 0.1, ("a",), {"actor": 1}, Failure("late", "asleep")),
            ClientRecord("y", "t"),
        ],
        ServerRecord(kept, {"joint": 0.5}, 1, 2, 3, ("krum: kept x",)),
    )
    checkpoint.write(tmp_path, Checkpoint(2, {"note": note, "kept": kept}), keep=1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.part("note", RoundRecord) == note
    assert found.part("kept", AcceptedStep) == kept
