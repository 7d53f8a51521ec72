"""What answers weigh in a merge that does not wait for all clients, against numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fed.aggregation.buffering import rebase, weigh_by_age, weigh_by_kl, weigh_fairly


def test_a_rebased_point_keeps_its_difference():
    began, shared = np.array([1.0, 2.0], np.float32), np.array([1.5, 1.0], np.float32)
    np.testing.assert_array_equal(rebase(np.array([2.0, 2.5], np.float32), began, shared), [2.5, 1.5])


def test_a_point_of_the_present_blocks_keeps_its_bits():
    point, began = np.array([0.1, 1e-9], np.float32), np.array([1e8, 1.0], np.float32)
    assert rebase(point, began, began.copy()) is point


def test_an_answer_weighs_less_with_its_age_as_in_fedbuff():
    assert [weigh_by_age(merges) for merges in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_an_answer_weighs_less_once_the_policy_has_moved_by_more_than_its_budget():
    assert [weigh_by_kl(way, 0.05) for way in (0.0, 0.05, 0.2, math.inf)] == [1.0, 1.0, 0.5, 0.0]


def test_a_merge_of_all_clients_goes_the_whole_way_with_equal_weights():
    merge = {"ant": 1.0, "bee": 1.0, "cat": 1.0}
    assert weigh_fairly([merge] * 7, 0, 3) == ({"ant": 1.0, "bee": 1.0, "cat": 1.0}, 1.0)


def test_equal_clients_in_turn_go_the_whole_way():
    halves = [{"ant": 1.0, "bee": 1.0}, {"cat": 1.0, "dog": 1.0}]
    assert weigh_fairly(halves * 2, 0, 4) == ({"cat": 2.0, "dog": 2.0}, 1.0)


def test_a_slow_client_has_the_say_of_a_fast_one():
    """Of ten merges the slow client is in one: it may go as far there as the fast one in all ten."""
    fast, slow = {"fast": 1.0}, {"slow": 1.0}
    lengths = {"fast": 0.0, "slow": 0.0}
    for last in range(10):
        merges = [slow if index == 9 - last else fast for index in range(10)]
        (name,) = merges[-1]
        weights, length = weigh_fairly(merges, 0, 2)
        assert weights[name] == pytest.approx(10.0 if name == "slow" else 10 / 9)
        lengths[name] += length
    assert lengths["slow"] == pytest.approx(1.0), "the longest of them goes the whole way"
    assert lengths["fast"] == pytest.approx(lengths["slow"])


def test_all_clients_have_the_same_say_whatever_their_ages():
    """The sum of weight x length over many merges of irregular clients, each client's answers being of its own age."""
    rng = np.random.default_rng(7)
    rates, ages = {"a": 1.0, "b": 0.5, "c": 0.2, "d": 0.1}, {"a": 0, "b": 1, "c": 4, "d": 9}
    merges = []
    while len(merges) < 4000:
        merge = {name: weigh_by_age(ages[name]) for name, rate in rates.items() if rng.random() < rate}
        if merge:
            merges.append(merge)
    say = dict.fromkeys(rates, 0.0)
    for index in range(400, len(merges)):
        weights, length = weigh_fairly(merges[max(0, index - 199) : index + 1], 0, 4)
        for name, weight in weights.items():
            say[name] += length * weight / sum(weights.values())
    shares = np.array([*say.values()]) / sum(say.values())
    np.testing.assert_allclose(shares, 0.25, atol=0.02)


def test_clients_that_have_not_answered_yet_are_left_room():
    weights, length = weigh_fairly([{"fast": 1.0}] * 8, 1, 2)
    assert (weights, length) == ({"fast": 1.0}, 0.5 / 4)
