"""What a client climbs: surrogate, value loss, entropy and KL, for K stacked clients at once.

On the hot path a minibatch is 256 steps and every tensor operation costs more in dispatch than in arithmetic. So
`gradients` gives the slopes of the loss by the policy's output in closed form, without a graph; the loss itself and
all that is reported of it is worked out only when somebody reads it (`Terms`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from grpo_fed.policy.base import PolicyOutput
from grpo_fed.policy.distributions import Distribution
from grpo_fed.rl.advantages import normalise_advantages
from grpo_fed.rl.records import Minibatch
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings

Surrogate = Literal["score", "ratio", "clip"]
Direction = Literal["old-new", "new-old"]


@dataclass(frozen=True)
class Coefficients:
    """The weights of a loss, built once for an update: numbers, or [K, 1] where clients differ.

    What is 0 everywhere is left out of the computation.
    """

    clip_low: Tensor | float
    """How far the ratio may go below 1."""
    clip_high: Tensor | float
    """How far the ratio may go above 1."""
    value: Tensor | float = 0.0
    """Of the value loss."""
    entropy: Tensor | float = 0.0
    """[K, C]: of each action component's entropy."""
    kl: Tensor | float = 0.0
    """Of the KL, where the trust region is a penalty."""
    value_clip: Tensor | float | None = None
    """How far a value may leave the old one; None for no limit."""

    @cached_property
    def has_value(self) -> bool:
        return bool(torch.as_tensor(self.value).any())

    @cached_property
    def has_entropy(self) -> bool:
        return bool(torch.as_tensor(self.entropy).any())

    @cached_property
    def by_entropy(self) -> Tensor | float:
        """[K, 1, C]: slope of the loss by the mean entropy."""
        return -self.entropy.unsqueeze(-2) if isinstance(self.entropy, Tensor) else -self.entropy

    @cached_property
    def twice_value(self) -> Tensor | float:
        return 2 * self.value


@dataclass(frozen=True)
class OutputGradients:
    """Of the loss, summed over clients, by what the policy said: what its backward pass begins with."""

    distribution: Tensor
    """[K, B, M]."""
    values: Tensor | None
    """[K, B]; None where the critic is not learning."""


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a minibatch is made of: [K] each, without gradient, and worked out when first read.

    `loss`, `policy_loss` and `value_loss` are sums over the minibatch's weights; the rest are means over them.
    """

    new: PolicyOutput
    batch: Minibatch
    distribution: Distribution
    settings: ObjectiveSettings
    trust: TrustSettings
    coefficients: Coefficients
    advantages: Tensor
    """[K, B]: as used, that is, normalised if so set."""
    log_probs: Tensor
    """[K, B]: under the new policy."""

    @cached_property
    def loss(self) -> Tensor:
        """What is minimised."""
        given, weights = self.coefficients, self.batch.weights
        loss = self.policy_loss
        if given.has_value:
            loss = loss + _by_client(given.value) * self.value_loss
        if given.has_entropy:
            loss = loss + (given.by_entropy * self._entropies * weights.unsqueeze(-1)).sum((-2, -1))
        if _penalises(self.trust):
            loss = loss + _by_client(given.kl) * (self._divergences * weights).sum(-1)
        return loss

    @cached_property
    def policy_loss(self) -> Tensor:
        """Minus the surrogate."""
        given = self.coefficients
        surrogate = policy_surrogate(
            self.log_probs,
            self.batch.log_probs,
            self.advantages,
            self.settings.surrogate,
            given.clip_low,
            given.clip_high,
        )
        return -(surrogate * self.batch.weights).sum(-1)

    @cached_property
    def value_loss(self) -> Tensor:
        """Squared error of the critic."""
        batch = self.batch
        return value_loss(self.new.values, batch.values, batch.returns, batch.weights, self.coefficients.value_clip)

    @cached_property
    def entropy(self) -> Tensor:
        """Of the whole action."""
        return self._mean(self._entropies.sum(-1))

    @cached_property
    def kl(self) -> Tensor:
        """Exact, from the batch's distribution in the trust region's direction; not a number where there is none."""
        if self.batch.distribution.shape[-1] == 0:
            return torch.full_like(self.batch.weights[:, 0], torch.nan)
        return self._mean(self._divergences)

    @cached_property
    def approx_kl(self) -> Tensor:
        """(r - 1) - log r: never negative, its mean is KL(old, new) (joschu.net/blog/kl-approx.html)."""
        log_ratio = self.log_probs - self.batch.log_probs
        return self._mean(log_ratio.expm1() - log_ratio)

    @cached_property
    def clip_fraction(self) -> Tensor:
        """Part of the steps whose ratio is beyond the clip; 0 for the surrogates that have none."""
        if self.settings.surrogate != "clip":
            return torch.zeros_like(self.log_probs[:, 0])
        move = (self.log_probs - self.batch.log_probs).exp() - 1
        return self._mean((move > self.coefficients.clip_high) | (move < -self.coefficients.clip_low))

    @cached_property
    def _entropies(self) -> Tensor:
        return self.distribution.entropy(self.new.distribution)

    @cached_property
    def _divergences(self) -> Tensor:
        return divergence(self.distribution, self.batch.distribution, self.new.distribution, self.trust.direction)

    def _mean(self, steps: Tensor) -> Tensor:
        """[K, B] -> [K]."""
        weights = self.batch.weights
        return (steps * weights).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)


def loss(
    new: PolicyOutput,
    batch: Minibatch,
    distribution: Distribution,
    settings: ObjectiveSettings,
    trust: TrustSettings,
    coefficients: Coefficients,
) -> tuple[Tensor, LossTerms]:
    """Each client's loss [K], to be minimised, differentiable once by what the policy said."""
    slopes, terms = loss_gradients(new, batch, distribution, settings, trust, coefficients)
    found: Tensor = _LossWithGradients.apply(  # type: ignore[no-untyped-call]
        new.distribution, new.values, terms.loss, slopes.distribution, slopes.values
    )
    return found, terms


def policy_loss(
    new: PolicyOutput,
    batch: Minibatch,
    distribution: Distribution,
    settings: ObjectiveSettings,
    trust: TrustSettings,
    coefficients: Coefficients,
) -> tuple[Tensor, LossTerms]:
    """`loss` without the critic's part."""
    return loss(new, batch, distribution, settings, trust, replace(coefficients, value=0.0))


@torch.no_grad()
def loss_gradients(
    new: PolicyOutput,
    batch: Minibatch,
    distribution: Distribution,
    settings: ObjectiveSettings,
    trust: TrustSettings,
    coefficients: Coefficients,
) -> tuple[OutputGradients, LossTerms]:
    """Slopes of `loss` by what the policy said, without a graph.

    The fastest way to a gradient is to go on from them:
    `torch.autograd.grad((new.distribution, new.values), parameters, (slopes.distribution, slopes.values))`.
    """
    parameters, weights = new.distribution.detach(), batch.weights
    advantages = batch.advantages
    if settings.normalise_advantages == "minibatch":
        advantages = normalise_advantages(advantages, weights)
    log_probs, _, pullback = distribution.vjp(parameters, batch.actions, entropy=False)
    rise = _surrogate_gradient(log_probs, batch.log_probs, advantages * weights, settings.surrogate, coefficients)
    by_entropy = weights.unsqueeze(-1) * coefficients.by_entropy if coefficients.has_entropy else None
    by_parameters = pullback(-rise, by_entropy)
    if _penalises(trust):
        with torch.enable_grad():
            free = parameters.clone().requires_grad_()
            kl = divergence(distribution, batch.distribution, free, trust.direction)
            by_parameters += torch.autograd.grad(kl, free, weights * coefficients.kl)[0]
    values = new.values.detach()
    slopes = OutputGradients(
        by_parameters, value_gradient(values, batch, coefficients) if coefficients.has_value else None
    )
    said = PolicyOutput(parameters, values)
    return slopes, LossTerms(said, batch, distribution, settings, trust, coefficients, advantages, log_probs)


def policy_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    kind: Surrogate,
    clip_low: Tensor | float,
    clip_high: Tensor | float,
) -> Tensor:
    """What the policy maximises in the mean, of each step, [K, B]; clip limits are numbers or [K, 1].

    `score` is log pi A; `ratio` is r A with r = pi / pi_old (1502.05477, eq. 14); `clip` is min(r A, clip(r, 1 - low,
    1 + high) A) (1707.06347, eq. 7; a limit of its own above as in 2503.14476). At the old policy all of them have the
    gradient A grad log pi.
    """
    if kind == "score":
        return log_probs * advantages
    ratio = (log_probs - old_log_probs).exp()
    if kind == "ratio":
        return ratio * advantages
    return torch.minimum(ratio * advantages, _clamp(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: Tensor | float | None = None
) -> Tensor:
    """Weighted sum of squared errors, [K, B] each -> [K]; with `clip` a value counts as no further than that from its
    old one.
    """
    if clip is not None:
        values = old_values + _clamp(values - old_values, -clip, clip)
    error = values - returns
    return (error * error * weights).sum(-1)


def divergence(distribution: Distribution, reference: Tensor, new: Tensor, direction: Direction) -> Tensor:
    """KL(reference, new) for `old-new`, KL(new, reference) for `new-old`, [..., M], [..., M] -> [...]."""
    return distribution.kl(reference, new) if direction == "old-new" else distribution.kl(new, reference)


def explained_variance(returns: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over valid steps, [K, ...] each -> [K]; 0 where nothing varies.

    Returns are worked out as advantages + values, so a variance may be no more than the rounding of that.
    """
    valid = valid.flatten(1)
    returns, values = (each.flatten(1).masked_fill(~valid, 0.0) for each in (returns, values))
    varied = _variance(returns, valid)
    rounding = (torch.finfo(returns.dtype).eps * torch.maximum(returns.abs(), values.abs()).amax(1)).square()
    return torch.where(varied > rounding, 1 - _variance(returns - values, valid) / varied, 0.0)


class _LossWithGradients(torch.autograd.Function):
    """A loss [K] whose slopes are known: autograd goes on from them."""

    @staticmethod
    def forward(
        ctx: Any, distribution: Tensor, values: Tensor, loss: Tensor, by_distribution: Tensor, by_values: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(by_distribution, by_values)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), "the loss is differentiable once: its slopes have no graph"
        by_distribution, by_values = ctx.saved_tensors
        outer = outer.unsqueeze(-1)
        by_values = None if by_values is None else by_values * outer
        return by_distribution * outer.unsqueeze(-1), by_values, None, None, None


def _surrogate_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kind: Surrogate, coefficients: Coefficients
) -> Tensor:
    """Of `policy_surrogate` by the log-probabilities, [K, B]."""
    if kind == "score":
        return advantages
    ratio = (log_probs - old_log_probs).exp_()
    free = ratio * advantages  # d r A = r A d log pi
    if kind == "ratio":
        return free
    clipped = _clamp(ratio, 1 - coefficients.clip_low, 1 + coefficients.clip_high) * advantages
    return free.mul_(free <= clipped)


def value_gradient(values: Tensor, batch: Minibatch, coefficients: Coefficients) -> Tensor:
    """Of the weighted value loss by the values, [K, B]."""
    scale = batch.weights * coefficients.twice_value
    if coefficients.value_clip is None:
        return (values - batch.returns).mul_(scale)
    move = values - batch.values
    kept = _clamp(move, -coefficients.value_clip, coefficients.value_clip)
    return (batch.values + kept - batch.returns).mul_(scale).mul_(move == kept)


def _penalises(trust: TrustSettings) -> bool:
    return trust.region in ("penalty", "adaptive")


def _by_client(coefficient: Tensor | float) -> Tensor | float:
    """[K, 1] -> [K]."""
    return coefficient.squeeze(-1) if isinstance(coefficient, Tensor) else coefficient


def _clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Limits are both numbers or both [K, 1]."""
    return torch.clamp(x, low, high)  # type: ignore[arg-type]


def _variance(values: Tensor, valid: Tensor) -> Tensor:
    """Over the valid entries, [K, S], [K, S] -> [K]; whatever stands in the others does not matter."""
    count = valid.sum(1, keepdim=True).clamp_min(1)
    mean = values.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    return ((values - mean).masked_fill(~valid, 0.0).square().sum(1, keepdim=True) / count).squeeze(1)
