"""A judged batch packed into one tensor, so that shuffling it is a single gather for all clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.records import Batch, Minibatch
from grpo_fed.rl.rng import Purpose, generator


@dataclass(frozen=True)
class PackedBatch:
    """All steps of a batch with what the objective needs."""

    packed: Tensor
    """[K, S, F]: the fields of a Minibatch side by side, S = T * N."""
    sizes: tuple[int, ...]
    """Columns of each field, in the order of `_split`."""
    valid: np.ndarray | None
    """[K, S] bool, or None where all steps are."""

    @classmethod
    def of(cls, batch: Batch, judged: LearningTargets, reference: Tensor | None) -> PackedBatch:
        """`reference` [K, S, M]: parameters of the distributions that the KL is measured from, where it is needed."""
        clients, steps = batch.values.shape[0], batch.values[0].numel()
        scalars = [batch.log_probs, judged.advantages, judged.returns, batch.values, judged.weights]
        fields = [batch.observations.reshape(clients, steps, -1), batch.actions.reshape(clients, steps, -1)]
        fields.extend([] if reference is None else [reference])
        fields.append(torch.stack([scalar.reshape(clients, steps) for scalar in scalars], -1))
        sizes = (fields[0].shape[-1], fields[1].shape[-1], 0 if reference is None else reference.shape[-1], *[1] * 5)
        valid = None if bool(batch.valid.all()) else batch.valid.reshape(clients, steps).cpu().numpy()
        return cls(torch.cat(fields, -1), sizes, valid)

    @property
    def whole(self) -> Minibatch:
        """All steps at once."""
        return self._split(self.packed)

    def minibatches(self, seeds: Sequence[int], numbers: np.ndarray, epochs: int, count: int) -> Iterator[Minibatch]:
        """`epochs` passes in `count` parts, each client's in its own order: the `numbers`-th [K] of its stream."""
        if count == 1 and self.valid is None:
            yield from [self.whole] * epochs
            return
        generators = [generator(seed, Purpose.SHUFFLE, int(n)) for seed, n in zip(seeds, numbers, strict=True)]
        clients, steps, fields = self.packed.shape
        offsets = np.arange(clients)[:, None, None] * steps
        for _ in range(epochs):
            order, padded = self._order(generators, count)
            index = torch.from_numpy((order + offsets).reshape(-1)).to(self.packed.device)
            rows = self.packed.view(clients * steps, fields).index_select(0, index)
            rows = rows.view(clients, count, -1, fields)
            rows[..., -1] *= float(count) if padded is None else torch.from_numpy(padded * count).to(rows)
            for part in range(count):
                yield self._split(rows[:, part])

    def _order(self, generators: Sequence[np.random.Generator], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Steps of each part, [K, count, W], and 0 where a place only pads, [K, count, W], or None where none does."""
        steps = self.packed.shape[1]
        if self.valid is None and steps % count == 0:
            return np.stack([rng.permutation(steps) for rng in generators]).reshape(len(generators), count, -1), None
        chosen = []
        for client, rng in enumerate(generators):
            mine = np.arange(steps) if self.valid is None else np.flatnonzero(self.valid[client])
            chosen.append(np.array_split(rng.permutation(mine), count))
        width = max(len(part) for parts in chosen for part in parts)
        order, real = np.zeros((len(chosen), count, width), np.int64), np.zeros((len(chosen), count, width), np.float32)
        for client, parts in enumerate(chosen):
            for number, part in enumerate(parts):
                order[client, number, : len(part)] = part
                real[client, number, : len(part)] = 1.0
        return order, real

    def _split(self, rows: Tensor) -> Minibatch:
        observations, actions, distribution, *scalars = rows.split(self.sizes, -1)
        log_probs, advantages, returns, values, weights = (scalar.squeeze(-1) for scalar in scalars)
        return Minibatch(observations, actions, log_probs, distribution, advantages, returns, values, weights)
