"""What clients remember: whole files, the last three rounds, and never an answer that is not the disk's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_fed.federation.state_store import StateStore
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import link_or_copy


def state_with(value: float) -> dict[str, np.ndarray]:
    return {"x": np.array([value])}


@pytest.mark.parametrize("durable", [True, False])
def test_states_are_readable_by_their_owner_alone(tmp_path: Path, durable: bool) -> None:
    """Whatever the process's mask, and wherever they are copied to: they hold observations."""
    before = os.umask(0)
    try:
        store = StateStore(tmp_path / "clients", durable)
        store.save("run", "cart-0", 1, state_with(1.0))
        path = store.path("run", "cart-0", 1)
        link_or_copy(path, tmp_path / "copy")
        checkpoint.write(tmp_path, Checkpoint(1, {}, {}, files={"cart-0": path}), keep=1)
    finally:
        os.umask(before)
    saved = {file: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.safetensors")}
    assert len(saved) == 2
    assert set(saved.values()) == {0o600}
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    folders = {file.parent for file in saved} | {path.parent.parent, tmp_path / "clients"}
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


@pytest.mark.parametrize("durable", [True, False])
def test_another_process_reads_the_saved_bits(tmp_path: Path, durable: bool) -> None:
    """Another one is as good as a Home that never saw it saved."""
    state = {
        "flat": np.random.default_rng(0).normal(size=7).astype(np.float32),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(3.5),
        "seeds": np.array([2**63 + 1], np.uint64),
    }
    StateStore(tmp_path, durable).save("run", "cart-0", 1, state)
    stored = StateStore(tmp_path).read("run", "cart-0", 1)
    assert stored is not None
    found = stored.arrays
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [path.name for path in (tmp_path / "run" / "cart-0").iterdir()] == ["round-0001.safetensors"]


def test_states_of_other_runs_clients_and_rounds_are_separate(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("run", "a", 2, state_with(1.0))
    assert store.read("run", "a", 2) is not None
    assert [store.read(*place) for place in (("other", "a", 2), ("run", "b", 2), ("run", "a", 1))] == [None] * 3
    assert (store.latest("run", "a"), store.latest("run", "b"), store.latest("other", "a")) == (2, None, None)


def test_load_gives_the_latest_state_before_a_round(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for round in (1, 2, 5):
        store.save("run", "a", round, state_with(round))
    found = {before: store.load("run", "a", before) for before in (1, 2, 4, 5, 6, 9)}
    assert {before: state and state.round for before, state in found.items()} == {1: None, 2: 1, 4: 2, 5: 2, 6: 5, 9: 5}
    assert found[4] is not None
    assert found[4].arrays["x"] == 2.0


def test_three_rounds_are_stored(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for round in (1, 2, 4, 9, 12000):
        store.save("run", "a", round, state_with(round))
    assert [r for r in range(12001) if store.path("run", "a", r).exists()] == [4, 9, 12000]
    assert store.latest("run", "a") == 12000


def test_saving_a_round_again_removes_later_rounds(tmp_path: Path) -> None:
    """A server that went back to round 2 never had a round 3; a client must not go on from it."""
    store = StateStore(tmp_path)
    for round in (1, 2, 3):
        store.save("run", "a", round, state_with(round))
    store.save("run", "a", 2, state_with(2.5))
    assert store.latest("run", "a") == 2
    found = store.load("run", "a", before=9)
    assert found is not None
    assert found.arrays["x"] == 2.5
    assert store.read("run", "a", 1) is not None


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    store, other = StateStore(tmp_path), StateStore(tmp_path)
    store.save("run", "a", 1, state_with(1.0))
    first = store.read("run", "a", 1)
    assert store.read("run", "a", 1) is first, "an unchanged file is not read again"
    other.save("run", "a", 1, state_with(7.0))
    again = store.read("run", "a", 1)
    assert again is not None
    assert again.arrays["x"] == 7.0
    other.path("run", "a", 1).unlink()
    assert store.read("run", "a", 1) is None
    assert store.load("run", "a", 5) is None


def test_saving_again_does_not_change_a_linked_file(tmp_path: Path) -> None:
    """A link to the file stays what it was when the state is saved again, as checkpoints need it."""
    store = StateStore(tmp_path)
    store.save("run", "a", 1, state_with(1.0))
    kept = tmp_path / "kept.safetensors"
    kept.hardlink_to(store.path("run", "a", 1))
    store.save("run", "a", 1, state_with(2.0))
    assert load_file(kept)["x"] == 1.0
    assert load_file(store.path("run", "a", 1))["x"] == 2.0


def test_incomplete_files_are_not_states(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("run", "a", 1, state_with(1.0))
    for name in (".round-0002.safetensors-x1y2", "round-0002.safetensors.part", "round-0002.txt"):
        save_file(state_with(0.0), tmp_path / "run" / "a" / name)
    assert store.latest("run", "a") == 1


def test_a_damaged_state_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(tmp_path)
    for number in (1, 2):
        store.save("run", "a", number, state_with(float(number)))
    for number, left in ((2, 1), (1, None)):
        path = store.path("run", "a", number)
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match=rf"round-000{number}\.safetensors: cannot be read as a client's state"):
            StateStore(tmp_path).read("run", "a", number)
        stored = StateStore(tmp_path).load("run", "a", 3)
        assert (None if stored is None else stored.round) == left
        assert store.latest("run", "a") == left, "a checkpoint must not link to the damaged file"
        assert f"round-000{number}.safetensors: cannot be read" in caplog.text
    assert len(list((tmp_path / "run" / "a").glob("*.damaged"))) == 2


@pytest.mark.parametrize("name", ["../x.safetensors", "/x", "round-1.safetensors/../../x", "round-x.safetensors"])
def test_a_state_is_restored_under_no_other_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no name of a client's state"):
        StateStore(tmp_path / "store").restore("run", "a", tmp_path / "file", name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "a\nb"])
def test_a_name_cannot_point_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """The run's name comes with the message, so it is not to be trusted."""
    store = StateStore(tmp_path / "store")
    for place in ((name, "a"), ("run", name)):
        with pytest.raises(ValueError, match="names a folder"):
            store.save(*place, 1, state_with(1.0))
        with pytest.raises(ValueError, match="names a folder"):
            store.load(*place, 2)
    assert not (tmp_path / "store").exists()
