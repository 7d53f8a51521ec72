"""Differences in half precision: what rounding leaves out is sent later, and every engine sees the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.wire import Codec, InvalidMessageError, content_size
from grpo_fed.federation.compression import RESIDUAL, add_difference, prepare_point, round_difference
from grpo_fed.federation.hostile import ClientAttack, lie
from grpo_fed.federation.loaded_client import LoadedClient
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.federation.state_store import StoredState
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from tests.federation.test_buffer import all_arrays, assert_same_end, run
from tests.support.small_federation import TINY

HALF = 'wire.dtype="float16"'


def test_what_rounding_leaves_out_by_hand():
    given = np.array([1 + 2**-12, -1e5, 1e-8, 0.25, np.nan], np.float32)
    sent, residual = round_difference(given)
    assert sent.dtype == np.float16
    assert sent[:4].tolist() == [1.0, -65504.0, 0.0, 0.25]
    assert residual.tolist() == [2**-12, -34496.0, np.float32(1e-8), 0.0, 0.0]


def test_over_many_rounds_all_of_a_difference_is_sent():
    scenario = Scenario.loads(TINY, overrides=[HALF])
    shared_blocks = resolve_shared_blocks(scenario)
    shared, generator = shared_blocks.initial.numpy(), np.random.default_rng(0)
    steps = generator.normal(0, 1e-6, (300, len(shared))).astype(np.float32) + np.float32(1e-8)
    client = LoadedClient("ant", Start("run", 1, shared), None)
    total, plain = np.zeros(len(shared)), np.zeros(len(shared))
    for number, step in enumerate(steps, 1):
        result = prepare_point(scenario, shared_blocks, client, shared + step)
        assert result.difference is not None
        assert np.array_equal(result.point, add_difference(shared, result.difference))
        total += result.difference.astype(np.float64)
        plain += round_difference((shared + step) - shared)[0].astype(np.float64)
        client = LoadedClient("ant", Start("run", number + 1, shared), StoredState(number, dict(result.owed), ""))
    learned = sum(((shared + step) - shared).astype(np.float64) for step in steps)
    owed = result.owed[RESIDUAL]
    np.testing.assert_allclose(total + owed, learned, atol=1e-9)
    assert np.abs(owed).max() < 1e-7
    assert np.abs(total - learned).mean() < 0.2 * np.abs(plain - learned).mean()


def test_nothing_is_owed_about_what_a_client_has_left():
    scenario = Scenario.loads(TINY, overrides=[HALF])
    shared_blocks = resolve_shared_blocks(scenario)
    actor = shared_blocks.groups.names.index("actor")
    shared, owed = shared_blocks.initial.numpy(), np.full(shared_blocks.size, 1e-3, np.float32)
    client = LoadedClient("ant", Start("run", 2, shared, (actor,)), StoredState(1, {RESIDUAL: owed}, ""))
    result = prepare_point(scenario, shared_blocks, client, shared.copy())
    left = shared_blocks.columns_of_groups((actor,)).numpy()
    assert result.difference is not None
    assert (result.difference[left] == 0).all()
    assert (result.difference[~left] == np.float16(1e-3)).all()
    assert (result.owed[RESIDUAL][left] == 0).all()


# Messages ------------------------------------------------------------------------------------------------------------


def test_an_answer_is_half_as_long_and_arrives_to_the_bit():
    whole, half = Scenario.loads(TINY), Scenario.loads(TINY, overrides=[HALF, "proximity.mode=off"])
    shared_blocks = resolve_shared_blocks(half)
    shared = shared_blocks.initial.numpy()
    train = Train(Start("run", 1, shared), 0.0, 0.5)
    difference = np.random.default_rng(0).normal(0, 1e-4, len(shared)).astype(np.float16)
    trained = Trained(add_difference(shared, difference), 64, 1, 0.0, 0.0, {}, difference=difference)
    codec = Codec(shared_blocks, half)
    content = codec.write_answer(train, trained)
    answer = codec.read_answer(train, content)
    assert isinstance(answer, Trained)
    assert answer.point.tobytes() == trained.point.tobytes()
    plain = Codec(shared_blocks, whole).write_answer(train, trained)
    assert content_size(plain) - content_size(content) == 2 * len(shared) - len("difference") + len("point")
    content["arrays"] = plain["arrays"]
    with pytest.raises(InvalidMessageError, match=r"arrays.*difference"):
        codec.read_answer(train, content)


def test_a_difference_that_is_not_finite_is_refused():
    scenario = Scenario.loads(TINY, overrides=[HALF, "proximity.mode=off"])
    shared_blocks = resolve_shared_blocks(scenario)
    shared, codec = shared_blocks.initial.numpy(), Codec(shared_blocks, scenario)
    train = Train(Start("run", 1, shared), 0.0, 0.5)
    for bad, words in ((np.inf, "has to be finite"), (60000.0, "from the shared blocks")):
        difference = np.full(len(shared), bad, np.float16)
        trained = Trained(add_difference(shared, difference), 64, 1, 0.0, 0.0, {}, difference=difference)
        with pytest.raises(InvalidMessageError, match=words):
            codec.read_answer(train, codec.write_answer(train, trained))


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "buffered"])
def test_a_resumed_run_remembers_what_was_owed(mode: str, tmp_path: Path):
    changes = (HALF, f'round.mode="{mode}"', "rounds=4")
    run(tmp_path / "whole", *changes)
    run(tmp_path / "parts", *changes, stop=2)
    with LocalEngine.resumed(tmp_path / "parts") as engine:
        engine.run()
    assert_same_end(tmp_path / "whole", tmp_path / "parts", 4)
    arrays = all_arrays(tmp_path / "whole", 4)
    assert any(name.endswith(RESIDUAL) and array.any() for name, array in arrays.items())


def test_rounding_hardly_changes_a_round(tmp_path: Path):
    ends = []
    for name, changes in (("whole", ()), ("half", (HALF,))):
        run(tmp_path / name, "rounds=1", "proximity.mode=off", "merge.rule=mean", *changes)
        arrays = all_arrays(tmp_path / name, 1)
        ends.append(np.concatenate([arrays[each].ravel() for each in sorted(arrays) if each.startswith("shared/")]))
    farthest = 0.02 * 2 * 2  # the learning rate times the steps of a round
    assert 0 < np.abs(ends[0] - ends[1]).max() < farthest * 2**-11


def test_what_a_hostile_client_claims_is_rounded_too():
    scenario = Scenario.loads(TINY, overrides=[HALF, "proximity.mode=off"])
    shared = resolve_shared_blocks(scenario).initial.numpy()
    difference = np.full(len(shared), 0.01, np.float16)
    honest = Trained(add_difference(shared, difference), 64, 1, 0.0, 0.0, {}, difference=difference)
    train = Train(Start("run", 1, shared), 0.0, 0.5)
    answer = lie("ant", train, honest, ClientAttack("sign-flip"), scenario)
    assert isinstance(answer, Trained)
    assert answer.difference is not None
    np.testing.assert_allclose(answer.difference, -difference.astype(np.float32), rtol=1e-3, atol=1e-6)
    assert answer.point.tobytes() == add_difference(shared, answer.difference).tobytes()
