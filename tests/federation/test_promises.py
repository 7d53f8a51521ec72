"""The server's guarantees with real clients that learn: through the whole loop, checked by other arithmetic.

Clients answer one by one, as they would from machines of their own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from grpo_fed.federation.messages import Measure, Train
from grpo_fed.scenario.scenario import Scenario
from tests.support.real_clients import RealTransport, run

CARTS = """
name = "carts"
rounds = 3
steps = 128
evaluate.episodes = 1
policy = { hidden = [8], shared = ["torso.*", "actor"] }
rollout = { num_envs = 4, horizon = 32 }
objective = { epochs = 4, minibatches = 2, learning_rate = 0.01 }
[[clients]]
name = "long"
count = 2
env = "grpo_fed/CartPole-v1"
spread = { length = [0.3, 0.9] }
[[clients]]
name = "backwards"
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""


def carts(*overrides: str, text: str = CARTS) -> Scenario:
    return Scenario.loads(text, overrides=overrides)


FEDAVG = ('merge.rule="mean"', 'proximity.mode="off"')


# FedAvg and local learning as special cases----------------------------------------------------------------------------


def test_averaging_is_the_weighted_mean_to_the_bit(tmp_path: Path):
    """Sums are in float64 in the order of the clients' names, with one division, then float32."""
    federation, transport, _ = run(carts(*FEDAVG, 'merge.weights="episodes"'), tmp_path)
    for number in (1, 2, 3):
        replies = sorted((name, reply) for name, trained, reply in transport.trained if trained == number)
        total, weight = np.zeros(transport.shared_blocks.size), 0.0
        for _, reply in replies:
            total += float(reply.episodes) * reply.point.astype(np.float64)
            weight += float(reply.episodes)
        after = federation.state.shared if number == 3 else transport.shared(number + 1)
        assert len(replies) == 3
        assert (after == (total / weight).astype(np.float32)).all()


@pytest.mark.parametrize(
    "rule",
    [
        ('merge.rule="huber"', "merge.threshold=inf", 'proximity.mode="off"'),
        ('merge.rule="mean"', 'proximity.mode="measured"', "proximity.kl_block=inf", "proximity.kl_joint=inf"),
        ('merge.rule="mean"', 'proximity.mode="quadratic"', "proximity.kl_block=inf", "proximity.kl_joint=inf"),
    ],
    ids=["huber", "measured", "quadratic"],
)
def test_rules_without_limits_equal_averaging_to_the_bit(tmp_path: Path, rule: tuple[str, ...]):
    average, _, _ = run(carts(*FEDAVG), tmp_path / "average")
    federation, _, records = run(carts(*rule), tmp_path / "rule")
    assert (federation.state.shared == average.state.shared).all()
    assert all(not client.departed for record in records for client in record.clients)


def test_a_threshold_of_0_equals_local_learning_to_the_bit(tmp_path: Path):
    federation, departed, records = run(carts('merge.rule="huber"', "merge.threshold=0.0"), tmp_path / "departed")
    alone, local, _ = run(carts("method=local"), tmp_path / "alone")
    expected = local.parameters(alone.state.name)
    for name, parameters in departed.parameters(federation.state.name).items():
        assert (parameters == expected[name]).all()
    assert len(expected) == 3
    all_groups = tuple(departed.shared_blocks.groups.names)
    assert all(client.departed == all_groups for record in records[1:] for client in record.clients)
    assert (federation.state.shared == federation.shared_blocks.initial.numpy()).all()


@pytest.mark.parametrize("mode", ["measured", "quadratic"])
@pytest.mark.parametrize("budget", ["kl_block", "kl_joint"])
def test_a_budget_of_0_stops_the_shared_blocks(tmp_path: Path, mode: str, budget: str):
    federation, _, _ = run(carts('merge.rule="mean"', f'proximity.mode="{mode}"', f"proximity.{budget}=0"), tmp_path)
    assert (federation.state.shared == federation.shared_blocks.initial.numpy()).all()


def test_a_block_budget_of_0_stops_that_block_alone(tmp_path: Path):
    given = carts('merge.rule="mean"', 'proximity.mode="measured"', 'proximity.blocks={ "actor" = 0.0 }')
    federation, _, _ = run(given, tmp_path)
    first, shared = federation.shared_blocks.initial.numpy(), federation.state.shared
    actor, torso = federation.shared_blocks.slices["actor"], federation.shared_blocks.slices["torso.0"]
    assert (shared[actor] == first[actor]).all()
    assert (shared[torso] != first[torso]).any()


# The order of clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        ('merge.rule="huber"', "merge.threshold=0.02", 'proximity.mode="measured"'),
        ('merge.rule="fisher"', 'proximity.mode="quadratic"'),
        ('merge.rule="clusters"', 'proximity.mode="measured"'),
        ('merge.rule="krum"', 'proximity.mode="off"', "round.fraction=0.7"),
    ],
    ids=["huber", "fisher", "clusters", "krum"],
)
def test_permuting_clients_changes_nothing(tmp_path: Path, rule: tuple[str, ...]):
    head, *entries = CARTS.split("[[clients]]")
    outcomes = []
    for number, order in enumerate(itertools.islice(itertools.permutations(entries), 2)):
        text = "[[clients]]".join([head, *order])
        federation, transport, records = run(carts(*rule, "evaluate.every=1", text=text), tmp_path / str(number))
        parameters = {
            name: array.tobytes() for name, array in sorted(transport.parameters(federation.state.name).items())
        }
        steps = [None if record.server is None else record.server.step for record in records]
        assert federation.result is not None
        scores = [sorted(record.scores.items()) for record in records]
        result = sorted(federation.result.clients.items())
        outcomes.append((federation.state.shared.tobytes(), parameters, steps, scores, result))
    assert transport.shared_blocks.clients[0] == "backwards"
    assert outcomes[0] == outcomes[1]


# Budgets --------------------------------------------------------------------------------------------------------------


def measured_kl(transport: RealTransport, run: str, name: str, number: int, old: np.ndarray, new: np.ndarray) -> float:
    """Compute KL(old, new) of one client's policy, with its own private blocks and groups, on its stored states.

    The network is implemented here a second time, and the KL is torch's.
    """
    stored = transport.store.read(run, name, number)
    assert stored is not None
    state, layout = stored.arrays, transport.clients[name].policies.policy.layout
    columns = transport.shared_blocks.columns_in(layout).numpy()
    sent = [instruction for client, instruction in transport.sent if client == name]
    starts = [instruction.start for instruction in sent if isinstance(instruction, Measure)]
    departed = [start.departed for start in starts if start.round == number][-1]
    is_own = transport.shared_blocks.columns_of_groups(departed).numpy()

    def distribution(shared: np.ndarray) -> Categorical:
        flat = state["parameters"].copy()
        flat[columns] = np.where(is_own, flat[columns], shared)
        named = {slot.name: torch.tensor(flat[slot.start : slot.stop]).reshape(slot.shape) for slot in layout.slots}
        inputs = torch.tensor(state["measurement_states"])
        hidden = torch.tanh(inputs @ named["torso.0.weight"].T + named["torso.0.bias"])
        return Categorical(logits=(hidden @ named["actor.weight"].T + named["actor.bias"]).double())

    return float(kl_divergence(distribution(old), distribution(new)).mean())


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_no_accepted_step_exceeds_its_budgets_on_the_clients_states(tmp_path: Path, over: str):
    budgets = (
        "proximity.kl_block=0.0005",
        "proximity.kl_joint=0.0008",
        f'proximity.over="{over}"',
        "objective.learning_rate=0.03",
    )
    given = carts('merge.rule="huber"', "merge.threshold=0.06", 'proximity.mode="measured"', *budgets)
    federation, transport, records = run(given, tmp_path)
    moves = 0
    for number in (1, 2, 3):
        server = records[number].server
        assert server is not None
        accepted = server.step
        assert accepted is not None
        old, new = transport.shared(number), federation.state.shared if number == 3 else transport.shared(number + 1)

        def over_clients(step: np.ndarray, old: np.ndarray = old, number: int = number) -> float:
            kl = [measured_kl(transport, federation.state.name, name, number, old, step) for name in transport.clients]
            return float(np.mean(kl) if over == "mean" else np.max(kl))

        joint = over_clients(new)
        assert joint <= 0.0008 * (1 + 1e-4)
        assert joint == pytest.approx(accepted.joint, rel=2e-3, abs=1e-7)
        for block in accepted.blocks:
            moved = old.copy()
            columns = transport.shared_blocks.slices[block.block]
            moved[columns] = new[columns]
            kl = over_clients(moved)
            assert kl <= 0.0005 * (1 + 1e-4)
            assert kl == pytest.approx(block.kl, rel=2e-3, abs=1e-7)
            moves += 0 < block.alpha < 1
    assert moves >= 3  # otherwise the budgets were no limits
    assert any(
        client.departed for record in records for client in record.clients
    )  # otherwise no departed group was measured


def test_a_predicted_kl_has_the_size_of_the_measured_kl(tmp_path: Path):
    """The prediction is from a diagonal Fisher matrix, and policies have moved on by then: only its size is right."""
    budgets = ("proximity.kl_block=0.002", "proximity.kl_joint=0.003")
    _, _, records = run(carts('merge.rule="mean"', 'proximity.mode="quadratic"', *budgets, "rounds=4"), tmp_path)
    for before, after in itertools.pairwise(records[1:]):
        assert before.server is not None
        assert before.server.step is not None
        assert after.server is not None
        assert before.server.step.joint is not None
        assert before.server.step.joint <= 0.003
        assert set(after.server.last_kl) == {"joint", "torso.0", "actor"}
        assert 0.1 < after.server.last_kl["joint"] / before.server.step.joint < 10


# Departures ----------------------------------------------------------------------------------------------------------


def test_a_client_keeps_its_parameters_in_departed_groups(tmp_path: Path):
    """The next round begins with its own parameters there, and with the shared ones elsewhere."""
    given = carts('merge.rule="huber"', "merge.threshold=0.04", 'proximity.mode="off"', "rounds=2")
    federation, transport, _ = run(given, tmp_path)
    trains = [(name, train) for name, train in transport.sent if isinstance(train, Train)]
    starts = {name: train.start for name, train in trains if train.start.round == 2}
    assert {start.departed for start in starts.values()} != {()}
    for name, start in starts.items():
        state = transport.store.read(federation.state.name, name, 1)
        assert state is not None
        clients = transport.clients[name]
        layout = clients.policies.policy.layout
        columns = transport.shared_blocks.columns_in(layout).numpy()
        sent = next(reply.point for client, number, reply in transport.trained if (client, number) == (name, 1))
        assert (state.arrays["parameters"][columns] == sent).all()
        is_own = transport.shared_blocks.columns_of_groups(start.departed).numpy()
        clients.save_policies(tmp_path, {name: replace(start, round=1)}, 1)  # its state after round 1 with this start
        arrays = load_file(tmp_path / "policies" / f"{name}.safetensors")
        first = layout.stack([arrays])[0, columns].numpy()
        assert (first[is_own] == sent[is_own]).all()
        assert (first[~is_own] == start.shared[~is_own]).all()
