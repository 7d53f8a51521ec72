"""The loss of completions against numbers by hand and against torch's own distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from grpo_fed.rl.language.objective import (
    CompletionPart,
    CompletionTerms,
    completion_loss,
    completion_targets,
    token_weights,
    vocabulary_kl,
)
from grpo_fed.rl.objective import Coefficients
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings

FREE = TrustSettings()


def scenario(*overrides: str) -> Scenario:
    """Make a scenario of one client with prompts, which averages over tokens."""
    clients = 'clients = [{ name = "w", prompts = "q.jsonl" }]'
    return Scenario.loads(
        f'name = "x"\nobjective = {{ preset = "dr-grpo", average = "step" }}\n{clients}\n', overrides=overrides
    )


def part_of(
    ratios: list[list[float]], advantages: list[float], weights: list[list[float]]
) -> tuple[Tensor, CompletionPart]:
    """Log-probabilities of one client whose ratios are these, in float64, and the part."""
    old = torch.full((1, len(ratios), len(ratios[0])), -1.5, dtype=torch.float64)
    new = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    return new, CompletionPart(old, torch.tensor([advantages]).double(), torch.tensor([weights]).double())


# The surrogate


def test_each_token_is_clipped_by_itself() -> None:
    # min(1.5 x 2, 1.28 x 2) = 2.56, min(0.5 x 2, 0.8 x 2) = 1; min(1.5 x -1, 1.28 x -1) = -1.5, padding counts nothing
    log_probs, part = part_of([[1.5, 0.5], [1.5, 9.0]], [2.0, -1.0], [[0.25, 0.25], [0.5, 0.0]])
    loss, terms = completion_loss(log_probs, part, ObjectiveSettings(), FREE, Coefficients(0.2, 0.28))
    assert loss.tolist() == pytest.approx([-(0.25 * 2.56 + 0.25 * 1.0 + 0.5 * -1.5)])
    assert torch.equal(terms.policy_loss, loss.detach())
    assert terms.means()["clipfrac"].tolist() == [1.0]
    (slope,) = torch.autograd.grad(loss, log_probs)
    assert slope.flatten().tolist() == pytest.approx([0.0, -0.25 * 1.0, 0.5 * 1.5, 0.0])


def test_a_ratio_of_the_episode_is_the_geometric_mean_of_its_tokens() -> None:
    # sqrt(4 x 1/4) = 1 and sqrt(2 x 2) = 2, whose third token is padding
    log_probs, part = part_of([[4.0, 0.25, 7.0], [2.0, 2.0, 7.0]], [1.0, 1.0], [[0.25, 0.25, 0.0]] * 2)
    settings = ObjectiveSettings(ratio="episode", surrogate="ratio")
    loss, _ = completion_loss(log_probs, part, settings, FREE, Coefficients(0.2, 0.2))
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 0.5 * 2.0))
    (slope,) = torch.autograd.grad(loss, log_probs)
    # d (w1 + w2) s A / d log pi_j = 0.5 s A / 2 for each of the two tokens
    assert slope.flatten().tolist() == pytest.approx([-0.25, -0.25, 0.0, -0.5, -0.5, 0.0])
    clipped = ObjectiveSettings(ratio="episode")
    loss, terms = completion_loss(log_probs, part, clipped, FREE, Coefficients(0.2, 0.28))
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 0.5 * 1.28))
    assert terms.means()["clipfrac"].item() == pytest.approx(0.5)  # by token one ratio of each would be beyond


def test_the_score_is_the_log_probability_times_the_advantage() -> None:
    log_probs, part = part_of([[1.0, 2.0]], [3.0], [[0.5, 0.5]])
    loss, terms = completion_loss(log_probs, part, ObjectiveSettings(surrogate="score"), FREE, Coefficients(0.2, 0.2))
    assert loss.item() == pytest.approx(-3.0 * (0.5 * -1.5 + 0.5 * (-1.5 + math.log(2))))
    assert terms.clipfrac.item() == 0.0
    assert terms.means()["approx_kl"].item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_clients_have_their_own_clip_and_penalty() -> None:
    log_probs = torch.full((2, 1, 1), 0.5).log()
    ones = torch.ones(2, 1, 1)
    part = CompletionPart(torch.zeros(2, 1, 1), -torch.ones(2, 1), ones, reference_log_probs=torch.zeros(2, 1, 1))
    coefficients = Coefficients(
        torch.tensor([[0.2], [0.4]]), torch.tensor([[0.2], [0.4]]), kl=torch.tensor([[1.0], [0.0]])
    )
    trust = TrustSettings(region="penalty", direction="new-old", estimate="sampled")
    loss, terms = completion_loss(log_probs, part, ObjectiveSettings(), trust, coefficients)
    k3 = 2 - 1 - math.log(2)
    assert loss.tolist() == pytest.approx([0.8 + k3, 0.6])
    assert terms.kl_reference.tolist() == pytest.approx([k3, k3])


def test_numbers_of_padding_do_not_matter() -> None:
    log_probs, part = part_of([[1.5, 1.0]], [2.0], [[1.0, 0.0]])
    broken = log_probs.detach().clone()
    broken[..., 1] = -torch.inf
    broken.requires_grad_()
    loss, _ = completion_loss(broken, part, ObjectiveSettings(), FREE, Coefficients(0.2, 0.2))
    assert loss.item() == pytest.approx(-2.4)
    assert torch.autograd.grad(loss, broken)[0].isfinite().all()


# KL and entropy


@pytest.mark.parametrize("direction", ["old-new", "new-old"])
def test_the_exact_kl_is_that_of_torch(direction: str) -> None:
    torch.manual_seed(0)
    reference, new = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).log_softmax(-1)
    first, second = (reference, new) if direction == "old-new" else (new, reference)
    expected = kl_divergence(Categorical(logits=first), Categorical(logits=second))
    torch.testing.assert_close(vocabulary_kl(reference, new, direction), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["old-new", "new-old"])
def test_the_penalty_and_the_bonus_go_by_the_whole_vocabulary(direction: str) -> None:
    """The loss and its gradient by logits, against torch.distributions."""
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 3, 4, 6, dtype=torch.float64).log_softmax(-1)
    tokens = torch.randint(6, (2, 3, 4, 1))
    weights = torch.rand(2, 3, 4, dtype=torch.float64) * (torch.rand(2, 3, 4) < 0.8)
    advantages = torch.randn(2, 3, dtype=torch.float64)
    distribution = logits.log_softmax(-1)
    log_probs = distribution.gather(-1, tokens).squeeze(-1)
    old = log_probs.detach() - 0.05
    part = CompletionPart(old, advantages, weights, reference_distribution=reference)
    settings = ObjectiveSettings(surrogate="ratio")
    trust = TrustSettings(region="penalty", direction=direction)  # type: ignore[arg-type]
    coefficients = Coefficients(0.2, 0.2, kl=0.3, entropy=torch.tensor([[0.1], [0.0]], dtype=torch.float64))
    loss, terms = completion_loss(log_probs, part, settings, trust, coefficients, distribution)

    now, then = Categorical(logits=logits), Categorical(logits=reference)
    kl = kl_divergence(then, now) if direction == "old-new" else kl_divergence(now, then)
    surrogate = (now.log_prob(tokens.squeeze(-1)) - old).exp() * advantages[..., None]
    bonus = torch.tensor([0.1, 0.0], dtype=torch.float64)[:, None, None] * now.entropy()
    expected = ((0.3 * kl - surrogate - bonus) * weights).sum((1, 2))
    torch.testing.assert_close(loss, expected)
    slopes = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(*slopes)
    means = terms.means()
    torch.testing.assert_close(means["kl_reference"], (kl * weights).sum((1, 2)) / weights.sum((1, 2)))
    torch.testing.assert_close(means["entropy"], (now.entropy() * weights).sum((1, 2)) / weights.sum((1, 2)))


def test_a_token_of_probability_zero_adds_no_entropy() -> None:
    distribution = torch.tensor([[[[0.5, 0.5, 0.0]]]]).log().requires_grad_()
    part = CompletionPart(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    log_probs = distribution[..., 0]
    loss, terms = completion_loss(
        log_probs, part, ObjectiveSettings(), FREE, Coefficients(0.2, 0.2, entropy=1.0), distribution
    )
    assert terms.entropy.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, distribution)[0].isfinite().all()


@pytest.mark.parametrize(
    ("estimate", "ratio", "kl"),
    [
        # reference / new = 2 and 1/2: k3 = 1 - log 2 and log 2 - 1/2
        ("sampled", "step", 0.5 * (1 - math.log(2)) + 0.5 * (math.log(2) - 0.5)),
        # times new / old = 4 and 1/4
        ("weighted", "step", 0.5 * 4 * (1 - math.log(2)) + 0.5 / 4 * (math.log(2) - 0.5)),
        # times their geometric mean, 1
        ("weighted", "episode", 0.5 * (1 - math.log(2)) + 0.5 * (math.log(2) - 0.5)),
    ],
)
def test_the_kl_on_sampled_tokens_matches_a_worked_example(estimate: str, ratio: str, kl: float) -> None:
    new = torch.tensor([[[4.0, 0.25]]], dtype=torch.float64).log()
    reference = new + torch.tensor([2.0, 0.5]).double().log()
    part = CompletionPart(torch.zeros_like(new), torch.zeros(1, 1).double(), torch.full_like(new, 0.5), reference)
    trust = TrustSettings(region="penalty", direction="new-old", estimate=estimate)  # type: ignore[arg-type]
    settings = ObjectiveSettings(ratio=ratio)  # type: ignore[arg-type]
    loss, terms = completion_loss(new, part, settings, trust, Coefficients(0.2, 0.2, kl=0.1))
    assert terms.kl_reference.item() == pytest.approx(kl)
    assert loss.item() == pytest.approx(0.1 * kl)


# Parts of a batch


def test_losses_and_terms_of_parts_add_up() -> None:
    torch.manual_seed(2)
    log_probs, old = -torch.rand(2, 2, 5, 3, dtype=torch.float64)
    weights, advantages = torch.rand(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    trust = TrustSettings(region="penalty", direction="new-old", estimate="weighted")

    def loss_of(some: slice) -> tuple[Tensor, CompletionTerms]:
        part = CompletionPart(old[:, some], advantages[:, some], weights[:, some], 0.9 * old[:, some])
        return completion_loss(log_probs[:, some], part, ObjectiveSettings(), trust, Coefficients(0.2, 0.2, kl=0.5))

    whole, terms = loss_of(slice(None))
    losses, parts = zip(*(loss_of(slice(start, start + 2)) for start in (0, 2, 4)), strict=True)
    torch.testing.assert_close(torch.stack(losses).sum(0), whole)
    found = CompletionTerms.summed(parts).means()
    for name, value in terms.means().items():
        torch.testing.assert_close(found[name], value, equal_nan=True)
    assert found["entropy"].isnan().all()


# What a batch is learned with


VALID = torch.tensor([[[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]]).bool()


@pytest.mark.parametrize(
    ("average", "of_completions"),
    [
        ("step", [1 / 10] * 4),
        ("episode", [1 / 16, 1 / 4, 1 / 8, 1 / 12]),
        ("total", [1 / (4 * 20)] * 4),
    ],
)
def test_token_weights_match_a_worked_example(average: str, of_completions: list[float]) -> None:
    weights = token_weights(VALID, average, 20)  # type: ignore[arg-type]
    torch.testing.assert_close(weights, VALID * torch.tensor(of_completions)[None, :, None])


def targets_of(
    rewards: list[float], groups: list[int], cut: list[bool], *overrides: str
) -> tuple[list[float], list[float]]:
    """The advantages of one client's completions, and the sums of their weights in tenths."""
    rewards_, groups_ = torch.tensor([rewards]), torch.tensor([groups])
    found = completion_targets(rewards_, groups_, VALID, torch.tensor([cut]), scenario(*overrides))
    return found.advantages[0].tolist(), (10 * found.weights.sum(-1))[0].tolist()


def test_groups_with_equal_rewards_are_kept_or_skipped() -> None:
    rewards, groups, ended = [1.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], [False] * 4
    assert targets_of(rewards, groups, ended) == ([0, 0, -0.5, 0.5], pytest.approx([4, 1, 2, 3]))
    for equal in ("skip", "redraw"):
        found = targets_of(rewards, groups, ended, f"group.equal={equal}")
        assert found == ([0, 0, -0.5, 0.5], pytest.approx([0, 0, 4, 6]))


def test_completions_that_were_cut_off_are_masked_and_still_compared() -> None:
    rewards, cut = [1.0, 0.0, 0.0, 1.0], [False, True, False, False]
    assert targets_of(rewards, [0, 0, 1, 1], cut)[1] == pytest.approx([4, 1, 2, 3])
    advantages, weights = targets_of(rewards, [0, 0, 1, 1], cut, "language.mask_cut=true")
    assert advantages == [0.5, -0.5, -0.5, 0.5]
    assert weights == pytest.approx([40 / 9, 0, 20 / 9, 30 / 9])


def test_a_completion_without_a_reward_is_in_no_group() -> None:
    advantages, weights = targets_of([1.0, math.nan, 3.0, 5.0], [0, 0, 0, 0], [False] * 4)
    assert advantages == [-2.0, 0.0, 0.0, 2.0]
    assert weights == pytest.approx([40 / 9, 0, 20 / 9, 30 / 9])
    nothing = targets_of([math.nan] * 4, [0, 0, 0, 0], [False] * 4, "group.equal=skip")
    assert nothing == ([0] * 4, [0] * 4)
