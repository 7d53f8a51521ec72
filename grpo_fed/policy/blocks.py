"""A policy's parameters as named blocks: the columns of one flat tensor, [K, P] for the K clients of a fleet.

Every block is one slice of the columns and every tensor one slice inside its block, so a block is read, sent or
replaced as `flat[:, block.start:block.stop]`, and a network works on views of the same memory. Tensors stand in the
order in which their module names them, except that those of one block stand together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from grpo_fed.policy.patterns import match_names
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.scenario.toml.text import short_toml, suggest_name, toml_key

SINGLE_BLOCK_MODULES = ("critic", "adapter")
"""Modules that are one block each with all that is inside them."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the policy lies."""

    name: str
    """As in `module.named_parameters()`."""
    shape: tuple[int, ...]
    """Of one client's tensor."""
    start: int
    """Its first column."""
    stop: int
    """The column after its last."""
    block: str
    """Name of the block it belongs to."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def module(self) -> str:
        """Path of the module that has the parameter; empty for the outermost."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """Tensors that are shared, measured and limited together."""

    name: str
    start: int
    stop: int
    shared: bool
    """Whether clients share it, or each keeps its own."""
    slots: tuple[Slot, ...]
    """Its tensors, in the order of their columns."""

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Where every parameter of a policy lies among the P columns."""

    slots: tuple[Slot, ...]
    """In the order of their columns, without gaps."""
    blocks: tuple[Block, ...]
    """In the order of their columns, without gaps."""
    size: int
    """P."""

    @staticmethod
    def from_shapes(named: Iterable[tuple[str, Sequence[int]]] | nn.Module, settings: PolicySettings) -> Layout:
        """Cut a module, or named shapes, into blocks: first as the modules are, then regrouped by `policy.blocks`."""
        pairs = list(_of_module(named) if isinstance(named, nn.Module) else named)
        shapes = {name: tuple(shape) for name, shape in pairs}
        if not shapes:
            raise ValueError("policy.module: it has no parameters; there is nothing to learn")
        if len(shapes) < len(pairs):
            twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
            raise ValueError(f"policy.module: parameters {short_toml(twice)} are named twice; give each its own name")
        block_of = _regrouped({name: _own_block(name) for name in shapes}, settings.blocks)
        shared = _shared(tuple(dict.fromkeys(block_of.values())), settings)
        blocks: list[Block] = []
        for block in dict.fromkeys(block_of.values()):
            start = blocks[-1].stop if blocks else 0
            slots = tuple(_slots([(name, shapes[name]) for name in shapes if block_of[name] == block], start, block))
            blocks.append(Block(block, start, slots[-1].stop, block in shared, slots))
        return Layout(tuple(slot for block in blocks for slot in block.slots), tuple(blocks), blocks[-1].stop)

    @property
    def shared(self) -> tuple[Block, ...]:
        """The blocks that clients share."""
        return tuple(block for block in self.blocks if block.shared)

    def select(self, patterns: Iterable[str], knob: str = "blocks") -> tuple[Block, ...]:
        """The blocks whose names fit a pattern, in the layout's order; errors say that the patterns stand at `knob`."""
        names = [block.name for block in self.blocks]
        taken = {name for pattern in patterns for name in match_names(pattern, names, knob, "block")}
        return tuple(block for block in self.blocks if block.name in taken)

    def subset(self, blocks: Iterable[Block]) -> Layout:
        """The layout of some of the blocks alone, in their order, with columns of its own."""
        parts: list[Block] = []
        for block in blocks:
            start = parts[-1].stop if parts else 0
            slots = tuple(_slots([(slot.name, slot.shape) for slot in block.slots], start, block.name))
            parts.append(Block(block.name, start, start + block.size, block.shared, slots))
        return Layout(
            tuple(slot for part in parts for slot in part.slots), tuple(parts), parts[-1].stop if parts else 0
        )

    def mask(self, blocks: Iterable[Block]) -> Tensor:
        """[P] bool: the columns of these blocks."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for block in blocks:
            mask[block.start : block.stop] = True
        return mask

    @overload
    def views(self, flat: Tensor) -> dict[str, Tensor]: ...

    @overload
    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]: ...

    def views(self, flat: Tensor | np.ndarray) -> dict[str, Tensor] | dict[str, np.ndarray]:
        """[K, P] -> every tensor by name, [K, *shape], in the same memory; without the K if `flat` has none."""
        lead = tuple(flat.shape[:-1])
        if isinstance(flat, np.ndarray):
            return {slot.name: flat[..., slot.start : slot.stop].reshape(lead + slot.shape) for slot in self.slots}
        # One split, not a slice for each tensor: its gradient is one concatenation, theirs would be a sum of [K, P].
        parts = flat.split_with_sizes([slot.size for slot in self.slots], dim=-1)
        return {slot.name: part.view(lead + slot.shape) for slot, part in zip(self.slots, parts, strict=True)}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Every tensor by name, [K, *shape] -> [K, P] in memory of its own; without the K if the tensors have none."""
        self._check(values)
        parts = []
        for slot in self.slots:
            value = values[slot.name]
            lead = value.shape[: value.ndim - len(slot.shape)]
            if value.shape[len(lead) :] != slot.shape:
                raise ValueError(f"{slot.name}: shape {tuple(value.shape)} where the policy has {slot.shape}")
            parts.append(value.reshape(*lead, slot.size))
        return torch.cat(parts, dim=-1)

    def stack(self, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The parameters of K policies by name, `dict(module.named_parameters())` or a state dict each -> [K, P]."""
        for state in states:
            self._check(state)
        for slot, value in ((slot, state[slot.name]) for state in states for slot in self.slots):
            if value.shape != slot.shape or value.dtype != torch.float32:
                raise ValueError(
                    f"{slot.name}: {_show_type(value.dtype)} of shape {tuple(value.shape)} where the policy has float32"
                    f" of shape {slot.shape}"
                )
        return torch.stack([self.flatten(state).detach() for state in states])

    def unstack(self, flat: Tensor) -> list[dict[str, Tensor]]:
        """[K, P] -> for each client every tensor by name, [*shape], in memory of its own."""
        return [{name: view.clone() for name, view in self.views(row).items()} for row in flat.detach()]

    def _check(self, values: Mapping[str, Tensor]) -> None:
        """Exactly the layout's names, no fewer and no others."""
        names = [slot.name for slot in self.slots]
        for name in values:
            if name not in names:
                raise ValueError(f"{name}: not a parameter of this policy{suggest_name(name, names)}")
        for name in names:
            if name not in values:
                raise ValueError(f"{name}: missing; a policy needs all of {short_toml(names)}")


def _of_module(module: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"policy.module: {name} has no shape yet; pass an input through the module when it is built"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"policy.module: {name} is {_show_type(parameter.dtype)}; make it float32 by module.float()"
            )
        yield name, parameter.shape


def _own_block(parameter: str) -> str:
    """The block of a parameter that `policy.blocks` does not speak of: its module, or itself where it has none."""
    root = parameter.split(".")[0]
    return root if root in SINGLE_BLOCK_MODULES else parameter.rpartition(".")[0] or parameter


def _regrouped(own: dict[str, str], blocks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The block of each parameter, from its own one and the patterns of `policy.blocks`."""
    taker: dict[str, str] = {}
    for block, patterns in blocks.items():
        knob = _knob(block)
        for pattern in patterns:
            fits = match_names(pattern, [*own, *own.values()], knob, "parameter")
            for name in (name for name in own if name in fits or own[name] in fits):
                other = taker.setdefault(name, block)
                if other != block:
                    raise ValueError(
                        f"{knob}: {short_toml(pattern)} takes {name}, which {_knob(other)} takes too; a parameter"
                        " belongs to one block: narrow one of the patterns"
                    )
    for name, block in own.items():
        if name not in taker and block in blocks:
            raise ValueError(
                f"{_knob(block)}: {name} is in a block of this name already; choose another name, or take all of that"
                f" block with the pattern {short_toml(block)}"
            )
    return own | taker


def _knob(block: str) -> str:
    return f"policy.blocks.{toml_key(block)}"


def _shared(blocks: Sequence[str], settings: PolicySettings) -> set[str]:
    """The names of the shared blocks. Only patterns that somebody wrote must take one: no torso is no mistake."""
    if settings.shared == PolicySettings().shared:
        return {block for block in blocks for pattern in settings.shared if fnmatchcase(block, pattern)}
    return {block for pattern in settings.shared for block in match_names(pattern, blocks, "policy.shared", "block")}


def _slots(shapes: Iterable[tuple[str, tuple[int, ...]]], start: int, block: str) -> Iterator[Slot]:
    for name, shape in shapes:
        stop = start + math.prod(shape)
        yield Slot(name, shape, start, stop, block)
        start = stop


def _show_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
