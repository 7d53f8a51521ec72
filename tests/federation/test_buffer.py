"""Rounds that do not wait: a buffer of all clients is the synchronous run, and runs stopped anywhere end the same."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.replay_order import replay_order
from grpo_fed.federation.arrivals import VirtualTime
from grpo_fed.federation.pace import Paces
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.merge_order import ORDER, read_orders
from grpo_fed.runs.recorder import Watch
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from tests.support.numeric_clients import numeric_federation

TEXT = """
name = "paces"
rounds = 6
steps = 64
seed = 3
device = "cpu"
policy = { hidden = [8] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 2, minibatches = 2, learning_rate = 0.02 }
evaluate = { episodes = 2, step_limit = 50 }
merge = { episodes = 2 }
checkpoint = { keep = 9 }

[[clients]]
name = "cart"
count = 3
env = "grpo_fed/CartPole-v1"

[[clients]]
name = "back"
count = 2
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""
BUFFERED = 'round.mode="buffered"'
PACES = (BUFFERED, "clients.0.jitter=0.3", "clients.1.pace=3.3")


class Stopped(Exception):
    """Stops a run."""


def run(folder: Path, *overrides: str, stop: int | None = None) -> tuple[list[RoundRecord], Result | None]:
    """Run the scenario in this process; stop: the round after whose line it is stopped."""
    records: list[RoundRecord] = []

    def watch(record: RoundRecord) -> None:
        records.append(record)
        if record.round == stop:
            raise Stopped

    with LocalEngine(Scenario.loads(TEXT, overrides=list(overrides)), folder, workers=0) as engine:
        with contextlib.suppress(Stopped):
            engine.run(watch)
        return records, engine.result


def all_arrays(folder: Path, round: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, of the server and of the clients."""
    path = folder / "checkpoints" / f"round-{round:04d}"
    return {
        f"{file.stem}/{name}": array for file in path.rglob("*.safetensors") for name, array in load_file(file).items()
    }


def assert_same_end(one: Path, other: Path, round: int = 6) -> None:
    first, second = all_arrays(one, round), all_arrays(other, round)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], name)


@pytest.mark.parametrize(
    "change",
    ['method="grpo"', 'method="clusters"', 'method="fedavg"', 'proximity={mode="quadratic",adaptive=true}'],
)
def test_a_buffer_of_all_clients_with_equal_paces_is_the_synchronous_run(tmp_path: Path, change: str):
    run(tmp_path / "sync", change)
    run(tmp_path / "buffered", change, BUFFERED, "round.buffer=1.0")
    assert_same_end(tmp_path / "sync", tmp_path / "buffered")
    lines = [
        [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
        for name in ("sync", "buffered")
    ]
    for one, other in zip(*lines, strict=True):
        for key in ("global_step", "kl/joint", "alpha/actor", "eval/score_iqm", "comm/MB_total", "last_kl/joint"):
            assert one.get(key) == other.get(key), key
        assert set(other) - set(one) <= {"fed/merge_length", "fed/staleness", "time/virtual_s"}


@pytest.mark.parametrize("method", ["grpo", "clusters"])
def test_a_run_that_is_stopped_after_any_merge_ends_with_the_same_bits(tmp_path: Path, method: str):
    run(tmp_path / "whole", f'method="{method}"', *PACES)
    for stop in range(1, 6):
        folder = tmp_path / f"stopped-{stop}"
        run(folder, f'method="{method}"', *PACES, stop=stop)
        with (folder / ORDER).open("a") as file:
            file.write('{"merge": 99')  # a line that the killed process did not finish
        with LocalEngine.resumed(folder) as engine:
            engine.run()
        assert_same_end(tmp_path / "whole", folder)
        assert (folder / ORDER).read_text() == (tmp_path / "whole" / ORDER).read_text()


def test_answers_come_in_the_order_of_virtual_time(tmp_path: Path):
    """By hand: 1,000 steps take 1, 1 and 5 seconds, so 64 take 0.064 and 0.32; two answers make a merge."""
    changes = ("clients.0.count=2", "clients.1.count=1", "clients.1.pace=5", "round.buffer=0.5", "rounds=7")
    records, result = run(tmp_path / "run", BUFFERED, *changes)
    orders = read_orders(tmp_path / "run")
    came = {merge: [client for client, *_ in order.came] for merge, order in orders.items()}
    assert came[4] == ["cart-0", "cart-1"]
    assert came[5] == ["back", "cart-0"], "at 0.32 s the names decide between back, cart-0 and cart-1"
    assert came[6] == ["cart-0", "cart-1"]
    assert orders[5].came[0] == ("back", 0, 1)
    seconds = [record.server.virtual_seconds for record in records if record.server is not None]
    assert seconds == [None, 0.064, 0.128, 0.192, 0.256, 0.32, 0.384, 0.448]
    ages = {client.client: client.age for client in records[5].clients}
    assert ages == {"back": 4, "cart-0": 0, "cart-1": None}
    assert result is not None
    assert result.clients["back"].env_steps == 64


def test_the_duration_of_a_round_depends_on_seed_client_and_number_alone():
    paces = Paces(Scenario.loads(TEXT, overrides=[*PACES, "clients.0.pace=2", "steps=500"]))
    assert paces.duration("back-0", 1) == paces.duration("back-1", 9) == 1_650_000
    times = [paces.duration("cart-0", number) for number in range(1, 2001)]
    assert paces.duration("cart-0", 7) == times[6]
    assert np.mean(times) == pytest.approx(1e6, rel=0.03)
    assert np.std(np.log(times)) == pytest.approx(0.3, rel=0.1)
    assert paces.duration("cart-1", 7) != times[6]


def test_an_answer_that_is_too_old_is_refused_and_the_client_begins_anew(tmp_path: Path):
    records, result = run(tmp_path / "run", BUFFERED, "clients.1.pace=30", "round.max_staleness=2", "rounds=40")
    refused = {
        client.client: client.failure for record in records for client in record.clients if client.failure is not None
    }
    assert set(refused) == {"back-0", "back-1"}
    assert refused["back-0"].kind == "late"
    assert "merges ago, and round.max_staleness is 2" in refused["back-0"].reason
    assert result is not None
    assert result.status == "finished"
    numbers = [number for order in read_orders(tmp_path / "run").values() for name, _, number in order.came]
    assert max(numbers) > 10


def test_a_client_that_raises_is_named_and_given_work_again(tmp_path: Path):
    when = tmp_path / "when"
    changes = (
        'clients.1.env="tests.support.failing_envs:Failing-v0"',
        f'clients.1.kwargs={{ when = "{when}" }}',
        "clients.1.count=1",
        "rounds=4",
        "evaluate.every=0",
    )
    records: list[RoundRecord] = []

    def watch(record: RoundRecord) -> None:
        records.append(record)
        if record.round < 3:
            when.touch()
        else:
            when.unlink(missing_ok=True)

    with LocalEngine(Scenario.loads(TEXT, overrides=[BUFFERED, *changes]), tmp_path / "run", workers=0) as engine:
        result = engine.run(watch)
    failed = [client.client for record in records[1:] for client in record.clients if client.failure is not None]
    assert failed.count("back") >= 2
    assert result.status == "finished"
    assert all(order.failed == {"back": "raised"} for order in read_orders(tmp_path / "run").values() if order.failed)


def test_a_recorded_order_is_repeated_to_the_same_bits(tmp_path: Path):
    run(tmp_path / "run", *PACES)
    again = replay_order(tmp_path / "run", tmp_path / "again", replace=False, watch=lambda record: None)
    assert (again.merges, again.first_difference) == (6, None)
    assert (tmp_path / "again" / ORDER).read_text() == (tmp_path / "run" / ORDER).read_text()


def test_a_repeated_order_says_where_the_bits_differ(tmp_path: Path):
    run(tmp_path / "run", *PACES)
    path = tmp_path / "run" / ORDER
    lines = path.read_text().splitlines()
    fourth = json.loads(lines[3]) | {"digest": "0" * 64}
    path.write_text("\n".join([*lines[:3], json.dumps(fourth), *lines[4:]]) + "\n")
    again = replay_order(tmp_path / "run", tmp_path / "again", replace=False, watch=lambda record: None)
    assert again.first_difference == 4


def test_a_continued_run_has_an_order_of_its_own_that_is_not_repeated(tmp_path: Path):
    run(tmp_path / "run", *PACES)
    scenario = prepare_continuation(tmp_path / "run", ["rounds=9"], tmp_path / "more")
    with LocalEngine.resumed(tmp_path / "more") as engine, contextlib.suppress(Stopped):
        engine.run(stop_after(8))
    with LocalEngine.resumed(tmp_path / "more") as engine:
        engine.run()
    lines = (tmp_path / "more" / ORDER).read_text().splitlines()
    assert scenario.rounds == 9
    assert [json.loads(line)["merge"] for line in lines] == [7, 8, 9]
    with pytest.raises(ValueError, match="begins with merge 7, since the run goes on from another one"):
        read_orders(tmp_path / "more")


def stop_after(round: int) -> Watch:
    """Make a function that stops a run after the line of a round."""

    def watch(record: RoundRecord) -> None:
        if record.round == round:
            raise Stopped

    return watch


def test_a_damaged_order_is_refused(tmp_path: Path):
    run(tmp_path / "run", *PACES, "rounds=2")
    path = tmp_path / "run" / ORDER
    path.write_text(path.read_text().replace('"merge": 2', '"merge": 3'))
    with pytest.raises(ValueError, match=r"order\.jsonl: is damaged: its merges are not numbered from 1"):
        read_orders(tmp_path / "run")
    with pytest.raises(ValueError, match=r"there is no order\.jsonl in it"):
        read_orders(tmp_path)


def test_with_staleness_by_kl_nothing_is_discounted_while_the_policy_rests(tmp_path: Path):
    """With a budget of 0 no step is ever made, so answers of all ages weigh the same, and merges go the whole way."""
    at_rest = ("round.staleness=kl", "round.rate_fair=false", "proximity.kl_joint=0.0")
    records, _ = run(tmp_path / "rest", *PACES, *at_rest)
    assert all(record.server is not None and record.server.merge_length == 1.0 for record in records[1:])
    moving = ("round.staleness=kl", "round.rate_fair=false", "proximity.kl_joint=1e-5")
    records, _ = run(tmp_path / "moving", *PACES, *moving)
    lengths = [record.server.merge_length for record in records[1:] if record.server is not None]
    assert min(length for length in lengths if length is not None) < 1.0


def test_clients_whose_first_answer_comes_late_have_a_score_before_training():
    """Their evaluation before the first round comes with that answer, and counts for no later round."""
    slow = "clients=[{ name = 'c', count = 2, env = 'CartPole-v1' }, { name = 'd', env = 'CartPole-v1', pace = 3.5 }]"
    scenario, shared_blocks, transport = numeric_federation(BUFFERED, slow, "evaluate.every=1", "rounds=5")
    begin = shared_blocks.initial.numpy().astype(np.float64)
    expected = {name: -((begin - transport.goal(name)) ** 2).sum() for name in shared_blocks.clients}
    lines: list[RoundRecord] = []
    result = Federation(
        scenario, shared_blocks, transport, evaluate_with_next_round=True, arrivals=VirtualTime(transport, None)
    ).run(lines.append)
    assert {name: client.before for name, client in result.clients.items()} == pytest.approx(expected)
    assert lines[0].scores.keys() == {"c-0", "c-1"}
    assert all(record.scores.get("d") != expected["d"] for record in lines)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ScenarioError, match=r"nobody is sampled; leave round\.fraction out"):
        Scenario.loads(TEXT, overrides=[BUFFERED, "round.fraction=0.5"])
    with pytest.raises(ScenarioError, match=r"set proximity\.mode and proximity\.kl_joint"):
        Scenario.loads(TEXT, overrides=[BUFFERED, "round.staleness=kl", "proximity.kl_joint=inf"])
