"""Which clients are asked together: equal chunks, and clients that failed asked apart from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.workers.pool import Job


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), workers=st.integers(0, 9), limit=st.integers(1, 20))
def test_chunks_hold_every_client_once_and_are_small_and_equal(sizes: list[int], workers: int, limit: int) -> None:
    groups = [[f"{group}-{k}" for k in range(size)] for group, size in enumerate(sizes)]
    chunks = make_chunks(groups, workers, limit)
    assert sorted(name for chunk in chunks for name in chunk) == sorted(name for group in groups for name in group)
    assert all(len({name.split("-")[0] for name in chunk}) == 1 for chunk in chunks)
    assert max(map(len, chunks)) <= limit
    assert max(map(len, chunks)) <= -(-sum(sizes) // max(1, workers))
    for group in range(len(sizes)):
        lengths = [len(chunk) for chunk in chunks if chunk[0].startswith(f"{group}-")]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("groups", "workers", "lengths"),
    [([40], 2, [10, 10, 10, 10]), ([6], 2, [3, 3]), ([6], 0, [6]), ([3, 3], 2, [3, 3])],
)
def test_every_worker_gets_as_many_equal_chunks(groups: list[int], workers: int, lengths: list[int]) -> None:
    names = [[f"cart-{group}-{k}" for k in range(size)] for group, size in enumerate(groups)]
    assert [len(chunk) for chunk in make_chunks(names, workers)] == lengths  # 40 clients: not 14, 13, 13


def test_a_job_that_hangs_is_halved_until_it_holds_one_client() -> None:
    names = tuple("abcd")
    schedule = ChunkSchedule([names])
    assert list(schedule.jobs(names)) == [Job(names, names)]
    schedule.failed(Job(names, names))
    assert schedule.set_aside == [("a", "b"), ("c", "d")]
    assert list(schedule.jobs("abd")) == [Job(names, ("a", "b"), last=True), Job(names, ("d",), last=True)]
    schedule.answered(Job(names, ("d",)))
    schedule.failed(Job(names, ("a", "b")))
    assert schedule.set_aside == [("c",), ("a",), ("b",)]
    assert list(ChunkSchedule([names], set_aside=schedule.set_aside).jobs(names)) == list(schedule.jobs(names))
    for name in "abc":
        schedule.answered(Job(names, (name,)))
    assert schedule.set_aside == []


def test_the_saved_state_follows_the_schedule() -> None:
    schedule = ChunkSchedule([("a", "b")], workers=2)
    state = schedule.state
    assert state == {"workers": 2, "set_aside": []}
    schedule.failed(Job(("a", "b"), ("a",)))
    assert state == {"workers": 2, "set_aside": [("a",)]}
    schedule.answered(Job(("a", "b"), ("a",)))
    assert state == {"workers": 2, "set_aside": []}
