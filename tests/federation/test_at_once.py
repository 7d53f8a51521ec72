"""Clients that do not wait for the merge: in which order they answer, what their answers become, and the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.replay_order import replay_order
from grpo_fed.engines.start import run as run_scenario
from grpo_fed.federation.arrivals import VirtualTime
from grpo_fed.federation.combined_answer import combine_answers
from grpo_fed.federation.messages import EvaluationSummary, Train, Trained
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs.merge_order import ORDER, read_orders
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.scenario.toml.source import ScenarioError
from tests.federation.test_buffer import PACES, all_arrays, run
from tests.support.numeric_clients import NumericTransport, numeric_federation, numeric_scenario
from tests.support.small_language import words

AT_ONCE = ('round.again="at-once"', 'proximity.mode="quadratic"')
THREE = "clients=[{ name = 'fast', env = 'CartPole-v1' }, { name = 'mid', env = 'CartPole-v1', pace = 3 }, { name ="
THREE += " 'slow', env = 'CartPole-v1', pace = 10 }]"


def answer(number: float, **more: object) -> Trained:
    """Make an answer with two parameters."""
    point = np.array([number, -number], np.float32)
    return Trained(point, 10, 2, 0.5 * number, 1.0, {"charts/episodic_return": number}, **more)  # type: ignore[arg-type]


def federate(folder: Path, *overrides: str) -> tuple[Federation, NumericTransport, list[RoundRecord]]:
    """Run numeric clients at paces of 1, 3 and 10, of which two make a merge."""
    buffered = ('round.mode="buffered"', 'round.again="at-once"', THREE, "round.buffer=0.5")
    scenario, shared_blocks, transport = numeric_federation(*buffered, *overrides)
    lines: list[RoundRecord] = []
    federation = Federation(scenario, shared_blocks, transport, folder, arrivals=VirtualTime(transport, None))
    federation.run(lines.append)
    return federation, transport, lines


def test_clients_work_on_until_the_merge_and_answer_twice_at_most(tmp_path: Path):
    """By hand: 128 steps take 0.128, 0.384 and 1.28 seconds, and fast waits after two answers."""
    _, transport, lines = federate(tmp_path, "rounds=4")
    fast, mid, slow = "fast", "mid", "slow"
    orders = read_orders(tmp_path)
    assert [orders[merge].came for merge in (1, 2, 3, 4)] == [
        ((fast, 0, 1), (fast, 0, 2), (mid, 0, 1)),
        ((fast, 1, 3), (fast, 1, 4), (mid, 1, 2)),
        ((fast, 2, 5), (fast, 2, 6), (mid, 2, 3)),
        ((fast, 3, 7), (slow, 0, 1)),
    ], "at 1.28 s the names decide between fast and slow, and fast is on its next work"
    assert [order.told for order in orders.values()] == [(fast, mid, slow), (fast, mid), (fast, mid), (fast, mid)]
    seconds = [line.server.virtual_seconds for line in lines if line.server is not None]
    assert seconds == [None, 0.384, 0.768, 1.152, 1.28]
    steps = {client.client: client.steps for client in lines[1].clients}
    assert steps == {fast: 256, mid: 128, slow: 0}
    assert {client.client: client.age for client in lines[4].clients} == {fast: 0, mid: None, slow: 3}
    numbers = [instruction.start.round for name, instruction in transport.sent_of(Train) if name == fast]
    assert numbers == [1, 2, 3, 4, 5, 6, 7]


def test_a_client_that_answers_twice_has_one_say(tmp_path: Path):
    """By hand: the mean of fast's two points has the weight of mid's one, and the buffer goes half of the way."""
    federation, transport, lines = federate(tmp_path, "rounds=1", "round.rate_fair=false", "merge.weights=uniform")
    begin = federation.shared_blocks.initial.numpy().astype(np.float64)
    points = {}
    for name, number in (("fast", 1), ("fast", 2), ("mid", 1)):
        noise = 0.1 * transport.numbers(name, 1 + number).astype(np.float64)
        points[name, number] = begin + 0.3 * (transport.goal(name) - begin) + noise
    expected = (0.5 * (points["fast", 1] + points["fast", 2]) + points["mid", 1]) / 2
    np.testing.assert_allclose(federation.state.shared, expected, atol=1e-5)
    assert lines[1].server is not None
    assert lines[1].server.merge_length == 1.0


def test_answers_are_averaged_by_their_weights_and_what_was_learned_is_added():
    """By hand: (3 * 1 + 1 * 5) / 4 = 2; gains of 0.5 and 2.5 are 3 together."""
    summary = EvaluationSummary(7.0, 0.0, 7.0, 7.0, 1, 1.0)
    first = answer(1.0, fisher=np.array([2.0, 0.0], np.float32), kl=(0.1, 0.2), evaluation=summary, since=3)
    second = answer(5.0, fisher=np.array([6.0, 4.0], np.float32))
    both = combine_answers([first, second], [3.0, 1.0])
    np.testing.assert_array_equal(both.point, np.array([2.0, -2.0], np.float32))
    assert both.fisher is not None
    np.testing.assert_array_equal(both.fisher, np.array([3.0, 1.0], np.float32))
    assert (both.steps, both.episodes, both.gain, both.since) == (20, 4, 3.0, 3)
    assert (both.kl, both.evaluation, both.metrics) == ((0.1, 0.2), summary, {"charts/episodic_return": 5.0})
    assert combine_answers([first], [0.3]) is first
    assert combine_answers([answer(1.0), answer(5.0)], [1.0, 1.0]).fisher is None


def test_a_client_whose_work_failed_waits_for_the_merge(tmp_path: Path):
    scenario, shared_blocks, transport = numeric_federation(
        'round.mode="buffered"', 'round.again="at-once"', THREE, "round.buffer=0.5", "rounds=3"
    )

    def fault(name: str, instruction: object) -> Failure | None:
        is_first = isinstance(instruction, Train) and instruction.start.round == 1
        return Failure("raised", "it does not work") if name == "fast" and is_first else None

    transport.fault = fault
    Federation(scenario, shared_blocks, transport, tmp_path, arrivals=VirtualTime(transport, None)).run()
    orders = read_orders(tmp_path)
    assert (orders[1].came, orders[1].failed) == ((("mid", 0, 1), ("mid", 0, 2), ("slow", 0, 1)), {"fast": "raised"})
    assert orders[2].told == ("fast", "mid", "slow")


def test_a_run_that_is_stopped_after_any_merge_ends_with_the_same_bits_and_is_repeated_to_them(tmp_path: Path):
    """Clients compare by playing and measure the latest step, and some answers are refused for their age."""
    changes = ('method="grpo"', *PACES, *AT_ONCE, "proximity.adaptive=true", "round.max_staleness=1", "rounds=7")
    run(tmp_path / "whole", *changes)
    came = [event for order in read_orders(tmp_path / "whole").values() for event in order.came]
    clients = [[name for name, *_ in order.came] for order in read_orders(tmp_path / "whole").values()]
    assert any(len(names) > len({*names}) for names in clients), "somebody answers twice"
    assert any(merge - 1 - version > 1 for merge, order in read_orders(tmp_path / "whole").items()
               for _, version, _ in order.came), "somebody is refused"  # fmt: skip
    assert len(came) > 20
    for stop in (1, 3, 5):
        folder = tmp_path / f"stopped-{stop}"
        run(folder, *changes, stop=stop)
        with LocalEngine.resumed(folder) as engine:
            engine.run()
        first, second = all_arrays(tmp_path / "whole", 7), all_arrays(folder, 7)
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], name)
        assert (folder / ORDER).read_text() == (tmp_path / "whole" / ORDER).read_text()
    again = replay_order(tmp_path / "whole", tmp_path / "again", replace=False, watch=lambda record: None)
    assert (again.merges, again.first_difference) == (7, None)
    assert (tmp_path / "again" / ORDER).read_text() == (tmp_path / "whole" / ORDER).read_text()


def test_answers_that_are_refused_for_their_age_are_part_of_the_order(tmp_path: Path):
    """Their clients go on from what they learned, so a repeated run has to have them learn it."""
    changes = ("clients.0.jitter=0.3", "clients.1.pace=9", "round.max_staleness=2", "rounds=12")
    run(tmp_path / "run", 'round.mode="buffered"', *changes)
    orders = read_orders(tmp_path / "run")
    assert any(merge - 1 - version > 2 for merge, order in orders.items() for _, version, _ in order.came)
    assert all(order.failed == {} for order in orders.values())
    again = replay_order(tmp_path / "run", tmp_path / "again", replace=False, watch=lambda record: None)
    assert (again.merges, again.first_difference) == (12, None)


def test_language_models_do_not_wait_either(tmp_path: Path):
    changes = ("round.buffer=1.0", "clients.0.pace=3", "rounds=2", "evaluate.episodes=2", "evaluate.every=0")
    scenario = words('round.mode="buffered"', *AT_ONCE, *changes, clients=("up", "down"))
    result = run_scenario(scenario, tmp_path / "run", workers=0)
    assert (result.status, result.missing) == ("finished", {})
    assert [name for name, *_ in read_orders(tmp_path / "run")[1].came] == ["down", "down", "up"]
    assert result.clients["down"].env_steps == 2 * result.clients["up"].env_steps
    again = replay_order(tmp_path / "run", tmp_path / "again", replace=False, watch=lambda record: None)
    assert (again.merges, again.first_difference) == (2, None)


def test_clients_that_train_on_cannot_measure():
    at_once = ('round.mode="buffered"', 'round.again="at-once"')
    for mode in ("quadratic", "off"):
        numeric_scenario(*at_once, f'proximity.mode="{mode}"')
    with pytest.raises(ScenarioError, match=r"cannot measure the step; set proximity\.mode = \"quadratic\""):
        numeric_scenario(*at_once, 'proximity.mode="measured"')
    numeric_scenario('round.again="at-once"', 'proximity.mode="measured"')  # rounds that wait
