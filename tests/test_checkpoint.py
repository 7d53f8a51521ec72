"""Checkpoints are whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grpo_fed import checkpoint
from grpo_fed.checkpoint import Checkpoint


def after(number: int) -> Checkpoint:
    rng = np.random.default_rng(number)
    arrays = {"a": rng.standard_normal((3, 2)), "b": rng.integers(0, 9, 4, dtype=np.uint64), "none": np.zeros((0, 1))}
    return Checkpoint(number, {"steps": {"x": number}}, {"x": arrays, "y.z": {"a": np.array(True)}})


def round_of(folder: Path) -> int | None:
    found = checkpoint.latest(folder)
    return None if found is None else found.round


def test_what_was_written_is_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, after(3), keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.round, found.notes) == (3, {"steps": {"x": 3}})
    for client, arrays in after(3).clients.items():
        for name, array in arrays.items():
            assert found.clients[client][name].dtype == array.dtype
            assert np.array_equal(found.clients[client][name], array)


def test_the_latest_are_kept_and_rounds_count_as_numbers(tmp_path: Path) -> None:
    for number in (8, 9, 10, 9999, 10000):
        checkpoint.write(tmp_path, after(number), keep=2)
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["round-10000", "round-9999"]
    assert round_of(tmp_path) == 10000


def test_a_checkpoint_cut_off_in_the_middle_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the writer is stopped at, the one before is what a reader finds; and the next write succeeds."""
    checkpoint.write(tmp_path, after(1), keep=2)
    whole = checkpoint.write_whole
    for survives in range(3):
        left = [survives]

        def stops(path: Path, data: str | bytes, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            whole(path, data)

        monkeypatch.setattr(checkpoint, "write_whole", stops)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path, after(2), keep=2)
        assert round_of(tmp_path) == 1
    monkeypatch.setattr(checkpoint, "write_whole", whole)
    checkpoint.write(tmp_path, after(2), keep=2)
    assert round_of(tmp_path) == 2


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for number in (1, 2):
        checkpoint.write(tmp_path, after(number), keep=2)
    file = tmp_path / "checkpoints" / "round-0002" / "clients" / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"round-0002: cannot be read as a checkpoint.*to go on from round-0001"):
        checkpoint.latest(tmp_path)
