"""Cuts a policy's parameters into named blocks of one flat tensor, [K, P] for K clients with equally shaped policies.

Every block is one slice of the P columns and every tensor one slice inside its block, so a block is read, sent or
replaced as `flat[:, block.start:block.stop]`, and a network works on views of the same memory. Tensors come in the
order in which their module names them, except that those of one block come together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from grpo_fed.policy.patterns import match_names, owner_by_name
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.scenario.toml.text import short_toml, suggest_name, toml_key

SINGLE_BLOCK_MODULES = ("critic", "adapter")
"""Modules that make one block each, with all modules inside them."""


@dataclass(frozen=True)
class Slot:
    """The columns of one parameter tensor of a policy."""

    name: str
    """The tensor's name, as `module.named_parameters()` gives it."""
    shape: tuple[int, ...]
    """The shape of one client's tensor."""
    start: int
    """The first column."""
    stop: int
    """The column after the last."""
    block: str
    """The name of the block that the tensor belongs to."""

    @property
    def size(self) -> int:
        """The number of columns."""
        return self.stop - self.start

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor; empty for the outermost module."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """Tensors that are shared, measured and limited together."""

    name: str
    start: int
    """The first column."""
    stop: int
    """The column after the last."""
    shared: bool
    """Whether clients share the block; a private one stays with each client."""
    slots: tuple[Slot, ...]
    """The block's tensors, in the order of their columns."""
    frozen: bool = False
    """Whether the block stays as it begins; a frozen one is private."""

    @property
    def size(self) -> int:
        """The number of columns."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Maps a policy's tensors and blocks to the P columns of its flat parameters."""

    slots: tuple[Slot, ...]
    """All tensors, in the order of their columns, without gaps."""
    blocks: tuple[Block, ...]
    """All blocks, in the order of their columns, without gaps."""
    size: int
    """P, the number of columns."""

    @staticmethod
    def from_shapes(
        named: Iterable[tuple[str, Sequence[int]]] | nn.Module,
        settings: PolicySettings,
        default_block: Callable[[str], str] | None = None,
    ) -> Layout:
        """Cut a module into blocks: one for each of its submodules, then as `policy.blocks` regroups them.

        named: a module, or the names and shapes of its parameters. default_block: returns the name of the block that a
        parameter lies in where `policy.blocks` names none; by default its submodule.

        Raises a ValueError where there are no parameters, two have one name, or patterns of the scenario do not fit.
        """
        pairs = list(_module_shapes(named) if isinstance(named, nn.Module) else named)
        shapes = {name: tuple(shape) for name, shape in pairs}
        if not shapes:
            raise ValueError("policy.module: it has no parameters; there is nothing to learn")
        if len(shapes) < len(pairs):
            twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
            raise ValueError(f"policy.module: parameters {short_toml(twice)} are named twice; give each its own name")
        block_of = _regroup({name: (default_block or _module_block)(name) for name in shapes}, settings.blocks)
        names = tuple(dict.fromkeys(block_of.values()))
        shared, frozen = _shared_names(names, settings), _frozen_names(names, settings)
        blocks: list[Block] = []
        for block in names:
            start = blocks[-1].stop if blocks else 0
            slots = tuple(_slots([(name, shapes[name]) for name in shapes if block_of[name] == block], start, block))
            is_frozen = block in frozen
            blocks.append(Block(block, start, slots[-1].stop, block in shared and not is_frozen, slots, is_frozen))
        return Layout(tuple(slot for block in blocks for slot in block.slots), tuple(blocks), blocks[-1].stop)

    @property
    def shared(self) -> tuple[Block, ...]:
        """The blocks that clients share."""
        return tuple(block for block in self.blocks if block.shared)

    @property
    def frozen(self) -> tuple[Slot, ...]:
        """The tensors that stay as they begin."""
        return tuple(slot for block in self.blocks if block.frozen for slot in block.slots)

    def select(self, patterns: Iterable[str], key: str = "blocks") -> tuple[Block, ...]:
        """Return the blocks whose names match a pattern, in the layout's order.

        key: where the scenario has the patterns, `penalty.blocks`.

        Raises a ValueError where a pattern matches no block.
        """
        names = [block.name for block in self.blocks]
        matches = {name for pattern in patterns for name in match_names(pattern, names, key, "block")}
        return tuple(block for block in self.blocks if block.name in matches)

    def subset(self, blocks: Iterable[Block]) -> Layout:
        """Return the layout of some of the blocks alone, in the order given, with columns from 0."""
        parts: list[Block] = []
        for block in blocks:
            start = parts[-1].stop if parts else 0
            slots = tuple(_slots([(slot.name, slot.shape) for slot in block.slots], start, block.name))
            parts.append(Block(block.name, start, start + block.size, block.shared, slots, block.frozen))
        return Layout(
            tuple(slot for part in parts for slot in part.slots), tuple(parts), parts[-1].stop if parts else 0
        )

    def mask(self, blocks: Iterable[Block]) -> Tensor:
        """Return which columns lie in these blocks, [P] bool."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for block in blocks:
            mask[block.start : block.stop] = True
        return mask

    @overload
    def views(self, flat: Tensor) -> dict[str, Tensor]: ...

    @overload
    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]: ...

    def views(self, flat: Tensor | np.ndarray) -> dict[str, Tensor] | dict[str, np.ndarray]:
        """View [K, P] as tensors by name, [K, *shape], in the same memory; without K if `flat` has none."""
        lead = tuple(flat.shape[:-1])
        if isinstance(flat, np.ndarray):
            return {slot.name: flat[..., slot.start : slot.stop].reshape(lead + slot.shape) for slot in self.slots}
        # One split, not a slice for each tensor: its gradient is one concatenation, theirs would be a sum of [K, P].
        parts = flat.split_with_sizes([slot.size for slot in self.slots], dim=-1)
        return {slot.name: part.view(lead + slot.shape) for slot, part in zip(self.slots, parts, strict=True)}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Copy tensors by name, [K, *shape], into flat parameters [K, P]; without K if the tensors have none.

        Raises a ValueError where names or shapes are not those of the layout.
        """
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
        """Copy the parameters of K policies into flat parameters [K, P].

        states: for each policy its tensors by name, `dict(module.named_parameters())` or a state dict.

        Raises a ValueError where names, shapes or types are not those of the layout.
        """
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
        """Copy flat parameters [K, P] into tensors by name, [*shape], for each of the K clients."""
        return [{name: view.clone() for name, view in self.views(row).items()} for row in flat.detach()]

    def _check(self, values: Mapping[str, Tensor]) -> None:
        """Check that the names are exactly those of the layout."""
        names = [slot.name for slot in self.slots]
        for name in values:
            if name not in names:
                raise ValueError(f"{name}: not a parameter of this policy{suggest_name(name, names)}")
        for name in names:
            if name not in values:
                raise ValueError(f"{name}: missing; a policy needs all of {short_toml(names)}")


def _module_shapes(module: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the name and shape of every parameter of a module, once it is checked that it can be stacked."""
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


def _module_block(parameter: str) -> str:
    """Return the block of a parameter by its module's name, or by its own where it has none."""
    root = parameter.split(".")[0]
    return root if root in SINGLE_BLOCK_MODULES else parameter.rpartition(".")[0] or parameter


def _regroup(default: Mapping[str, str], blocks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the block of each parameter, from its default block and the patterns of `policy.blocks`.

    A pattern matches a parameter by its own name or by that of its default block.
    """
    matches = {block: _match_parameters(default, block, patterns) for block, patterns in blocks.items()}
    block_of = owner_by_name(matches, "policy.blocks")
    for name, block in default.items():
        if name not in block_of and block in blocks:
            raise ValueError(
                f"{_key(block)}: {name} is in a block of this name already; choose another name, or take all of that"
                f" block with the pattern {short_toml(block)}"
            )
    return {**default, **block_of}


def _match_parameters(default: Mapping[str, str], block: str, patterns: Sequence[str]) -> list[str]:
    """Return the parameters that a block's patterns match."""
    names = [*default, *default.values()]
    matches = {name for pattern in patterns for name in match_names(pattern, names, _key(block), "parameter")}
    return [name for name in default if name in matches or default[name] in matches]


def _key(block: str) -> str:
    return f"policy.blocks.{toml_key(block)}"


def _shared_names(blocks: Sequence[str], settings: PolicySettings) -> set[str]:
    """Return the names of the shared blocks.

    The default patterns may match nothing, as a policy may have no torso; a pattern that a scenario writes must match.
    """
    if settings.shared == PolicySettings().shared:
        return {block for block in blocks for pattern in settings.shared if fnmatchcase(block, pattern)}
    return {block for pattern in settings.shared for block in match_names(pattern, blocks, "policy.shared", "block")}


def _frozen_names(blocks: Sequence[str], settings: PolicySettings) -> set[str]:
    """Return the names of the blocks that do not learn; ValueError if none is left that does."""
    frozen = {block for pattern in settings.freeze for block in match_names(pattern, blocks, "policy.freeze", "block")}
    if len(frozen) == len(blocks):
        raise ValueError(
            f"policy.freeze: {short_toml(settings.freeze)} leaves no block that learns; narrow the patterns"
        )
    return frozen


def _slots(shapes: Iterable[tuple[str, tuple[int, ...]]], start: int, block: str) -> Iterator[Slot]:
    """Yield the slots of a block's tensors side by side, from column `start` on."""
    for name, shape in shapes:
        stop = start + math.prod(shape)
        yield Slot(name, shape, start, stop, block)
        start = stop


def _show_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
