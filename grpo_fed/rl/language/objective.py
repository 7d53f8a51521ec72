"""The loss of completions, token by token: what is learned from a batch, and the loss of a part of it.

`completion_targets` judges a whole batch. The log-probabilities of its tokens are then computed with a transformer in
parts of a few completions; since the weights are those of the whole batch, the losses and the terms of the parts add up
to those of the batch (`completion_loss`). Autograd differentiates the loss by the log-probabilities.

K clients, N completions of a batch, B completions of a part, C tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from grpo_fed.rl.advantages import Average, equal_groups, group_advantages, normalise_advantages, step_weights
from grpo_fed.rl.objective import Coefficients, Direction, policy_surrogate
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings


@dataclass(frozen=True)
class CompletionTargets:
    """What a batch of completions is learned with."""

    advantages: Tensor
    """[K, N]: how much better than the others of its group each completion is."""
    weights: Tensor
    """[K, N, C]: weight of each token in the loss; 0 for tokens that must not be learned from."""
    equal: Tensor
    """[K, N] bool: completions whose group has equal rewards."""


@dataclass(frozen=True)
class CompletionPart:
    """Some completions of a batch with what the loss needs to know of them."""

    log_probs: Tensor
    """[K, B, C]: log-probabilities of the tokens under the policy that sampled them."""
    advantages: Tensor
    """[K, B]."""
    weights: Tensor
    """[K, B, C]: weight of each token in the loss of the batch; 0 for tokens that must not be learned from."""
    reference_log_probs: Tensor | None = None
    """[K, B, C]: log-probabilities of the tokens under the reference of the KL, where it is estimated on them."""
    reference_distribution: Tensor | None = None
    """[K, B, C, V]: the reference's log-probabilities of all tokens, where the KL is exact."""


@dataclass(frozen=True)
class CompletionTerms:
    """The parts of a loss, without gradient, as sums over the weights, [K] each: those of parts of a batch add up.

    NaN for a term that cannot be computed from what the loss was given.
    """

    policy_loss: Tensor
    """Minus the surrogate."""
    entropy: Tensor
    """The exact entropy over the vocabulary."""
    approx_kl: Tensor
    """(r - 1) - log r, an estimate of KL(old, new); r is the ratio of each token by itself."""
    clipfrac: Tensor
    """Whether the objective's ratio is beyond the clip; 0 for surrogates without one."""
    kl_reference: Tensor
    """The KL to the reference, as it is penalised; NaN where it is not."""
    weight: Tensor
    """The weights themselves."""

    @classmethod
    def summed(cls, parts: list[CompletionTerms]) -> Self:
        """Add up the terms of the parts of a batch."""
        return cls(*(torch.stack([getattr(part, field.name) for part in parts]).sum(0) for field in fields(cls)))

    def means(self) -> dict[str, Tensor]:
        """The terms by name, [K] each: `policy_loss` as it is, the others as means over the weights."""
        weight = self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        sums = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weight"}
        return {name: value if name == "policy_loss" else value / weight for name, value in sums.items()}


# A batch -------------------------------------------------------------------------------------------------------------


def completion_targets(
    rewards: Tensor, groups: Tensor, valid: Tensor, cut: Tensor, scenario: Scenario
) -> CompletionTargets:
    """Judge each completion against its group, and weigh its tokens.

    A completion without a reward is in no group and is not learned from. Neither is one that was cut off, with
    `language.mask_cut`, nor one whose group has equal rewards, unless `group.equal = "keep"`: averages are over the
    completions that are left. Those that were cut off are compared with their group nevertheless.

    rewards: [K, N], NaN where there is none.
    groups: [K, N] int64, the group of each completion, -1 for none.
    valid: [K, N, C] bool, the tokens that were sampled, the end of the completion included.
    cut: [K, N] bool, completions that did not end within `language.length`.
    """
    settings = scenario.objective
    groups = groups.masked_fill(rewards.isnan(), -1)
    advantages, equal = group_advantages(rewards, groups, scenario.group.score), equal_groups(rewards, groups)
    learned = groups >= 0
    if scenario.language.mask_cut:
        learned = learned & ~cut
    if scenario.group.equal != "keep":
        learned = learned & ~equal
    weights = token_weights(valid & learned.unsqueeze(-1), settings.average, scenario.language.length)
    if settings.normalise_advantages == "batch":
        advantages = normalise_advantages(advantages, weights.sum(-1))
    return CompletionTargets(advantages, weights, equal)


def token_weights(valid: Tensor, average: Average, length: int) -> Tensor:
    """Weights that make a sum over a client's tokens an average, [K, N, C] bool -> [K, N, C]; 0 for invalid tokens.

    `step` is the mean over tokens (DAPO, 2503.14476), `episode` that over completions of the mean over their tokens
    (GRPO, 2402.03300), `total` the sum divided by the number of completions times `length` (Dr. GRPO, 2503.20783). A
    completion without a valid token does not count.
    """
    clients, completions, _ = valid.shape
    by_step = valid.transpose(1, 2)
    episodes = torch.arange(completions, device=valid.device).expand_as(by_step)
    longest = torch.full((clients,), length, device=valid.device)
    return step_weights(episodes, by_step, average, longest).transpose(1, 2)


# A part of it --------------------------------------------------------------------------------------------------------


def completion_loss(
    log_probs: Tensor,
    part: CompletionPart,
    settings: ObjectiveSettings,
    trust: TrustSettings,
    coefficients: Coefficients,
    distribution: Tensor | None = None,
) -> tuple[Tensor, CompletionTerms]:
    """Each client's loss of a part of a batch, [K], differentiable by log-probabilities, and its terms.

    log_probs: [K, B, C], log-probabilities of the tokens under the policy that learns.
    distribution: [K, B, C, V], its log-probabilities of all tokens, for an exact KL and the entropy; None without.
    """
    weights, real = part.weights, part.weights > 0
    # whatever is computed for padding has no part in the loss, infinite numbers included
    new, old = log_probs.masked_fill(~real, 0.0), part.log_probs.masked_fill(~real, 0.0)
    log_ratio = token_log_ratio = new - old
    if settings.ratio == "episode":
        log_ratio = _completion_means(token_log_ratio, real)
    low, high = _over_tokens(coefficients.clip_low), _over_tokens(coefficients.clip_high)
    advantages = part.advantages.unsqueeze(-1).expand_as(weights)
    if settings.surrogate == "score":
        surrogate = policy_surrogate(new, old, advantages, "score", low, high)
    else:
        surrogate = policy_surrogate(log_ratio, torch.zeros_like(old), advantages, settings.surrogate, low, high)
    policy_loss = -(surrogate * weights).sum((1, 2))
    loss = policy_loss

    entropy = kl = torch.full_like(policy_loss, torch.nan)
    if distribution is not None:
        entropy = (_entropy(distribution).masked_fill(~real, 0.0) * weights).sum((1, 2))
    if coefficients.has_entropy:
        assert distribution is not None, "an entropy bonus needs the distribution over the vocabulary"
        loss = loss - _of_client(coefficients.entropy) * entropy
    if trust.region in ("penalty", "adaptive"):
        if trust.estimate == "exact":
            assert distribution is not None, "an exact KL needs the distribution over the vocabulary"
            assert part.reference_distribution is not None, "an exact KL needs the reference's distribution"
            divergences = vocabulary_kl(part.reference_distribution, distribution, trust.direction)
        else:
            assert part.reference_log_probs is not None, "a sampled KL needs the reference's log-probabilities"
            towards = part.reference_log_probs.masked_fill(~real, 0.0) - new
            divergences = towards.expm1() - towards
            if trust.estimate == "weighted":
                divergences = divergences * log_ratio.exp()
        kl = (divergences.masked_fill(~real, 0.0) * weights).sum((1, 2))
        loss = loss + _of_client(coefficients.kl) * kl

    with torch.no_grad():
        approx_kl = ((token_log_ratio.expm1() - token_log_ratio) * weights).sum((1, 2))
        move = log_ratio.exp() - 1
        beyond = ((move > high) | (move < -low)) & (settings.surrogate == "clip")
        clipfrac = (beyond * weights).sum((1, 2))
    terms = CompletionTerms(
        policy_loss.detach(), entropy.detach(), approx_kl, clipfrac, kl.detach(), weights.sum((1, 2))
    )
    return loss, terms


def vocabulary_kl(reference: Tensor, new: Tensor, direction: Direction) -> Tensor:
    """The exact KL over the vocabulary between log-probabilities, [..., V], [..., V] -> [...].

    KL(reference, new) for `old-new`, KL(new, reference) for `new-old`; differentiable by either.
    """
    first, second = (reference, new) if direction == "old-new" else (new, reference)
    return (first.exp() * (_finite(first) - _finite(second))).sum(-1)


def _entropy(distribution: Tensor) -> Tensor:
    """The entropy of log-probabilities, [..., V] -> [...]."""
    return -(distribution.exp() * _finite(distribution)).sum(-1)


def _finite(log_probs: Tensor) -> Tensor:
    """Log-probabilities without infinity, so that a token of probability 0 adds 0."""
    return log_probs.clamp_min(torch.finfo(log_probs.dtype).min)


def _completion_means(tokens: Tensor, real: Tensor) -> Tensor:
    """Each completion's mean over its tokens that have a weight, for each of its tokens, [K, B, C], [K, B, C] bool."""
    count = real.sum(-1, keepdim=True).clamp_min(1)
    return ((tokens * real).sum(-1, keepdim=True) / count).expand_as(tokens)


def _over_tokens(coefficient: Tensor | float) -> Tensor | float:
    """A coefficient of each client, [K, 1] -> [K, 1, 1]; numbers stay."""
    return coefficient.unsqueeze(-1) if isinstance(coefficient, Tensor) else coefficient


def _of_client(coefficient: Tensor | float) -> Tensor | float:
    """A coefficient of each client, [K, 1] -> [K]; numbers stay."""
    return coefficient.squeeze(-1) if isinstance(coefficient, Tensor) else coefficient
