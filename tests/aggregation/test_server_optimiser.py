"""The server's optimiser, by hand and in a federation: groups are left alone where nobody shares them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_fed.aggregation.server_optimiser import OptimiserState, step_towards
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.settings import MergeSettings
from tests.support.numeric_clients import NumericTransport, numeric_scenario

ALL, NONE = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)


def steps(settings: MergeSettings, *targets: list[float]) -> list[list[float]]:
    """Step towards each target in turn, and list where the shared blocks are."""
    point, state = torch.tensor([1.0, -1.0]), OptimiserState.first(settings, 2)
    points = []
    for target in targets:
        point, state = step_towards(settings, state, point, torch.tensor(target), ALL, NONE)
        points.append(point.tolist())
    return points


def test_a_rate_goes_a_part_of_the_way():
    """The outer step of Reptile: 1 + 0.25 (3 - 1) = 1.5, -1 + 0.25 (1 + 1) = -0.5."""
    assert steps(MergeSettings(rate=0.25), [3.0, 1.0]) == [[1.5, -0.5]]


def test_a_rate_of_one_is_the_merge_to_the_bit():
    target = torch.randn(2)
    point, state = step_towards(MergeSettings(), None, torch.randn(2), target, ALL, NONE)
    assert torch.equal(point, target)
    assert state is None


def test_momentum_by_hand():
    """M = 2, then 0.5 * 2 + (3 - 2) = 2; x = 1 + 0.5 * 2 = 2, then 2 + 0.5 * 2 = 3; the other entry stands still."""
    settings = MergeSettings(optimiser="momentum", rate=0.5, momentum=0.5)
    assert steps(settings, [3.0, -1.0], [3.0, -1.0]) == [[2.0, -1.0], [3.0, -1.0]]


def test_adam_by_hand():
    """FedAdam without bias correction: v_0 = 0.1^2; m = 0.1 * 2, v = 0.99 * 0.01 + 0.01 * 4 = 0.0499."""
    settings = MergeSettings(optimiser="adam", rate=0.5, momentum=0.9, epsilon=0.1)
    ((first, second),) = steps(settings, [3.0, -1.0])
    assert first == pytest.approx(1 + 0.5 * 0.2 / (0.0499**0.5 + 0.1), rel=1e-6)
    assert second == -1.0


def test_adam_agrees_with_torchs_without_bias_correction():
    """Torch's Adam divides m by 1 - 0.9^t and v by 1 - 0.99^t; undone, its steps are these."""
    settings = MergeSettings(optimiser="adam", rate=0.1, momentum=0.9, epsilon=1e-8)
    gradients = torch.randn(6, 2, generator=torch.manual_seed(0))
    shared, state, mean, square = torch.zeros(2), OptimiserState.first(settings, 2), torch.zeros(2), torch.zeros(2)
    expected = torch.zeros(2)
    for gradient in gradients:
        shared, state = step_towards(settings, state, shared, shared + gradient, ALL, NONE)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        expected += 0.1 * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_a_group_that_nobody_shares_stays_and_forgets_nothing(optimiser: str):
    settings = MergeSettings(optimiser=optimiser, rate=0.5)
    point, state = step_towards(settings, OptimiserState.first(settings, 2), torch.zeros(2), torch.ones(2), ALL, NONE)
    moving = torch.tensor([True, False])
    later, next_state = step_towards(settings, state, point, point + 1, moving, NONE)
    assert later[0] > point[0]
    assert later[1] == point[1]
    assert state is not None
    assert next_state is not None
    assert next_state.mean[1] == state.mean[1]
    assert next_state.square[1] == state.square[1]


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_a_group_begins_anew_when_a_client_leaves_it(optimiser: str):
    settings = MergeSettings(optimiser=optimiser, rate=0.5)
    first = OptimiserState.first(settings, 2)
    _, state = step_towards(settings, first, torch.zeros(2), torch.tensor([5.0, 5.0]), ALL, NONE)
    later, _ = step_towards(settings, state, torch.zeros(2), torch.ones(2), ALL, torch.tensor([True, False]))
    fresh, _ = step_towards(settings, first, torch.zeros(2), torch.ones(2), ALL, NONE)
    assert later[0] == fresh[0]
    assert later[1] != fresh[1]


# In a federation -----------------------------------------------------------------------------------------------------


def federation(*overrides: str, count: int = 4) -> tuple[Federation, NumericTransport]:
    scenario = numeric_scenario("rounds=7", *overrides, count=count)
    shared_blocks = resolve_shared_blocks(scenario)
    transport = NumericTransport(shared_blocks)
    return Federation(scenario, shared_blocks, transport), transport


def test_reptile_goes_a_part_of_the_way_of_fedavg():
    shared = {}
    for rate in (1.0, 0.5):
        run, _ = federation("rounds=1", f"merge.rate={rate}", "merge.weights=uniform")
        begin = run.state.shared.copy()
        run.run()
        shared[rate] = run.state.shared - begin
    np.testing.assert_allclose(shared[0.5], 0.5 * shared[1.0], rtol=1e-4, atol=1e-6)


def test_the_step_of_the_optimiser_stays_within_the_kl_budgets():
    """The optimiser asks for ten times the way; with the predicted KL the step is what the budget allows."""
    run, _ = federation(
        "rounds=1", "merge.rate=10.0", "proximity.mode=quadratic", "proximity.kl_block=0.5", "proximity.kl_joint=inf"
    )
    run.run()
    step = run.state.last_step
    assert step is not None
    assert all(block.kl <= 0.5 * 1.0001 and block.alpha < 1 for block in step.blocks)


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_a_client_that_has_departed_does_not_move_the_shared_blocks(optimiser: str):
    """Whatever a client that left everything sends, the others' federation has the same bits."""
    ends = []
    for scale in (20.0, 40.0):
        run, transport = federation(
            "merge.rule=huber", "merge.threshold=1.0", f"merge.optimiser={optimiser}", "merge.rate=0.1", count=5
        )
        transport.goals = {f"c-{k}": transport.numbers("c-0", 0) for k in range(4)}
        transport.goals["c-4"] = -scale * transport.numbers("c-0", 0)
        run.run()
        assert len(run.state.departed["c-4"]) == len(run.shared_blocks.groups.names)
        ends.append(run.state.shared)
    assert np.array_equal(*ends)
