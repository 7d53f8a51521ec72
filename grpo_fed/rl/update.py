"""One update of stacked clients from one batch: Adam over epochs and minibatches, or a natural-gradient step.

`adam_update` and `natural_update` are the algorithms. `update_clients` prepares the batch before, and afterwards keeps
the trust region.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import PolicyOutput, StackedPolicy
from grpo_fed.rl import objective, penalty
from grpo_fed.rl import trust_region as trust
from grpo_fed.rl.adam import Adam, per_client
from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.client_stack import ClientStack, ParameterStack
from grpo_fed.rl.constraints import adapt_entropy, fit_cost_critic, mean_entropies
from grpo_fed.rl.inner_steps import InnerSteps
from grpo_fed.rl.losses import Losses, Passes
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.natural_gradient import (
    LineSearchResult,
    conjugate_gradient,
    fisher_product,
    flat_gradient,
    line_search,
)
from grpo_fed.rl.objective import Coefficients, Direction, LossTerms
from grpo_fed.rl.records import Batch, Minibatch


def update_clients(
    stack: ClientStack,
    batch: Batch,
    targets: LearningTargets,
    active: Tensor | None,
    numbers: np.ndarray,
    progress: np.ndarray,
) -> Losses:
    """Move the active clients by one batch.

    active: [K] bool, the clients that move; None for all.
    numbers: [K], how many updates each client has made before: they name the random streams of the minibatches.
    progress: [K], progress of the run, 0 to 1, that schedules go by.
    """
    settings, region = stack.scenario.objective, stack.scenario.trust
    constraints = adapt_entropy(stack, lambda: mean_entropies(stack.policy, batch), active)
    by_episode, remembers = settings.ratio == "episode", stack.policy.memory_size > 0
    packed = PackedBatch.of(batch, targets, reference_distributions(stack, batch), by_episode, remembers)
    before = stack.parameters.clone()
    fit_cost_critic(
        stack, batch, targets, active, numbers, stack.learning_rate * scheduled(settings.schedule, progress)
    )
    step = adam_update if settings.step == "adam" else natural_update
    passes, step_kl = step(stack, packed, active, numbers, progress)
    losses = Losses.of(passes, objective.explained_variance(targets.returns, batch.values, batch.valid))
    if stack.cost_multiplier is not None:
        constraints["charts/cost_multiplier"] = stack.cost_multiplier.clone()
    losses = losses.with_constraints(constraints)
    if stack.budgets:
        measure_kl = kl_from_batch(stack, batch)
        shortened, _ = trust.shorten_to_budgets(measure_kl, before, stack.parameters, stack.budgets)
        stack.parameters.copy_(shortened)
    if active is not None:
        stack.parameters.copy_(torch.where(active[:, None], stack.parameters, before))
    kl = update_kl(stack, batch, step_kl)
    if kl is None:
        return losses
    if region.region == "adaptive":
        adapted = trust.adapt_coefficient(stack.kl_coefficient, kl, region.target)
        stack.kl_coefficient.copy_(adapted if active is None else torch.where(active, adapted, stack.kl_coefficient))
    return losses.with_kl(kl)


def update_kl(stack: ClientStack, batch: Batch, step_kl: Tensor | None) -> Tensor | None:
    """KL(old, new) of the update that was made, [K], or None where nothing needs it.

    step_kl: [K], what the natural step measured of itself; None after Adam.
    """
    shortened = bool(stack.budgets)
    penalised = step_kl is not None and stack.penalises
    if shortened or penalised or stack.scenario.trust.region == "adaptive":
        return kl_from_batch(stack, batch)(stack.parameters)  # something moved the policy after the step, or Adam did
    return step_kl  # exact for the natural step: the critic that learns after it is not part of the policy


def adam_update(
    stack: ClientStack, packed: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> tuple[Passes, Tensor | None]:
    """Epochs over minibatches; a proximal step of the penalty follows each step of Adam, so its zeros are exact."""
    settings, region = stack.scenario.objective, stack.scenario.trust
    coefficients = current_coefficients(stack, progress)
    learning_rate = stack.learning_rate * scheduled(settings.schedule, progress)
    last_pass: deque[LossTerms] = deque(maxlen=settings.minibatches)
    stopped: list[tuple[Tensor, list[LossTerms]]] = []
    inner = InnerSteps()
    for number, part in enumerate(packed.minibatches(stack.seeds, numbers, settings.epochs, settings.minibatches)):
        adam = optimiser_of_epoch(stack, number // settings.minibatches)
        output, pullback = stack.policy.vjp(stack.views, part.observations, settings.advantage == "gae")
        gradients, terms = objective.loss_gradients(
            output, part, stack.policy.distribution, settings, region, coefficients
        )
        last_pass.append(terms)
        if region.stop is not None:
            within = terms.approx_kl <= region.stop
            going_on = within if active is None else active & within
            stopping = ~within if active is None else active & ~within
            if stopping.any():
                stopped.append((stopping, list(last_pass)))
                active = going_on
            if not going_on.any():
                break
        pullback(gradients.distribution, gradients.values, stack.gradient_views)
        complete_gradient(stack, stack.proximal_weight)
        take_step(stack, adam, learning_rate, active, inner)
    return [(None, last_pass), *stopped], None


def take_step(
    stack: ParameterStack, adam: Adam, learning_rate: np.ndarray, active: Tensor | None, inner: InnerSteps
) -> None:
    """Move the active clients along a minibatch's gradient: an inner step, or Adam's with all that comes after it."""
    limit = stack.scenario.objective.max_grad_norm
    left = 1.0 if limit is None else clip_gradient(stack.gradient, limit, adam.columns)
    if inner.make(stack):
        return
    adam.step(stack.parameters, stack.gradient, learning_rate, active)
    if stack.drift is not None:  # of `merge.correct_drift` (1910.06378, Algorithm 1)
        stack.parameters.add_(stack.drift if active is None else stack.drift * active[:, None])
    penalise_after_adam(stack, adam, learning_rate, left, active)


def natural_update(
    stack: ClientStack, packed: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> tuple[Passes, Tensor | None]:
    """One step of the policy along the natural gradient, Adam on the critic (1502.05477), then the penalty's step."""
    terms, kl = natural_step(stack, packed.whole, active, progress)
    fit_critic(stack, packed, active, numbers, progress)
    apply_group_penalty(stack, stack.learning_rate * scheduled(stack.scenario.objective.schedule, progress), active)
    return [(None, [terms])], kl


def natural_step(
    stack: ClientStack, whole: Minibatch, active: Tensor | None, progress: np.ndarray
) -> tuple[LossTerms, Tensor]:
    """Move the parameters that the actor uses; gives the terms before the step and its KL [K]. A limit may adapt."""
    settings, region = stack.scenario.objective, stack.scenario.trust
    names = stack.policy.actor_parameters() - {slot.name for slot in stack.policy.layout.frozen}
    leaves = {name: view.detach().requires_grad_() for name, view in stack.views.items()}
    actor = {name: leaf for name, leaf in leaves.items() if name in names}
    coefficients = current_coefficients(stack, progress)
    output = actor_output(stack, leaves, whole.observations)
    loss, terms = objective.policy_loss(output, whole, stack.policy.distribution, settings, region, coefficients)
    slots = [slot for slot in stack.policy.layout.slots if slot.name in names]
    columns = torch.cat([torch.arange(slot.start, slot.stop, device=loss.device) for slot in slots])
    gradient = -flat_gradient(loss.sum(), list(actor.values()), retain_graph=True)
    if stack.proximal_weight is not None:
        gradient -= (stack.proximal_weight * (stack.parameters - stack.anchor))[:, columns]
    kl = weighted_kl(stack.policy, whole, output.distribution, region.direction)
    product = fisher_product(kl, list(actor.values()), region.cg_damping)
    direction = conjugate_gradient(product, gradient, region.cg_iterations)
    step, predicted_gain = full_natural_step(stack, gradient, direction, product(direction), progress)

    old = stack.parameters.clone()
    old_surrogate = -loss.detach() - proximal_value(stack)

    def move_to(scale: Tensor) -> None:
        """Put the policies at a part [K, 1] of the step."""
        stack.parameters[:, columns] = old[:, columns] + scale * step

    def measure_at(scale: Tensor) -> tuple[Tensor, Tensor]:
        """Move to a part of the step, and give KL and surrogate there, [K] each."""
        move_to(scale)
        with torch.no_grad():
            new = actor_output(stack, stack.views, whole.observations)
            loss, _ = objective.policy_loss(new, whole, stack.policy.distribution, settings, region, coefficients)
            kl = weighted_kl(stack.policy, whole, new.distribution, region.direction)
            return kl, -loss - proximal_value(stack)

    if region.line_search and region.region == "hard":
        search = line_search(measure_at, stack.kl_limit, old_surrogate)
    else:
        full = torch.ones_like(stack.kl_limit)[:, None]
        kl_there, surrogate = measure_at(full)
        search = LineSearchResult(full, kl_there, surrogate - old_surrogate)
    move_to(search.scale)
    if region.adaptive_target:
        adapted = trust.adapt_limit(stack.kl_limit, search.gain, predicted_gain, region.target)
        stack.kl_limit.copy_(adapted if active is None else torch.where(active, adapted, stack.kl_limit))
    return terms, search.kl


def full_natural_step(
    stack: ClientStack, gradient: Tensor, direction: Tensor, product: Tensor, progress: np.ndarray
) -> tuple[Tensor, Tensor]:
    """The step along a direction d [K, P'] before any line search, and the gain [K] that the linear model predicts.

    It reaches the KL limit where there is a hard one (1/2 step' F step = limit); else it is the learning rate times d.
    product: [K, P'], F d.
    """
    settings = stack.scenario.objective
    if stack.scenario.trust.region == "hard":
        curvature = (direction * product).sum(1, keepdim=True).clamp_min(1e-30)
        length = (2 * stack.kl_limit[:, None] / curvature).sqrt()
    else:
        length = per_client(stack.learning_rate * scheduled(settings.schedule, progress), direction)
    step = length * direction
    return step, (gradient * step).sum(1)


def fit_critic(
    stack: ClientStack, packed: PackedBatch, active: Tensor | None, numbers: np.ndarray, progress: np.ndarray
) -> None:
    """Adam on the value loss alone; parameters that the actor uses do not move."""
    settings = stack.scenario.objective
    if settings.advantage == "group":
        return
    coefficients = replace(current_coefficients(stack, progress), value=1.0)
    stack.gradient.zero_()
    learning_rate = stack.learning_rate * scheduled(settings.schedule, progress)
    for part in packed.minibatches(stack.seeds, numbers, settings.value_epochs, settings.minibatches):
        values, pullback = stack.policy.critic_vjp(stack.views, part.observations)
        pullback(objective.value_gradient(values, part, coefficients), stack.gradient_views)
        complete_gradient(stack, stack.critic_proximal_weight)
        if settings.max_grad_norm is not None:
            clip_gradient(stack.gradient, settings.max_grad_norm)
        stack.adam.step(stack.parameters, stack.gradient, learning_rate, active)


def reference_distributions(stack: ClientStack, batch: Batch) -> Tensor | None:
    """The distributions that the KL is measured from, [K, S, M], or None where nothing measures it."""
    settings = stack.scenario.trust
    if settings.region == "none" and stack.scenario.objective.step == "adam":
        return None
    if settings.reference == "old" or stack.scenario.objective.step == "natural":
        return batch.distribution.flatten(1, 2)
    reference = stack.anchor
    if settings.reference == "start":
        assert stack.first is not None, "a stack has its first parameters where they are the reference"
        reference = stack.first
    with torch.no_grad():
        return stack.policy.act(stack.policy.layout.views(reference), batch.observations.flatten(1, 2))


def kl_from_batch(stack: ClientStack, batch: Batch) -> Callable[[Tensor], Tensor]:
    """A function of parameters [K, P]: the mean KL [K] of their policies from those that collected the batch."""
    observations, old = batch.observations.flatten(1, 2), batch.distribution.flatten(1, 2)
    weights = batch.valid.flatten(1).to(old.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
    direction = stack.scenario.trust.direction

    def measure(parameters: Tensor) -> Tensor:
        with torch.no_grad():
            new = stack.policy.act(stack.policy.layout.views(parameters), observations)
            return (objective.divergence(stack.policy.distribution, old, new, direction) * weights).sum(1)

    return measure


def actor_output(stack: ClientStack, parameters: Mapping[str, Tensor], observations: Tensor) -> PolicyOutput:
    """The policies' action distributions, with 0 for the values."""
    distribution = stack.policy.act(parameters, observations)
    return PolicyOutput(distribution, distribution.new_zeros(distribution.shape[:2]))


def optimiser_of_epoch(stack: ParameterStack, epoch: int) -> Adam:
    """The optimiser of an epoch: that of all blocks or, with `personal.first`, first private then shared blocks'."""
    if not stack.phase_optimisers:
        return stack.adam
    private, shared = stack.phase_optimisers
    epochs = stack.scenario.objective.epochs
    private_epochs = min(max(1, round(stack.scenario.personal.first * epochs)), epochs - 1)
    return private if epoch < private_epochs else shared


def complete_gradient(stack: ParameterStack, weight: Tensor | None) -> None:
    """Add the gradient of 1/2 w (x - anchor)^2 with weight w [P] (1812.06127, equation 2); None adds nothing.

    Parameters that do not learn get a gradient of exactly 0, with which Adam leaves every bit of them as it is.
    """
    if weight is not None:
        stack.gradient.addcmul_(weight, stack.parameters - stack.anchor)
    if stack.frozen is not None:
        stack.gradient.index_fill_(1, stack.frozen, 0.0)


def proximal_value(stack: ParameterStack) -> Tensor | float:
    """The value of 1/2 w (x - anchor)^2, [K], or 0 without a weight."""
    if stack.proximal_weight is None:
        return 0.0
    return 0.5 * (stack.proximal_weight * (stack.parameters - stack.anchor).square()).sum(1)


def clip_gradient(gradient: Tensor, max_norm: float, columns: Tensor | None = None) -> Tensor:
    """Scale each client's gradient [K, P] in place to a norm of at most `max_norm`, measured over these columns.

    Gives the factors, [K, 1].
    """
    norm = torch.linalg.vector_norm(gradient if columns is None else gradient[:, columns], dim=1, keepdim=True)
    factors: Tensor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
    gradient.mul_(factors)
    return factors


def penalise_after_adam(
    stack: ParameterStack, adam: Adam, learning_rate: np.ndarray, left: Tensor | float, active: Tensor | None
) -> None:
    """Take the group penalty's proximal step after a step of Adam, in the metric that `penalty.step` says.

    left: [K, 1] or 1, the part of the gradient that clipping left. The penalty has to keep its proportion to the loss,
    so that no clipping moves the minimum; shorter steps do the same as a smaller weight.
    """
    if not stack.penalises:
        return
    if stack.scenario.penalty.step == "decoupled":
        apply_group_penalty(stack, learning_rate, active, adam.columns)
        return
    anchor = stack.anchor if stack.scenario.penalty.toward == "shared" else None
    steps = adam.step_lengths(learning_rate) * left
    shrunk = penalty.preconditioned_proximal(
        stack.parameters, anchor, stack.scenario.penalty, stack.groups, steps, stack.penalty
    )
    put_in_place(stack, shrunk, active, adam.columns)


def apply_group_penalty(
    stack: ParameterStack, learning_rate: np.ndarray, active: Tensor | None, columns: Tensor | None = None
) -> None:
    """Take the group penalty's proximal step with the learning rate [K, 1] as length, decoupled from the optimiser."""
    if not stack.penalises:
        return
    anchor = stack.anchor if stack.scenario.penalty.toward == "shared" else None
    length = per_client(learning_rate, stack.parameters)
    shrunk = penalty.proximal(stack.parameters, anchor, stack.scenario.penalty, stack.groups, length, stack.penalty)
    put_in_place(stack, shrunk, active, columns)


def put_in_place(stack: ParameterStack, shrunk: Tensor, active: Tensor | None, columns: Tensor | None) -> None:
    """Give the active clients these parameters [K, P]; only these columns, None for all."""
    if columns is not None:
        shrunk = stack.parameters.clone().index_copy_(1, columns, shrunk.index_select(1, columns))
    stack.parameters.copy_(shrunk if active is None else torch.where(active[:, None], shrunk, stack.parameters))


def measure_penalty(stack: ParameterStack) -> list[dict[str, float]]:
    """The metrics of each client's group penalty; empty ones without a penalty."""
    if not stack.penalises:
        return [{} for _ in stack.seeds]
    settings = stack.scenario.penalty
    anchor = stack.anchor if settings.toward == "shared" else None
    metrics = penalty.penalty_metrics(stack.parameters, anchor, settings, stack.groups, stack.penalty)
    rows: list[list[float]] = torch.stack([values.double() for values in metrics.values()], 1).tolist()
    return [dict(zip(metrics, row, strict=True)) for row in rows]


def current_coefficients(stack: ParameterStack, progress: np.ndarray) -> Coefficients:
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
    """The part of its first value that a schedule has at `progress` [K], 0 to 1: [K, 1]."""
    if kind == "constant":
        return np.ones((len(progress), 1))
    left = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + np.cos(np.pi * progress))
    return np.asarray(left[:, None])


def weighted_kl(policy: StackedPolicy, part: Minibatch, distribution: Tensor, direction: Direction) -> Tensor:
    """Mean KL [K] over a minibatch's steps between its reference and these distributions [K, B, M]."""
    kl = objective.divergence(policy.distribution, part.distribution, distribution, direction)
    weights = part.weights / part.weights.sum(1, keepdim=True).clamp_min(1e-12)
    return (kl * weights).sum(1)
