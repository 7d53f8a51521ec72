"""One update of some stacked clients from one batch: Adam over epochs and minibatches, or a natural-gradient step.

The two functions `adam_update` and `natural_update` are the algorithm; what stands around them prepares the batch
before and keeps the trust region after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy, PolicyOutput, StackedPolicy
from grpo_fed.policy.blocks import Block
from grpo_fed.policy.groups import Groups
from grpo_fed.rl import objective, penalty
from grpo_fed.rl import trust_region as trust
from grpo_fed.rl.adam import Adam, per_client
from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.natural_gradient import (
    LineSearchResult,
    conjugate_gradient,
    fisher_product,
    flat_gradient,
    line_search,
)
from grpo_fed.rl.objective import Coefficients, LossTerms
from grpo_fed.rl.records import Batch, Minibatch
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class ClientStack:
    """Some clients of a fleet as one computation: rows of the fleet's tensors, seen without a copy."""

    policy: StackedPolicy
    scenario: Scenario
    rows: slice
    """Which of the fleet's clients."""
    seeds: Sequence[int]
    parameters: Tensor
    """[K, P]: changed in place."""
    views: Mapping[str, Tensor]
    """The same memory by name, [K, *shape] each, in the layout's order."""
    gradient: Tensor
    """[K, P]: of the loss, written by every backward pass."""
    gradient_views: Mapping[str, Tensor]
    """The same memory by name."""
    anchor: Tensor
    """[K, P]: where the round began."""
    adam: Adam
    learning_rate: np.ndarray
    """[K, 1]."""
    entropy: Tensor
    """[K, C]: weights of the action components' entropies."""
    penalty: Tensor
    """[K, 1]."""
    kl_coefficient: Tensor
    """[K]: adapts in place."""
    kl_limit: Tensor
    """[K]: adapts in place."""
    groups: Groups
    """Of the penalty."""
    budgets: Sequence[tuple[Block, float]]
    """KL budgets of blocks."""
    proximal_weight: Tensor | None = None
    """[P]: how strongly each parameter is drawn to its anchor, by 1/2 pull (x - anchor)^2; None for not at all."""
    phase_optimisers: tuple[Adam, ...] = ()
    """Where private blocks learn before shared ones (2102.07078): Adam for either, on the same moments."""

    @cached_property
    def critic_pull(self) -> Tensor | None:
        """[P]: `pull` where only the critic looks, 0 elsewhere."""
        if self.proximal_weight is None:
            return None
        names = self.policy.actor_parameters()
        alone = [torch.full((slot.size,), float(slot.name not in names)) for slot in self.policy.layout.slots]
        return self.proximal_weight * torch.cat(alone).to(self.proximal_weight.device)

    @cached_property
    def penalises(self) -> bool:
        """Whether any client has a penalty."""
        settings = self.scenario.penalty
        return bool(self.penalty.any() or settings.l1 or settings.outer)


Passes: TypeAlias = Sequence[tuple[Tensor | None, Sequence[LossTerms]]]
"""The minibatches of the last pass: with None of all clients, and then of those [K] bool that stopped before."""


@dataclass(frozen=True)
class Losses:
    """What an update says of itself, [K] each: means over the minibatches of the last pass."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clipfrac: Tensor
    explained_variance: Tensor
    kl: Tensor
    """KL(old, new) after the update; not a number where nothing asked for it."""

    @classmethod
    def of(cls, passes: Passes, explained_variance: Tensor) -> Losses:
        """A client that stopped early has the losses that it stopped with, however long the others went on."""

        def mean(each: Callable[[LossTerms], Tensor]) -> Tensor:
            found = torch.full_like(explained_variance, torch.nan)
            for clients, seen in passes:
                here = torch.stack([each(terms) for terms in seen]).mean(0)
                found = here if clients is None else torch.where(clients, here, found)
            return found

        return cls(
            mean(lambda terms: terms.policy_loss),
            mean(lambda terms: terms.value_loss),
            mean(lambda terms: terms.entropy),
            mean(lambda terms: terms.approx_kl),
            mean(lambda terms: terms.clip_fraction),
            explained_variance,
            torch.full_like(explained_variance, torch.nan),
        )

    def client(self, row: int) -> dict[str, float]:
        """Of one client, by name."""
        return dict(zip((field.name for field in fields(self)), self._rows[row], strict=True))

    @cached_property
    def _rows(self) -> list[list[float]]:
        """[K] of all fields: one copy from a GPU, not one for each number."""
        rows: list[list[float]] = torch.stack([getattr(self, field.name) for field in fields(self)], 1).tolist()
        return rows


def update_clients(
    stack: ClientStack,
    batch: Batch,
    judged: LearningTargets,
    active: Tensor | None,
    numbers: np.ndarray,
    progress: np.ndarray,
) -> Losses:
    """Move the active clients by one batch, the `numbers`-th [K] of each, at `progress` [K] of all rounds."""
    region = stack.scenario.trust
    sample = PackedBatch.of(batch, judged, reference_distributions(stack, batch))
    before = stack.parameters.clone()
    way = adam_update if stack.scenario.objective.step == "adam" else natural_update
    passes, kl = way(stack, sample, active, numbers, progress)
    losses = Losses.of(passes, objective.explained_variance(judged.returns, batch.values, batch.valid))
    if stack.budgets:
        kept, _ = trust.shorten_to_budgets(measure_kl_from_old(stack, batch), before, stack.parameters, stack.budgets)
        stack.parameters.copy_(kept)
    if active is not None:
        stack.parameters.copy_(torch.where(active[:, None], stack.parameters, before))
    moved_since = kl is not None and stack.penalises
    if stack.budgets or moved_since or region.region == "adaptive":
        kl = measure_kl_from_old(stack, batch)(stack.parameters)
    if kl is not None and region.region == "adaptive":
        adapted = trust.adapt_coefficient(stack.kl_coefficient, kl, region.target)
        stack.kl_coefficient.copy_(adapted if active is None else torch.where(active, adapted, stack.kl_coefficient))
    return losses if kl is None else replace(losses, kl=kl)


def adam_update(
    stack: ClientStack, sample: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> tuple[Passes, Tensor | None]:
    """Epochs over minibatches; the penalty's proximal step follows each of Adam's, so its zeros are exact."""
    settings, region = stack.scenario.objective, stack.scenario.trust
    coefficients = current_coefficients(stack, progress)
    learning_rate = stack.learning_rate * scheduled(settings.schedule, progress)
    seen: deque[LossTerms] = deque(maxlen=settings.minibatches)
    stopped: list[tuple[Tensor, list[LossTerms]]] = []
    for number, part in enumerate(sample.minibatches(stack.seeds, numbers, settings.epochs, settings.minibatches)):
        adam = optimiser_of_epoch(stack, number // settings.minibatches)
        said, pullback = stack.policy.vjp(stack.views, part.observations, settings.advantage == "gae")
        slopes, terms = objective.loss_gradients(said, part, stack.policy.distribution, settings, region, coefficients)
        seen.append(terms)
        if region.stop is not None:
            within = terms.approx_kl <= region.stop
            going = within if active is None else active & within
            stopping = ~within if active is None else active & ~within
            if stopping.any():
                stopped.append((stopping, list(seen)))
                active = going
            if not going.any():
                break
        pullback(slopes.distribution, slopes.values, stack.gradient_views)
        add_proximal_gradient(stack, stack.proximal_weight)
        if settings.max_grad_norm is not None:
            clip_gradient(stack.gradient, settings.max_grad_norm, adam.columns)
        adam.step(stack.parameters, stack.gradient, learning_rate, active)
        apply_group_penalty(stack, learning_rate, active, adam.columns)
    return [(None, seen), *stopped], None


def natural_update(
    stack: ClientStack, sample: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> tuple[Passes, Tensor | None]:
    """One step of the policy along the natural gradient, then Adam on the critic (1502.05477), then the penalty's."""
    terms, kl = natural_step(stack, sample.whole, active, progress)
    fit_critic(stack, sample, active, numbers, progress)
    apply_group_penalty(stack, stack.learning_rate * scheduled(stack.scenario.objective.schedule, progress), active)
    return [(None, [terms])], kl


def natural_step(
    stack: ClientStack, whole: Minibatch, active: Tensor | None, progress: np.ndarray
) -> tuple[LossTerms, Tensor]:
    """Moves the parameters that the actor uses, and gives the KL [K] of that; a hard limit may adapt."""
    settings, region = stack.scenario.objective, stack.scenario.trust
    names = stack.policy.actor_parameters()
    leaves = {name: view.detach().requires_grad_() for name, view in stack.views.items()}
    actor = {name: leaf for name, leaf in leaves.items() if name in names}
    coefficients = current_coefficients(stack, progress)
    said = forward(stack, leaves, whole.observations)
    loss, terms = objective.policy_loss(said, whole, stack.policy.distribution, settings, region, coefficients)
    slots = [slot for slot in stack.policy.layout.slots if slot.name in names]
    columns = torch.cat([torch.arange(slot.start, slot.stop, device=loss.device) for slot in slots])
    gradient = -flat_gradient(loss.sum(), list(actor.values()), retain_graph=True)
    if stack.proximal_weight is not None:
        gradient -= (stack.proximal_weight * (stack.parameters - stack.anchor))[:, columns]
    kl = weighted_kl(stack.policy, whole, said.distribution, region.direction)
    product = fisher_product(kl, list(actor.values()), region.cg_damping)
    direction = conjugate_gradient(product, gradient, region.cg_iterations)
    step, predicted = natural_length(stack, gradient, direction, product(direction), progress)

    old = stack.parameters.clone()

    def measure(scale: Tensor) -> tuple[Tensor, Tensor]:
        stack.parameters[:, columns] = old[:, columns] + scale * step
        with torch.no_grad():
            new = forward(stack, stack.views, whole.observations)
            surrogate, _ = objective.policy_loss(new, whole, stack.policy.distribution, settings, region, coefficients)
            return weighted_kl(stack.policy, whole, new.distribution, region.direction), -surrogate - proximal_value(
                stack
            )

    start = -loss.detach() - proximal_value(stack)
    if region.line_search and region.region == "hard":
        found = line_search(measure, stack.kl_limit, start)
        stack.parameters[:, columns] = old[:, columns] + found.scale * step
    else:
        whole_step = torch.ones_like(stack.kl_limit)[:, None]
        kl_there, surrogate = measure(whole_step)
        found = LineSearchResult(whole_step, kl_there, surrogate - start)
    if region.adaptive_target:
        wider = trust.adapt_limit(stack.kl_limit, found.gain, predicted, region.target)
        stack.kl_limit.copy_(wider if active is None else torch.where(active, wider, stack.kl_limit))
    return terms, found.kl


def natural_length(
    stack: ClientStack, gradient: Tensor, direction: Tensor, image: Tensor, progress: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The full step [K, P'] and the gain [K] that the linear model promises of it.

    To the KL limit where there is a hard one (1/2 step' F step = limit), else the learning rate times the direction.
    """
    settings = stack.scenario.objective
    if stack.scenario.trust.region == "hard":
        curvature = (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        pace = (2 * stack.kl_limit[:, None] / curvature).sqrt()
    else:
        pace = per_client(stack.learning_rate * scheduled(settings.schedule, progress), direction)
    step = pace * direction
    return step, (gradient * step).sum(1)


def fit_critic(
    stack: ClientStack, sample: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> None:
    """Adam's passes on the value loss alone; parameters that the actor uses stay."""
    settings = stack.scenario.objective
    if settings.advantage == "group":
        return
    coefficients = replace(current_coefficients(stack, progress), value=1.0)
    stack.gradient.zero_()
    learning_rate = stack.learning_rate * scheduled(settings.schedule, progress)
    for part in sample.minibatches(stack.seeds, numbers, settings.value_epochs, settings.minibatches):
        values, pullback = stack.policy.critic_vjp(stack.views, part.observations)
        pullback(objective.value_gradient(values, part, coefficients), stack.gradient_views)
        add_proximal_gradient(stack, stack.critic_pull)
        if settings.max_grad_norm is not None:
            clip_gradient(stack.gradient, settings.max_grad_norm)
        stack.adam.step(stack.parameters, stack.gradient, learning_rate, active)


def reference_distributions(stack: ClientStack, batch: Batch) -> Tensor | None:
    """Distributions [K, S, M] that the KL is measured from, or None where nothing measures it."""
    settings = stack.scenario.trust
    if settings.region == "none" and stack.scenario.objective.step == "adam":
        return None
    if settings.reference == "old" or stack.scenario.objective.step == "natural":
        return batch.distribution.flatten(1, 2)
    with torch.no_grad():
        views = stack.policy.layout.views(stack.anchor)
        return stack.policy.act(views, batch.observations.flatten(1, 2))


def measure_kl_from_old(stack: ClientStack, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The mean KL [K] between the policy that collected the batch and one with given parameters [K, P]."""
    observations, old = batch.observations.flatten(1, 2), batch.distribution.flatten(1, 2)
    weights = batch.valid.flatten(1).to(old.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
    new_first = stack.scenario.trust.direction == "new-old"

    def measure(parameters: Tensor) -> Tensor:
        with torch.no_grad():
            new = stack.policy.act(stack.policy.layout.views(parameters), observations)
            pair = (new, old) if new_first else (old, new)
            return (stack.policy.distribution.kl(*pair) * weights).sum(1)

    return measure


def forward(stack: ClientStack, parameters: Mapping[str, Tensor], observations: Tensor) -> PolicyOutput:
    """What the policies say of actions alone."""
    distribution = stack.policy.act(parameters, observations)
    return PolicyOutput(distribution, distribution.new_zeros(distribution.shape[:2]))


def optimiser_of_epoch(stack: ClientStack, epoch: int) -> Adam:
    """Whose turn it is in an epoch: everybody's, or first the private blocks' and then the shared ones'."""
    if not stack.phase_optimisers:
        return stack.adam
    private, shared = stack.phase_optimisers
    epochs = stack.scenario.objective.epochs
    first = min(max(1, round(stack.scenario.personal.first * epochs)), epochs - 1)
    return private if epoch < first else shared


def add_proximal_gradient(stack: ClientStack, pull: Tensor | None) -> None:
    """Add to the gradient that of 1/2 pull (x - anchor)^2 (1812.06127, equation 2)."""
    if pull is not None:
        stack.gradient.addcmul_(pull, stack.parameters - stack.anchor)


def proximal_value(stack: ClientStack) -> Tensor | float:
    """What 1/2 pull (x - anchor)^2 comes to, [K], or 0 where nothing pulls."""
    if stack.proximal_weight is None:
        return 0.0
    return 0.5 * (stack.proximal_weight * (stack.parameters - stack.anchor).square()).sum(1)


def clip_gradient(gradient: Tensor, longest: float, columns: Tensor | None = None) -> None:
    """Scale down in place the gradient of each client, [K, P], that is longer than `longest` over what moves."""
    length = torch.linalg.vector_norm(gradient if columns is None else gradient[:, columns], dim=1, keepdim=True)
    gradient.mul_((longest / (length + 1e-6)).clamp_(max=1.0))


def apply_group_penalty(
    stack: ClientStack, learning_rate: np.ndarray, active: Tensor | None, columns: Tensor | None = None
) -> None:
    """The group penalty's proximal step on what moves, as long as the optimiser's step was."""
    settings = stack.scenario.penalty
    if not stack.penalises:
        return
    anchor = stack.anchor if settings.toward == "shared" else None
    pace = per_client(learning_rate, stack.parameters)
    shrunk = penalty.proximal(stack.parameters, anchor, settings, stack.groups, pace, stack.penalty)
    if columns is not None:
        shrunk = stack.parameters.clone().index_copy_(1, columns, shrunk.index_select(1, columns))
    stack.parameters.copy_(shrunk if active is None else torch.where(active[:, None], shrunk, stack.parameters))


def current_coefficients(stack: ClientStack, progress: np.ndarray) -> Coefficients:
    """The objective's weights at `progress`, for each client."""
    settings = stack.scenario.objective
    varies = settings.clip_schedule != "constant"
    left = per_client(scheduled(settings.clip_schedule, progress), stack.parameters) if varies else 1.0
    high = settings.clip if settings.clip_high is None else settings.clip_high
    return Coefficients(
        clip_low=settings.clip * left,
        clip_high=high * left,
        value=settings.value_coefficient if settings.advantage == "gae" else 0.0,
        entropy=stack.entropy,
        kl=stack.kl_coefficient[:, None],
        value_clip=settings.value_clip,
    )


def scheduled(kind: str, progress: np.ndarray) -> np.ndarray:
    """What a schedule leaves of its start value at `progress` [K], 0 to 1: [K, 1]."""
    if kind == "constant":
        return np.ones((len(progress), 1))
    left = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + np.cos(np.pi * progress))
    return np.asarray(left[:, None])


def weighted_kl(policy: Policy, part: Minibatch, distribution: Tensor, direction: str) -> Tensor:
    """Mean KL [K] between the minibatch's reference and the given distribution, over its steps."""
    pair = (part.distribution, distribution) if direction == "old-new" else (distribution, part.distribution)
    weights = part.weights / part.weights.sum(1, keepdim=True).clamp_min(1e-12)
    return (policy.distribution.kl(*pair) * weights).sum(1)
