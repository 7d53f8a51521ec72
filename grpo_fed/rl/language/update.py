"""One update of K clients' adapters from a batch of completions: Adam over epochs and minibatches.

It is `adam_update` (rl/update.py) for completions. What differs is where gradients come from: log-probabilities are
computed by a transformer, a part of the minibatch at a time, and the gradients of the parts add up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.rl import trust_region as trust
from grpo_fed.rl.advantages import normalise_advantages
from grpo_fed.rl.client_stack import ParameterStack
from grpo_fed.rl.inner_steps import InnerSteps
from grpo_fed.rl.language.batches import CompletionBatch
from grpo_fed.rl.language.model import LanguageModel, TokenRows
from grpo_fed.rl.language.objective import (
    CompletionPart,
    CompletionTargets,
    CompletionTerms,
    completion_loss,
    vocabulary_kl,
)
from grpo_fed.rl.objective import Coefficients, Direction
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.rl.update import (
    complete_gradient,
    current_coefficients,
    optimiser_of_epoch,
    scheduled,
    take_step,
)
from grpo_fed.scenario.settings import TrustSettings


@dataclass(frozen=True, eq=False)
class _Minibatch:
    """Some completions of each client with what they are learned with."""

    rows: TokenRows
    log_probs: Tensor
    """[K, B, C]: when the tokens were sampled."""
    advantages: Tensor
    """[K, B]."""
    weights: Tensor
    """[K, B, C]."""
    reference: Tensor | None
    """[K, B, C]: log-probabilities under the reference of the KL, where it is estimated on the tokens."""

    def take(self, index: Tensor, times: float) -> _Minibatch:
        """Completions of every client in an order of its own, [K, B] int64, with their weights multiplied."""
        wide = index.unsqueeze(-1).expand(-1, -1, self.log_probs.shape[2])
        return _Minibatch(
            self.rows.take(index).trimmed(),
            self.log_probs.gather(1, wide),
            self.advantages.gather(1, index),
            self.weights.gather(1, wide) * times,
            None if self.reference is None else self.reference.gather(1, wide),
        )

    def part(self, rows: slice) -> tuple[TokenRows, CompletionPart]:
        """A part of the completions of every client."""
        reference = None if self.reference is None else self.reference[:, rows]
        return self.rows.part(rows), CompletionPart(
            self.log_probs[:, rows], self.advantages[:, rows], self.weights[:, rows], reference
        )


def update_adapters(
    stack: ParameterStack,
    model: LanguageModel,
    batch: CompletionBatch,
    targets: CompletionTargets,
    numbers: np.ndarray,
    progress: np.ndarray,
) -> list[dict[str, float]]:
    """Move all clients by one batch; gives the losses of each, means over the minibatches of the last pass.

    numbers: [K], how many updates each client has made before: they name the random streams of the minibatches.
    progress: [K], progress of the run, 0 to 1, that schedules go by.
    """
    settings, region = stack.scenario.objective, stack.scenario.trust
    before = stack.parameters.clone()
    reference = reference_parameters(stack, before)
    of_tokens = None
    if _penalises(region) and region.estimate != "exact":
        is_old = region.reference == "old"
        of_tokens = batch.log_probs if is_old else model.all_log_probs(reference, batch.rows)
    whole = _Minibatch(batch.rows, batch.log_probs, targets.advantages, targets.weights, of_tokens)
    coefficients = current_coefficients(stack, progress)
    learning_rate = stack.learning_rate * scheduled(settings.schedule, progress)
    last_pass: deque[CompletionTerms] = deque(maxlen=settings.minibatches)
    stopped: list[tuple[Tensor, list[CompletionTerms]]] = []
    active: Tensor | None = None
    inner = InnerSteps()
    for number, part in enumerate(_minibatches(stack, whole, numbers)):
        adam = optimiser_of_epoch(stack, number // settings.minibatches)
        terms = add_gradients(stack, model, part, reference, coefficients)
        last_pass.append(terms)
        if region.stop is not None:
            within = terms.means()["approx_kl"] <= region.stop
            stopping = ~within if active is None else active & ~within
            if stopping.any():
                stopped.append((stopping, list(last_pass)))
                active = within if active is None else active & within
            if active is not None and not active.any():
                break
        complete_gradient(stack, stack.proximal_weight)
        take_step(stack, adam, learning_rate, active, inner)
    losses = _losses(list(last_pass), stopped)

    def measure_kl(parameters: Tensor) -> Tensor:
        return mean_token_kl(model, batch.rows, before, parameters, region.direction)

    if stack.budgets:
        shortened, _ = trust.shorten_to_budgets(measure_kl, before, stack.parameters, stack.budgets)
        stack.parameters.copy_(shortened)
    if stack.budgets or region.region == "adaptive":
        kl = measure_kl(stack.parameters)
        if region.region == "adaptive":
            stack.kl_coefficient.copy_(trust.adapt_coefficient(stack.kl_coefficient, kl, region.target))
        losses["kl"] = kl
    values = torch.stack(list(losses.values()), 1).tolist()
    return [dict(zip(losses, row, strict=True)) for row in values]


def reference_parameters(stack: ParameterStack, old: Tensor) -> Tensor | None:
    """The adapters that a penalised KL is measured from, [K, P]; None for the base alone, with which every run begins.

    old: [K, P], the policies that wrote the batch.
    """
    match stack.scenario.trust.reference:
        case "old":
            return old
        case "shared":
            return stack.anchor
        case "start":
            return None


def add_gradients(
    stack: ParameterStack,
    model: LanguageModel,
    minibatch: _Minibatch,
    reference: Tensor | None,
    coefficients: Coefficients,
) -> CompletionTerms:
    """Write the gradient of a minibatch's loss into the stack, and return the loss's terms.

    reference: see `reference_parameters`.
    """
    settings, region = stack.scenario.objective, stack.scenario.trust
    exact = _penalises(region) and region.estimate == "exact"
    stack.gradient.zero_()
    terms = []
    for rows in model.parts(minibatch.rows):
        tokens, part = minibatch.part(rows)
        leaf = stack.parameters.detach().clone().requires_grad_()
        distribution = None
        if exact or coefficients.has_entropy:
            distribution = model.distribution(leaf, tokens)
            log_probs = distribution.gather(-1, tokens.tokens.unsqueeze(-1)).squeeze(-1)
        else:
            log_probs = model.log_probs(leaf, tokens)
        if exact:
            with torch.no_grad():
                part = replace(part, reference_distribution=model.distribution(reference, tokens))
        loss, parts = completion_loss(log_probs, part, settings, region, coefficients, distribution)
        if not exact:  # computed for all clients of the stack where one needs it
            parts = replace(parts, entropy=parts.entropy.masked_fill(stack.entropy[:, 0] == 0, torch.nan))
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        stack.gradient.add_(gradient)
        terms.append(parts)
    return CompletionTerms.summed(terms)


@torch.no_grad()
def mean_token_kl(model: LanguageModel, rows: TokenRows, old: Tensor, new: Tensor, direction: Direction) -> Tensor:
    """The mean over each client's tokens of the exact KL between two policies, [K, P], [K, P] -> [K]."""
    total, count = old.new_zeros(len(old)), old.new_zeros(len(old))
    for chosen in model.parts(rows):
        part = rows.part(chosen)
        kl = vocabulary_kl(model.distribution(old, part), model.distribution(new, part), direction)
        total += kl.masked_fill(~part.valid, 0.0).sum((1, 2))
        count += part.valid.sum((1, 2))
    return total / count.clamp_min(1)


def _minibatches(stack: ParameterStack, whole: _Minibatch, numbers: np.ndarray) -> Iterator[_Minibatch]:
    """Make the passes over a batch in parts, every client's completions in an order of its own."""
    settings = stack.scenario.objective
    count, completions = settings.minibatches, whole.advantages.shape[1]

    def normalised(part: _Minibatch) -> _Minibatch:
        if settings.normalise_advantages != "minibatch":
            return part
        return replace(part, advantages=normalise_advantages(part.advantages, part.weights.sum(-1)))

    if count == 1:
        yield from [normalised(whole)] * settings.epochs
        return
    streams = [generator(seed, Purpose.SHUFFLE, int(number)) for seed, number in zip(stack.seeds, numbers, strict=True)]
    for _ in range(settings.epochs):
        orders = np.stack([stream.permutation(completions) for stream in streams])
        for order in np.array_split(orders, count, axis=1):
            index = torch.from_numpy(order).to(whole.advantages.device)
            yield normalised(whole.take(index, float(count)))


def _losses(
    last_pass: Sequence[CompletionTerms], stopped: Sequence[tuple[Tensor, list[CompletionTerms]]]
) -> dict[str, Tensor]:
    """Means over minibatches, [K] by name; a client that stopped early has the losses that it stopped with."""

    def mean(passes: Sequence[CompletionTerms]) -> dict[str, Tensor]:
        by_part = [terms.means() for terms in passes]
        return {name: torch.stack([part[name] for part in by_part]).mean(0) for name in by_part[0]}

    losses = mean(last_pass)
    for clients, passes in stopped:
        theirs = mean(passes)
        losses = {name: torch.where(clients, theirs[name], value) for name, value in losses.items()}
    return losses


def _penalises(region: TrustSettings) -> bool:
    return region.region in ("penalty", "adaptive")
