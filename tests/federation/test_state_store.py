"""What clients remember: whole files, the last three rounds, and never an answer that is not the disk's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_fed.federation.state_store import StateStore


def number(value: float) -> dict[str, np.ndarray]:
    return {"x": np.array([value])}


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_saved_is_found_by_another_process_bit_for_bit(tmp_path: Path, durable: bool) -> None:
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


def test_nothing_is_known_of_another_run_client_or_round(tmp_path: Path) -> None:
    home = StateStore(tmp_path)
    home.save("run", "a", 2, number(1.0))
    assert home.read("run", "a", 2) is not None
    assert [home.read(*place) for place in (("other", "a", 2), ("run", "b", 2), ("run", "a", 1))] == [None] * 3
    assert (home.latest("run", "a"), home.latest("run", "b"), home.latest("other", "a")) == (2, None, None)


def test_a_client_goes_on_from_its_latest_round_before_the_one_it_is_told(tmp_path: Path) -> None:
    home = StateStore(tmp_path)
    for round in (1, 2, 5):
        home.save("run", "a", round, number(round))
    found = {before: home.load("run", "a", before) for before in (1, 2, 4, 5, 6, 9)}
    assert {before: state and state.round for before, state in found.items()} == {1: None, 2: 1, 4: 2, 5: 2, 6: 5, 9: 5}
    assert found[4] is not None
    assert found[4].arrays["x"] == 2.0


def test_three_rounds_stay(tmp_path: Path) -> None:
    home = StateStore(tmp_path)
    for round in (1, 2, 4, 9, 12000):
        home.save("run", "a", round, number(round))
    assert [r for r in range(12001) if home.path("run", "a", r).exists()] == [4, 9, 12000]
    assert home.latest("run", "a") == 12000


def test_rounds_after_one_that_is_done_again_are_no_more(tmp_path: Path) -> None:
    """A server that went back to round 2 never had a round 3; a client must not go on from it."""
    home = StateStore(tmp_path)
    for round in (1, 2, 3):
        home.save("run", "a", round, number(round))
    home.save("run", "a", 2, number(2.5))
    assert home.latest("run", "a") == 2
    found = home.load("run", "a", before=9)
    assert found is not None
    assert found.arrays["x"] == 2.5
    assert home.read("run", "a", 1) is not None


def test_the_disk_is_believed_and_not_memory(tmp_path: Path) -> None:
    home, other = StateStore(tmp_path), StateStore(tmp_path)
    home.save("run", "a", 1, number(1.0))
    first = home.read("run", "a", 1)
    assert home.read("run", "a", 1) is first, "as long as it is the same file, nobody reads it again"
    other.save("run", "a", 1, number(7.0))
    again = home.read("run", "a", 1)
    assert again is not None
    assert again.arrays["x"] == 7.0
    other.path("run", "a", 1).unlink()
    assert home.read("run", "a", 1) is None
    assert home.load("run", "a", 5) is None


def test_what_is_written_into_arrays_after_they_were_saved_is_not_saved(tmp_path: Path) -> None:
    """A link to the file stays what it was when the state is saved again, as checkpoints need it."""
    home = StateStore(tmp_path)
    home.save("run", "a", 1, number(1.0))
    kept = tmp_path / "kept.safetensors"
    kept.hardlink_to(home.path("run", "a", 1))
    home.save("run", "a", 1, number(2.0))
    assert load_file(kept)["x"] == 1.0
    assert load_file(home.path("run", "a", 1))["x"] == 2.0


def test_a_file_that_is_being_written_is_not_there_yet(tmp_path: Path) -> None:
    home = StateStore(tmp_path)
    home.save("run", "a", 1, number(1.0))
    for name in (".round-0002.safetensors-x1y2", "round-0002.safetensors.part", "round-0002.txt"):
        save_file(number(0.0), tmp_path / "run" / "a" / name)
    assert home.latest("run", "a") == 1


def test_a_damaged_file_is_named_with_its_cure(tmp_path: Path) -> None:
    home = StateStore(tmp_path)
    home.save("run", "a", 1, number(1.0))
    path = home.path("run", "a", 1)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"round-0001\.safetensors: cannot be read as a client's state.*remove it"):
        home.load("run", "a", 2)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "a\nb"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """The run is named by whoever sends the message."""
    home = StateStore(tmp_path / "home")
    for place in ((name, "a"), ("run", name)):
        with pytest.raises(ValueError, match="names a folder"):
            home.save(*place, 1, number(1.0))
        with pytest.raises(ValueError, match="names a folder"):
            home.load(*place, 2)
    assert not (tmp_path / "home").exists()
