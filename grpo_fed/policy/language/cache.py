"""Cache: the keys and values of tokens that have been computed, so that the next token costs one token."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values of each layer for K * B sequences of up to `length` tokens.

    It is filled by `Transformer.hidden`, without gradients.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        """The most tokens of a sequence."""
        self.filled = 0
        """Tokens of each sequence so far, with padding."""
        self._keys: dict[int, Tensor] = {}
        """By layer, [K * B, kv_heads, length, head_width]."""
        self._values: dict[int, Tensor] = {}
        self._seen: Tensor | None = None
        """[K * B, length] bool, which tokens are valid; None where all are."""

    def repeat(self, groups: int, length: int) -> Cache:
        """Return a cache for `length` tokens in which each sequence is followed by its copies, `groups` in all."""
        copy = Cache(length)
        copy.filled = self.filled
        for source, target in ((self._keys, copy._keys), (self._values, copy._values)):
            for layer, old in source.items():
                rows, heads, _, width = old.shape
                new = old.new_empty(rows, groups, heads, length, width)
                new[:, :, :, : self.filled] = old[:, None, :, : self.filled]
                target[layer] = new.flatten(0, 1)
        if self._seen is not None:
            seen = self._seen.new_ones(len(self._seen), groups, length)
            seen[:, :, : self.filled] = self._seen[:, None, : self.filled]
            copy._seen = seen.flatten(0, 1)
        return copy

    def see(self, rows: int, length: int, valid: Tensor | None) -> Tensor | None:
        """Note which of the next tokens are valid, and return it for all so far, [K * B, S]; None where all are.

        valid: [K * B, T]; None for all.
        """
        if self.filled + length > self.length:
            raise ValueError(f"a cache for {self.length} tokens cannot hold {self.filled + length}")
        if valid is not None:
            if self._seen is None:
                self._seen = torch.ones(rows, self.length, dtype=torch.bool, device=valid.device)
            self._seen[:, self.filled : self.filled + length] = valid
        return None if self._seen is None else self._seen[:, : self.filled + length]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [K * B, kv_heads, T, head_width] of a layer, and return all so far."""
        rows, heads, length, width = keys.shape
        if layer not in self._keys:
            self._keys[layer] = keys.new_empty(rows, heads, self.length, width)
            self._values[layer] = values.new_empty(rows, heads, self.length, width)
        stop = self.filled + length
        self._keys[layer][:, :, self.filled : stop] = keys
        self._values[layer][:, :, self.filled : stop] = values
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]

    def advance(self, length: int) -> None:
        """Count the tokens that have been added to all layers."""
        self.filled += length
