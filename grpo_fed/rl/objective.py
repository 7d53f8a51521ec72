"""The objective: surrogate, value loss, entropy and KL, for K stacked clients at once.

On the hot path a minibatch is 256 steps, and every tensor operation costs more in dispatch than in arithmetic. So
`loss_gradients` gives the gradient of the loss by the policy's output in closed form, without a graph. The loss itself
and all that is reported of it are computed only when they are read (`LossTerms`).

K clients, B steps of a minibatch, M distribution parameters, C action components.
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
    """The weights of a loss, made once for an update: numbers, or [K, 1] where clients differ.

    Terms whose weight is 0 for all clients are left out of the computation.
    """

    clip_low: Tensor | float
    """How far the probability ratio may go below 1."""
    clip_high: Tensor | float
    """How far the probability ratio may go above 1."""
    value: Tensor | float = 0.0
    """Weight of the value loss."""
    entropy: Tensor | float = 0.0
    """[K, C]: weight of each action component's entropy."""
    kl: Tensor | float = 0.0
    """Weight of the KL, where the trust region is a penalty."""
    value_clip: Tensor | float | None = None
    """How far a value may go from the old one; None for no limit."""

    @cached_property
    def has_value(self) -> bool:
        return bool(torch.as_tensor(self.value).any())

    @cached_property
    def has_entropy(self) -> bool:
        return bool(torch.as_tensor(self.entropy).any())

    @cached_property
    def by_entropy(self) -> Tensor | float:
        """[K, 1, C]: gradient of the loss by the mean entropy."""
        return -self.entropy.unsqueeze(-2) if isinstance(self.entropy, Tensor) else -self.entropy

    @cached_property
    def twice_value(self) -> Tensor | float:
        return 2 * self.value


@dataclass(frozen=True)
class OutputGradients:
    """The gradient of the loss, summed over clients, by the policy's output: where its backward pass begins."""

    distribution: Tensor
    """[K, B, M]."""
    values: Tensor | None
    """[K, B]; None where the critic does not learn."""


REPORTED_TERMS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
"""The properties of `LossTerms` that clients report as `losses/NAME`; `runs/metrics.py` has a row for each."""


@dataclass(frozen=True)
class LossTerms:
    """The parts of a minibatch's loss, [K] each, without gradient and computed when first read.

    `loss`, `policy_loss` and `value_loss` are sums over the minibatch's weights; the rest are means over them.
    """

    new: PolicyOutput
    batch: Minibatch
    distribution: Distribution
    settings: ObjectiveSettings
    trust: TrustSettings
    coefficients: Coefficients
    advantages: Tensor
    """[K, B]: normalised if the scenario says so."""
    log_probs: Tensor
    """[K, B]: log-probabilities of the actions under the new policy."""

    @cached_property
    def loss(self) -> Tensor:
        """The loss that is minimised."""
        coefficients, weights = self.coefficients, self.batch.weights
        loss = self.policy_loss
        if coefficients.has_value:
            loss = loss + _by_client(coefficients.value) * self.value_loss
        if coefficients.has_entropy:
            loss = loss + (coefficients.by_entropy * self._entropies * weights.unsqueeze(-1)).sum((-2, -1))
        if _penalises(self.trust):
            loss = loss + _by_client(coefficients.kl) * (self._divergences * weights).sum(-1)
        return loss

    @cached_property
    def policy_loss(self) -> Tensor:
        """Minus the surrogate."""
        surrogate = policy_surrogate(
            self._log_probs_of_ratio,
            self.batch.log_probs,
            self.advantages,
            self.settings.surrogate,
            self.coefficients.clip_low,
            self.coefficients.clip_high,
        )
        return -(surrogate * self.batch.weights).sum(-1)

    @cached_property
    def value_loss(self) -> Tensor:
        """The critic's squared error."""
        batch = self.batch
        return value_loss(self.new.values, batch.values, batch.returns, batch.weights, self.coefficients.value_clip)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of the whole action."""
        return self._mean(self._entropies.sum(-1))

    @cached_property
    def kl(self) -> Tensor:
        """The exact KL from the batch's distribution, in the trust region's direction; NaN where the batch has none."""
        if self.batch.distribution.shape[-1] == 0:
            return torch.full_like(self.batch.weights[:, 0], torch.nan)
        return self._mean(self._divergences)

    @cached_property
    def approx_kl(self) -> Tensor:
        """The mean of (r - 1) - log r >= 0, an estimate of KL(old, new) (joschu.net/blog/kl-approx.html)."""
        log_ratio = self.log_probs - self.batch.log_probs
        return self._mean(log_ratio.expm1() - log_ratio)

    @cached_property
    def clipfrac(self) -> Tensor:
        """The part of the steps whose ratio is beyond the clip; 0 for surrogates without one."""
        if self.settings.surrogate != "clip":
            return torch.zeros_like(self.log_probs[:, 0])
        move = (self._log_probs_of_ratio - self.batch.log_probs).exp() - 1
        return self._mean((move > self.coefficients.clip_high) | (move < -self.coefficients.clip_low))

    @cached_property
    def _log_probs_of_ratio(self) -> Tensor:
        return _log_probs_of_ratio(self.log_probs, self.batch, self.settings)

    @cached_property
    def _entropies(self) -> Tensor:
        return self.distribution.entropy(self.new.distribution)

    @cached_property
    def _divergences(self) -> Tensor:
        return divergence(self.distribution, self.batch.distribution, self.new.distribution, self.trust.direction)

    def _mean(self, steps: Tensor) -> Tensor:
        """The weighted mean over steps, [K, B] -> [K]."""
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
    """Each client's loss [K], differentiable once by the policy's output, and its terms."""
    gradients, terms = loss_gradients(new, batch, distribution, settings, trust, coefficients)
    differentiable: Tensor = _LossWithGradients.apply(  # type: ignore[no-untyped-call]
        new.distribution, new.values, terms.loss, gradients.distribution, gradients.values
    )
    return differentiable, terms


def policy_loss(
    new: PolicyOutput,
    batch: Minibatch,
    distribution: Distribution,
    settings: ObjectiveSettings,
    trust: TrustSettings,
    coefficients: Coefficients,
) -> tuple[Tensor, LossTerms]:
    """The same as `loss`, without the critic's part."""
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
    """The gradient of `loss` by the policy's output, without a graph, and the loss's terms.

    The fastest way to the gradient by parameters begins with it:
    `torch.autograd.grad((new.distribution, new.values), parameters, (gradients.distribution, gradients.values))`.
    """
    parameters, weights = new.distribution.detach(), batch.weights
    advantages = batch.advantages
    if settings.normalise_advantages == "minibatch":
        advantages = normalise_advantages(advantages, weights)
    log_probs, _, pullback = distribution.vjp(parameters, batch.actions, entropy=False)
    by_log_probs = _surrogate_gradient(
        _log_probs_of_ratio(log_probs, batch, settings),
        batch.log_probs,
        advantages * weights,
        settings.surrogate,
        coefficients,
    )
    if _goes_by_episode(settings):
        by_log_probs = _episode_means(by_log_probs, batch)  # a mean over the same steps is its own transpose
    by_entropy = weights.unsqueeze(-1) * coefficients.by_entropy if coefficients.has_entropy else None
    by_parameters = pullback(-by_log_probs, by_entropy)
    if _penalises(trust):
        with torch.enable_grad():
            free = parameters.clone().requires_grad_()
            kl = divergence(distribution, batch.distribution, free, trust.direction)
            by_parameters += torch.autograd.grad(kl, free, weights * coefficients.kl)[0]
    values = new.values.detach()
    by_values = value_gradient(values, batch, coefficients) if coefficients.has_value else None
    output = PolicyOutput(parameters, values)
    terms = LossTerms(output, batch, distribution, settings, trust, coefficients, advantages, log_probs)
    return OutputGradients(by_parameters, by_values), terms


def policy_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    kind: Surrogate,
    clip_low: Tensor | float,
    clip_high: Tensor | float,
) -> Tensor:
    """The surrogate of each step, [K, B], whose mean the policy maximises; clip limits are numbers or [K, 1].

    `score` is log pi A; `ratio` is r A with r = pi / pi_old (1502.05477, eq. 14); `clip` is min(r A, clip(r, 1 - low,
    1 + high) A) (1707.06347, eq. 7; with another limit above than below as in 2503.14476). At the old policy all three
    have the gradient A grad log pi.
    """
    if kind == "score":
        return log_probs * advantages
    ratio = (log_probs - old_log_probs).exp()
    if kind == "ratio":
        return ratio * advantages
    return torch.minimum(ratio * advantages, _clamp(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def _goes_by_episode(settings: ObjectiveSettings) -> bool:
    return settings.ratio == "episode" and settings.surrogate != "score"


def _log_probs_of_ratio(log_probs: Tensor, batch: Minibatch, settings: ObjectiveSettings) -> Tensor:
    """The log-probabilities whose difference from the old ones is the logarithm of the objective's ratio, [K, B].

    With `objective.ratio = "episode"` it is the mean over the steps of the episode (GSPO, 2507.18071).
    """
    if not _goes_by_episode(settings):
        return log_probs
    return batch.log_probs + _episode_means(log_probs - batch.log_probs, batch)


def _episode_means(steps: Tensor, batch: Minibatch) -> Tensor:
    """Each episode's mean over those of its steps that have a weight, [K, B] -> [K, B]; 0 for steps without one."""
    assert batch.episodes is not None, "the minibatch tells which episode a step belongs to"
    real = (batch.weights > 0).to(steps.dtype)
    table = steps.new_zeros(2, len(steps), int(batch.episodes.max()) + 1)
    sums, counts = table.scatter_add_(2, batch.episodes.expand(2, -1, -1), torch.stack((steps * real, real)))
    means: Tensor = (sums / counts.clamp_min(1)).gather(1, batch.episodes) * real
    return means


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: Tensor | float | None = None
) -> Tensor:
    """The weighted sum of squared errors, [K, B] each -> [K].

    clip: how far a value may count as being from its old one; None for no limit.
    """
    if clip is not None:
        values = old_values + _clamp(values - old_values, -clip, clip)
    error = values - returns
    return (error * error * weights).sum(-1)


def divergence(distribution: Distribution, reference: Tensor, new: Tensor, direction: Direction) -> Tensor:
    """KL(reference, new) for `old-new`, KL(new, reference) for `new-old`, [..., M], [..., M] -> [...]."""
    return distribution.kl(reference, new) if direction == "old-new" else distribution.kl(new, reference)


def explained_variance(returns: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """The explained variance 1 - Var(returns - values) / Var(returns) over valid steps, [K, ...] each -> [K].

    It is 0 where the returns do not vary: they are computed as advantages + values, so their variance may be no more
    than rounding.
    """
    valid = valid.flatten(1)
    returns, values = (each.flatten(1).masked_fill(~valid, 0.0) for each in (returns, values))
    variance = _variance(returns, valid)
    rounding = (torch.finfo(returns.dtype).eps * torch.maximum(returns.abs(), values.abs()).amax(1)).square()
    return torch.where(variance > rounding, 1 - _variance(returns - values, valid) / variance, 0.0)


class _LossWithGradients(torch.autograd.Function):
    """A loss [K] whose gradient by the policy's output is known: autograd goes on from it."""

    @staticmethod
    def forward(
        ctx: Any, distribution: Tensor, values: Tensor, loss: Tensor, by_distribution: Tensor, by_values: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(by_distribution, by_values)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), "the loss is differentiable once: its gradient has no graph"
        by_distribution, by_values = ctx.saved_tensors
        outer = outer.unsqueeze(-1)
        by_values = None if by_values is None else by_values * outer
        return by_distribution * outer.unsqueeze(-1), by_values, None, None, None


def _surrogate_gradient(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kind: Surrogate, coefficients: Coefficients
) -> Tensor:
    """The gradient of `policy_surrogate` by the log-probabilities, [K, B]."""
    if kind == "score":
        return advantages
    ratio = (log_probs - old_log_probs).exp_()
    unclipped = ratio * advantages  # d r A = r A d log pi
    if kind == "ratio":
        return unclipped
    clipped = _clamp(ratio, 1 - coefficients.clip_low, 1 + coefficients.clip_high) * advantages
    return unclipped.mul_(unclipped <= clipped)


def value_gradient(values: Tensor, batch: Minibatch, coefficients: Coefficients) -> Tensor:
    """The gradient of the weighted value loss by the values, [K, B]."""
    scale = batch.weights * coefficients.twice_value
    if coefficients.value_clip is None:
        return (values - batch.returns).mul_(scale)
    move = values - batch.values
    clipped = _clamp(move, -coefficients.value_clip, coefficients.value_clip)
    return (batch.values + clipped - batch.returns).mul_(scale).mul_(move == clipped)


def _penalises(trust: TrustSettings) -> bool:
    return trust.region in ("penalty", "adaptive")


def _by_client(coefficient: Tensor | float) -> Tensor | float:
    """A coefficient of each client, [K, 1] -> [K]; numbers stay."""
    return coefficient.squeeze(-1) if isinstance(coefficient, Tensor) else coefficient


def _clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp to limits that are both numbers or both [K, 1]."""
    return torch.clamp(x, low, high)  # type: ignore[arg-type]


def _variance(values: Tensor, valid: Tensor) -> Tensor:
    """The variance over the valid entries, [K, S], [K, S] -> [K]; the others may be anything."""
    count = valid.sum(1, keepdim=True).clamp_min(1)
    mean = values.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    return ((values - mean).masked_fill(~valid, 0.0).square().sum(1, keepdim=True) / count).squeeze(1)
