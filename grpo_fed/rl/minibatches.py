"""A batch packed into one tensor, so that shuffling it is a single gather for all clients.

K clients, T steps of N copies, S = T * N steps, F columns, M distribution parameters, W steps of a minibatch.
"""

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
    """All steps of a batch with everything that the objective needs."""

    packed: Tensor
    """[K, S, F]: the fields of a Minibatch side by side."""
    sizes: tuple[int, ...]
    """Number of columns of each field, in the order of `_split`."""
    valid: np.ndarray | None
    """[K, S] bool, or None where all steps are."""
    pictures: Tensor | None = None
    """[K, S, D] uint8: observations that are pictures, apart from the floats; else None."""
    horizon: int = 0
    """T, where steps come sequence by sequence and minibatches consist of these; 0 where the order does not matter."""

    @classmethod
    def of(
        cls,
        batch: Batch,
        targets: LearningTargets,
        reference: Tensor | None,
        episodes: bool = False,
        sequences: bool = False,
    ) -> PackedBatch:
        """Pack a batch.

        reference: [K, S, M], parameters of the distributions that the KL is measured from; None where it is not.
        episodes: whether minibatches tell which episode a step belongs to.
        sequences: whether minibatches consist of whole sequences, the T steps of a copy each.
        """
        clients, steps = batch.values.shape[0], batch.values[0].numel()
        scalars = [batch.log_probs, targets.advantages, targets.returns, batch.values, targets.weights]
        observations = batch.observations.reshape(clients, steps, -1)
        pictures = observations if observations.dtype == torch.uint8 else None
        fields = [observations] if pictures is None else [batch.rewards.new_zeros(clients, steps, 0)]
        fields.append(batch.actions.reshape(clients, steps, -1))
        fields.extend([] if reference is None else [reference])
        fields.extend([batch.episodes.reshape(clients, steps, 1).to(batch.rewards.dtype)] if episodes else [])
        fields.append(torch.stack([scalar.reshape(clients, steps) for scalar in scalars], -1))
        parameters = 0 if reference is None else reference.shape[-1]
        sizes = (fields[0].shape[-1], fields[1].shape[-1], parameters, int(episodes), *[1] * 5)
        valid = None if bool(batch.valid.all()) else batch.valid.reshape(clients, steps).cpu().numpy()
        packed = torch.cat(fields, -1)
        if not sequences:
            return cls(packed, sizes, valid, pictures)
        assert pictures is None, "a network for pictures has no memory"
        _, horizon, copies = batch.values.shape
        packed = packed.view(clients, horizon, copies, -1).transpose(1, 2).reshape(clients, steps, -1)
        return cls(packed, sizes, None, horizon=horizon)

    @property
    def whole(self) -> Minibatch:
        """All steps as one minibatch."""
        return self._split(self.packed, self.pictures)

    def minibatches(self, seeds: Sequence[int], numbers: np.ndarray, epochs: int, count: int) -> Iterator[Minibatch]:
        """Make `epochs` passes in `count` parts, every client's steps in an order of its own.

        seeds, numbers: [K] each, name the random streams of the orders.
        """
        if count == 1 and self.valid is None:
            yield from [self.whole] * epochs
            return
        generators = [generator(seed, Purpose.SHUFFLE, int(n)) for seed, n in zip(seeds, numbers, strict=True)]
        clients, steps, fields = self.packed.shape
        offsets = np.arange(clients)[:, None, None] * steps
        for _ in range(epochs):
            order, is_step = self._order(generators, count)
            index = torch.from_numpy((order + offsets).reshape(-1)).to(self.packed.device)
            rows = self.packed.view(clients * steps, fields).index_select(0, index)
            rows = rows.view(clients, count, -1, fields)
            rows[..., -1] *= float(count) if is_step is None else torch.from_numpy(is_step * count).to(rows)
            index = index.view(clients, count, -1)
            for part in range(count):
                yield self._split(rows[:, part], self._pictures_at(index[:, part]))

    def _order(self, generators: Sequence[np.random.Generator], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The steps of each part, [K, count, W], and a mask, 0 for padding, or None where there is none."""
        steps = self.packed.shape[1]
        if self.horizon:
            return self._order_sequences(generators, count)
        if self.valid is None and steps % count == 0:
            return np.stack([rng.permutation(steps) for rng in generators]).reshape(len(generators), count, -1), None
        parts = []
        for client, rng in enumerate(generators):
            valid = np.arange(steps) if self.valid is None else np.flatnonzero(self.valid[client])
            parts.append(np.array_split(rng.permutation(valid), count))
        return _pad(parts, count)

    def _order_sequences(
        self, generators: Sequence[np.random.Generator], count: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The same with whole sequences; steps that must not be learned from have no weight anyway."""
        copies = self.packed.shape[1] // self.horizon
        parts = [np.array_split(rng.permutation(copies), count) for rng in generators]
        order, is_sequence = _pad(parts, count)
        steps = (order[..., None] * self.horizon + np.arange(self.horizon)).reshape(*order.shape[:2], -1)
        return steps, None if copies % count == 0 else is_sequence.repeat(self.horizon, axis=-1)

    def _pictures_at(self, index: Tensor) -> Tensor | None:
        """Gather pictures, [K, W] of all clients' steps -> [K, W, D]; None without pictures."""
        return None if self.pictures is None else self.pictures.flatten(0, 1)[index]

    def _split(self, rows: Tensor, pictures: Tensor | None) -> Minibatch:
        numbers, actions, distribution, number, *scalars = rows.split(self.sizes, -1)
        log_probs, advantages, returns, values, weights = (scalar.squeeze(-1) for scalar in scalars)
        episodes = number.squeeze(-1).long() if number.shape[-1] else None
        observations = numbers if pictures is None else pictures
        if self.horizon:
            observations = observations.unflatten(1, (-1, self.horizon))
        return Minibatch(observations, actions, log_probs, distribution, advantages, returns, values, weights, episodes)


def _pad(parts: Sequence[Sequence[np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad the parts of each client to one length, [K, count, W], and give a mask, 0 for padding."""
    shape = len(parts), count, max(len(part) for of_client in parts for part in of_client)
    order, is_real = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for client, of_client in enumerate(parts):
        for number, part in enumerate(of_client):
            order[client, number, : len(part)] = part
            is_real[client, number, : len(part)] = 1.0
    return order, is_real
