"""What an answer may claim of a client's work: the server bounds it by what it asked for."""

from __future__ import annotations

import pytest

from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from tests.support.grid_federation import CODEC, SHARED


def test_the_steps_of_a_round_are_those_of_its_whole_batches():
    """Batches of 128 steps for 200 in a round: 256 in the first, for 200, and 256 in the second, for 400 of 512."""
    rest = '[rollout]\nnum_envs = 4\nhorizon = 32\n[[clients]]\nname = "cart"\nenv = "grpo_fed/CartPole-v1"\n'
    scenario = Scenario.loads('name = "w"\nsteps = 200\n' + rest)
    shared_blocks = resolve_shared_blocks(scenario)
    codec, point = Codec(shared_blocks, scenario), shared_blocks.initial.numpy()
    for number, most in ((1, 256), (2, 256), (3, 128), (4, 256)):
        train = Train(Start("run", number, point), 0, 1)
        for steps in (most, most + 1):
            content = codec.write_answer(train, Trained(point + 1, steps, 0, 0.0, 0.0, {}))
            if steps > most:
                with pytest.raises(InvalidMessageError, match=f"from 0 to {most}"):
                    codec.read_answer(train, content)
            else:
                assert codec.read_answer(train, content).steps == most


def test_a_client_may_say_since_when_its_state_is():
    train = Train(Start("run", 5, SHARED), 0, 1)

    def answer(since: int | None) -> int | None:
        trained = Trained(SHARED + 1, 64, 0, 0.0, 0.0, {}, since=since)
        read = CODEC.read_answer(train, CODEC.write_answer(train, trained))
        assert isinstance(read, Trained)
        return read.since

    assert [answer(since) for since in (0, 3, None)] == [0, 3, None]
    with pytest.raises(InvalidMessageError, match=r"training\.since is 4; .* from 0 to 3"):
        answer(4)
