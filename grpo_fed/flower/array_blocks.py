"""Cuts the arrays of a Flower app into blocks: which of them clients share, and where they lie in one vector [S]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.blocks import Block, Layout, Slot
from grpo_fed.policy.groups import GroupKind, cut_groups
from grpo_fed.policy.patterns import match_names, owner_by_name
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.toml.text import short_toml, suggest_name

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""The arrays of an app's model by name, as `state_dict()` names them."""
SHAREABLE = (np.float16, np.float32)
"""The types of arrays that are merged, in float32; others, such as counters, stay with each client."""


def cut_array_blocks(
    arrays: Arrays,
    blocks: Mapping[str, Sequence[str]] | None = None,
    chains: Sequence[Sequence[str]] = (),
    groups: GroupKind = "block",
) -> SharedBlocks:
    """Cut arrays into shared blocks.

    blocks: for each shared block the patterns of its arrays' names; None for a block of each module, all shared.
    chains: blocks that follow each other from input to output. groups: what a client leaves as one.

    ValueError for patterns or chains that do not fit the arrays.
    """
    of_block = _module_blocks(arrays) if blocks is None else _match_blocks(arrays, blocks)
    parts: list[Block] = []
    for name, members in of_block.items():
        start = at = parts[-1].stop if parts else 0
        slots = []
        for member in members:
            shape = arrays[member].shape
            slots.append(Slot(member, shape, at, at + math.prod(shape), name))
            at = slots[-1].stop
        parts.append(Block(name, start, at, True, tuple(slots)))
    layout = Layout(tuple(slot for part in parts for slot in part.slots), tuple(parts), parts[-1].stop)
    cut = cut_groups(layout, {}, groups)
    chain_of = _chain_of_block(chains, list(of_block))
    cut = replace(cut, chains=tuple(chain_of.get(block, block) for block in cut.blocks))
    return SharedBlocks((), layout, cut, join_arrays(layout, arrays), 0)


def join_arrays(layout: Layout, arrays: Arrays) -> Tensor:
    """Copy the shared arrays into one vector, [S] float32; ValueError where one is missing, misshapen or not finite."""
    flat = np.empty(layout.size, np.float32)
    for slot in layout.slots:
        array = arrays.get(slot.name)
        if array is None:
            raise ValueError(f"no array {short_toml(slot.name)}{suggest_name(slot.name, list(arrays))}")
        if array.shape != slot.shape:
            raise ValueError(f"{slot.name} has shape {array.shape}; the server's has {slot.shape}")
        flat[slot.start : slot.stop] = array.reshape(-1)
    if not np.isfinite(flat).all():
        raise ValueError("an array is not finite")
    return torch.from_numpy(flat)


def fill_arrays(layout: Layout, arrays: Arrays, point: Tensor) -> dict[str, np.ndarray]:
    """Put a point [S] in the place of the shared arrays, in the types that they have; the others stay."""
    views = layout.views(point.numpy())
    return {name: views[name].astype(array.dtype) if name in views else array for name, array in arrays.items()}


def _module_blocks(arrays: Arrays) -> dict[str, list[str]]:
    """Put the arrays of each module into a block of its name."""
    blocks: dict[str, list[str]] = {}
    for name in arrays:
        if _is_shareable(name, arrays):
            blocks.setdefault(name.rpartition(".")[0] or name, []).append(name)
    if not blocks:
        raise ValueError("the model has no arrays of float32 that could be shared")
    return blocks


def _match_blocks(arrays: Arrays, blocks: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Find the arrays of each block by its patterns."""
    if not blocks:
        raise ValueError("blocks: is empty, so that nothing is shared; leave it out to share all arrays")
    matches: dict[str, list[str]] = {}
    for block, patterns in blocks.items():
        if isinstance(patterns, str):
            raise ValueError(f"blocks: {short_toml(block)} has one text; write a list of patterns, [{patterns!r}]")
        key = f"blocks.{block}"
        found = {name for pattern in patterns for name in match_names(pattern, list(arrays), key, "array")}
        matches[block] = [name for name in arrays if name in found and _is_shareable(name, arrays)]
        if not matches[block]:
            raise ValueError(f"{key}: none of its arrays is of float32, so none can be merged")
    owner_by_name(matches, "blocks")
    return matches


def _is_shareable(name: str, arrays: Arrays) -> bool:
    """Whether an array can be merged; ValueError for one of float64, which would lose half of its digits."""
    array = arrays[name]
    if array.dtype == np.float64:
        raise ValueError(f"{name} is float64, and merges are made in float32; convert the model, `module.float()`")
    return array.dtype.type in SHAREABLE and array.size > 0


def _chain_of_block(chains: Sequence[Sequence[str]], blocks: Sequence[str]) -> dict[str, str]:
    """Name the chain of each block that is in one: by its first block."""
    chain_of: dict[str, str] = {}
    for chain in chains:
        for block in chain:
            if block not in blocks:
                raise ValueError(f"chains: there is no block {short_toml(block)}{suggest_name(block, blocks)}")
            if block in chain_of:
                raise ValueError(f"chains: {short_toml(block)} is in two chains; a block follows one input")
            chain_of[block] = chain[0]
        if (order := [block for block in blocks if block in chain]) != list(chain):
            raise ValueError(f"chains: {short_toml(list(chain))} is not the order of blocks, {short_toml(order)}")
    return chain_of
