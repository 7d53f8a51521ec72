"""KL weights and limits that adapt, and budgets for each block, against numbers worked by hand."""

import pytest
import torch
from torch import Tensor

from grpo_fed.policy.blocks import Layout
from grpo_fed.rl.trust_region import adapt_coefficient, adapt_limit, shorten_to_budgets, trust_budgets
from grpo_fed.scenario.settings import PolicySettings

SHAPES = [("torso.0.weight", (2, 2)), ("actor.weight", (3, 2)), ("critic.head.weight", (1, 2))]


def layout() -> Layout:
    return Layout.from_shapes(SHAPES, PolicySettings())


def test_the_kl_weight_doubles_halves_and_stays_as_in_ppo() -> None:
    """Target 0.01: above 0.015 it doubles, below 0.00667 it halves, between them nothing changes."""
    kl = torch.tensor([0.016, 0.006, 0.014, 0.007])
    torch.testing.assert_close(adapt_coefficient(torch.ones(4), kl, 0.01), torch.tensor([2.0, 0.5, 1.0, 1.0]))


def test_the_hard_limit_follows_what_the_step_gained() -> None:
    """Gains of 10 %, 50 % and 90 % of what was promised: half the limit, the same, half as much again."""
    promised = torch.ones(3)
    found = adapt_limit(torch.full((3,), 0.01), torch.tensor([0.1, 0.5, 0.9]), promised, 0.01)
    torch.testing.assert_close(found, torch.tensor([0.005, 0.01, 0.015]))


def test_a_batch_that_promises_nothing_leaves_the_hard_limit_as_it_was() -> None:
    found = adapt_limit(torch.tensor([0.01]), torch.zeros(1), torch.zeros(1), 0.01)
    assert found.tolist() == pytest.approx([0.01])


def test_the_hard_limit_stays_within_a_factor_of_ten() -> None:
    limit = torch.tensor([0.01, 0.01])
    for _ in range(20):
        limit = adapt_limit(limit, torch.tensor([0.0, 1.0]), torch.ones(2), 0.01)
    torch.testing.assert_close(limit, torch.tensor([0.001, 0.1]))


def test_a_block_over_its_budget_is_shortened_to_it_and_the_others_are_not_touched() -> None:
    """KL = |theta - old|^2 / 2: 0.08 for 0.2 in 4 entries; a budget of 0.02 is half the step, less the margin.

    The actor stays within its budget and the critic has none.
    """
    cut = layout()
    torso, actor = cut.select(["torso.0"])[0], cut.select(["actor"])[0]
    old, new = torch.zeros(1, cut.size), torch.full((1, cut.size), 0.2)

    def measure(parameters: Tensor) -> Tensor:
        return 0.5 * (parameters - old).square().sum(1)

    kept, steps = shorten_to_budgets(measure, old, new, [(torso, 0.02), (actor, 0.2)])
    torch.testing.assert_close(steps[0].alpha, torch.tensor([0.475]))
    assert steps[0].kl.item() <= 0.02
    torch.testing.assert_close(kept[:, torso.start : torso.stop], torch.full((1, 4), 0.095))
    assert torch.equal(kept[:, actor.start :], new[:, actor.start :])


def test_a_block_has_one_budget() -> None:
    found = trust_budgets(layout(), {"torso.*": 0.1, "actor": 0.2})
    assert [(block.name, budget) for block, budget in found] == [("torso.0", 0.1), ("actor", 0.2)]
    with pytest.raises(ValueError, match=r'trust\.blocks: "torso\.\*" and "\*" both match "torso\.0"; narrow'):
        trust_budgets(layout(), {"torso.*": 0.1, "*": 0.2})


def test_every_client_is_shortened_by_its_own_need() -> None:
    cut = layout()
    block = cut.select(["actor"])[0]
    old = torch.zeros(3, cut.size)
    new = torch.tensor([[0.1], [1.0], [10.0]]).expand(3, cut.size).clone()
    measure = lambda parameters: 0.5 * parameters.square().sum(1)  # noqa: E731
    _, steps = shorten_to_budgets(measure, old, new, [(block, 0.05)])
    assert steps[0].alpha[0] == 1.0
    assert (steps[0].kl <= 0.05).all()
    assert (steps[0].kl > 0.04).logical_or(steps[0].alpha == 1).all()


def test_a_block_whose_kl_never_fits_does_not_move() -> None:
    cut = layout()
    block = cut.select(["actor"])[0]
    old, new = torch.zeros(1, cut.size), torch.ones(1, cut.size)
    never = lambda parameters: torch.where(parameters.abs().sum(1) > 0, torch.inf, 0.0)  # noqa: E731
    kept, steps = shorten_to_budgets(never, old, new, [(block, 0.01)])
    assert steps[0].alpha.item() == 0.0
    assert torch.equal(kept[:, block.start : block.stop], old[:, block.start : block.stop])
