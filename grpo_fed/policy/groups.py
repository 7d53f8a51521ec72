"""Groups: the parameters that a group penalty keeps or drops as one, for each block as `policy.groups` says.

Weights are [outputs, inputs, ...], as in `nn.Linear` and `nn.Conv2d`: a row is what feeds one output, a column is what
one input feeds. Groups are named as one would name them in a scenario: `torso.0.weight:rows[3]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.blocks import Block, Layout, Slot
from grpo_fed.policy.patterns import match_names
from grpo_fed.scenario.toml.text import short_toml, suggest_name, toml_key

GroupKind: TypeAlias = Literal["block", "tensor", "row", "column"]
IndexSets: TypeAlias = Mapping[str, Mapping[str, Sequence[int]]]
"""Named index sets: name of the set -> `<parameter>:rows`, `:columns` or `:entries` -> indices."""
NamedColumns: TypeAlias = tuple[str, np.ndarray]
"""A group's name, and its columns of [K, P], [n] int64."""
Cutter: TypeAlias = Callable[[Block], Iterator[NamedColumns]]
"""How to cut a block into groups."""

PARTIAL_SUMS = 4
"""Sums that a group is added up in: a sum waits for its last addition, four side by side do not."""
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Groups:
    """Which of the P parameters belong together. No parameter is in two groups; some may be in none."""

    names: tuple[str, ...]
    """[G]."""
    ids: Tensor
    """[P] int64: the group of each parameter, -1 for none."""
    sizes: Tensor
    """[G] float32: how many parameters each group has; 1 or more."""
    blocks: tuple[str, ...]
    """[G]: the name of the block that each group lies in."""

    def to(self, device: torch.device | str) -> Groups:
        """The same groups for tensors on a device."""
        return Groups(self.names, self.ids.to(device), self.sizes.to(device), self.blocks)

    @cached_property
    def as_blocks(self) -> Groups:
        """Whole blocks around these groups, for the penalty `nested`: all that is grouped in a block is one group."""
        names = tuple(dict.fromkeys(self.blocks))
        ids = torch.cat([self.block_of_group, self.block_of_group.new_tensor([-1])])[self.ids_or_last]
        return Groups(
            names, ids, self.sizes.new_zeros(len(names)).index_add_(0, self.block_of_group, self.sizes), names
        )

    @cached_property
    def block_of_group(self) -> Tensor:
        """[G] int64: the group of `outer` that each group lies in."""
        names = list(dict.fromkeys(self.blocks))
        return self.ids.new_tensor([names.index(block) for block in self.blocks])

    @cached_property
    def ungrouped(self) -> Tensor:
        """[P] bool: in no group."""
        return self.ids < 0

    @cached_property
    def in_a_group(self) -> Tensor:
        """[P] float32: 1 in a group, 0 in none."""
        return (~self.ungrouped).float()

    @cached_property
    def ids_or_last(self) -> Tensor:
        """[P] int64: `ids` with G, one past the last group, instead of -1."""
        return self.ids.masked_fill(self.ungrouped, len(self.names))

    @cached_property
    def sum_bins(self) -> Tensor:
        """[P] int64: where a parameter is added up, of (G + 1) * LANES; neighbours in unlike lanes."""
        return self.ids_or_last * PARTIAL_SUMS + torch.arange(len(self.ids), device=self.ids.device) % PARTIAL_SUMS

    @cached_property
    def sqrt_sizes(self) -> Tensor:
        """[G] float64: sqrt(n_g), a group's weight."""
        return self.sizes.double().sqrt()


def cut_groups(
    layout: Layout,
    settings: Mapping[str, GroupKind | IndexSets],
    default: GroupKind = "block",
    only: Iterable[Block] | None = None,
) -> Groups:
    """The groups of the layout's blocks, or of `only` some; `settings` is `policy.groups`, by pattern of blocks.

    - `block`, `tensor`: each is a group.
    - `row`: one output unit or action: row i of a weight with element i of the same module's bias (or log_std, ...). A
      tensor that is no weight and fits none is a group.
    - `column`: one input or sensor: column i of a weight. A tensor that is no weight is a group.
    - index sets: each is a group; for each tensor, what no set names is one.
    """
    rules = _rules(layout, settings)
    chosen = {block.name for block in (layout.blocks if only is None else only)}
    ids = np.full(layout.size, -1, np.int64)
    found: dict[str, str] = {}
    for block in layout.blocks:
        for name, columns in rules.get(block.name, _KINDS[default])(block):
            if block.name not in chosen or not columns.size:
                continue
            if name in found:
                raise ValueError(f"policy.groups: two groups are called {short_toml(name)}; rename the index set")
            ids[columns] = len(found)
            found[name] = block.name
    sizes = np.bincount(ids[ids >= 0], minlength=len(found)).astype(np.float32)
    return Groups(tuple(found), torch.from_numpy(ids), torch.from_numpy(sizes), tuple(found.values()))


def _rules(layout: Layout, settings: Mapping[str, GroupKind | IndexSets]) -> dict[str, Cutter]:
    """How to cut each block that `settings` speak of, by the block's name."""
    taker: dict[str, str] = {}
    rules: dict[str, Cutter] = {}
    for pattern, kind in settings.items():
        knob = f"policy.groups.{toml_key(pattern)}"
        taken = match_names(pattern, [block.name for block in layout.blocks], "policy.groups", "block")
        for name in taken:
            if name in taker:
                other = f"policy.groups.{toml_key(taker[name])}"
                raise ValueError(f"{knob}: {other} takes {short_toml(name)} too; narrow one of the patterns")
            taker[name] = pattern
        blocks = [block for block in layout.blocks if block.name in taken]
        if isinstance(kind, str):
            rules |= dict.fromkeys(taken, _KINDS[kind])
        else:
            rules |= {name: _index_sets(sets) for name, sets in _read_sets(layout, blocks, kind, knob).items()}
    return rules


def _read_sets(layout: Layout, blocks: Sequence[Block], given: IndexSets, knob: str) -> dict[str, list[NamedColumns]]:
    """The index sets that lie in each of the blocks; every mistake a scenario can make with them is found here."""
    slots = {slot.name: slot for block in blocks for slot in block.slots}
    sets: dict[str, list[NamedColumns]] = {block.name: [] for block in blocks}
    owner: dict[int, str] = {}
    for name, parts in given.items():
        here = f"{knob}.{toml_key(name)}"
        columns = [_members(layout, slots, part, indices, here) for part, indices in parts.items()]
        members = np.unique(np.concatenate([_NONE, *columns]))
        if not members.size:
            raise ValueError(f"{here}: the set is empty; name some indices, or leave it out")
        homes = [block.name for block in blocks if ((members >= block.start) & (members < block.stop)).any()]
        if len(homes) > 1:
            raise ValueError(
                f"{here}: the set reaches over the blocks {short_toml(homes)}; give each block a set of its own, or"
                " make one block of them in policy.blocks"
            )
        for column in members.tolist():
            other = owner.setdefault(column, name)
            if other != name:
                raise ValueError(
                    f"{here}: {_entry(slots.values(), column)} is in the set {short_toml(other)} too; a parameter"
                    " belongs to one group: take it out of one of them"
                )
        sets[homes[0]].append((name, members))
    return sets


def _members(layout: Layout, slots: Mapping[str, Slot], part: str, indices: Sequence[int], knob: str) -> np.ndarray:
    """The columns [n] that indices of `<parameter>:<axis>` stand for."""
    knob = f"{knob}.{toml_key(part)}"
    parameter, _, axis = part.rpartition(":")
    assert axis in ("rows", "columns", "entries"), "a scenario allows no other"
    if parameter not in slots:
        for slot in layout.slots:
            if slot.name == parameter:
                raise ValueError(f"{knob}: {parameter} is in block {short_toml(slot.block)}; write the set there")
        raise ValueError(f"{knob}: no parameter {short_toml(parameter)}{suggest_name(parameter, slots)}")
    slot = slots[parameter]
    lies = np.arange(slot.start, slot.stop).reshape(slot.shape)
    match axis:
        case "entries":
            lies = lies.reshape(-1)
        case "rows" if lies.ndim > 0:
            pass
        case "columns" if lies.ndim > 1:
            lies = lies.swapaxes(0, 1)
        case _:
            raise ValueError(f"{knob}: {parameter} has shape {slot.shape} and no {axis}; write {parameter}:entries")
    out = [index for index in indices if not 0 <= index < len(lies)]
    if out:
        raise ValueError(f"{knob}: {short_toml(out)} is out of range; {parameter} has {axis} 0 to {len(lies) - 1}")
    return lies[np.array(indices, np.int64)].reshape(-1)


def _entry(slots: Iterable[Slot], column: int) -> str:
    """A column by its parameter's name and its indices there: `torso.0.weight[3, 1]`."""
    slot = next(slot for slot in slots if slot.start <= column < slot.stop)
    place = [int(index) for index in np.unravel_index(column - slot.start, slot.shape)]
    return f"{slot.name}{place if place else ''}"


def _index_sets(sets: Sequence[NamedColumns]) -> Cutter:
    """Index sets first, then one group for each tensor of what they leave."""

    def cut(block: Block) -> Iterator[NamedColumns]:
        yield from sets
        named = np.concatenate([_NONE, *(columns for _, columns in sets)])
        for name, columns in _tensors(block):
            rest = np.setdiff1d(columns, named)
            yield name if rest.size == columns.size else f"{name}:rest", rest

    return cut


def _whole(block: Block) -> Iterator[NamedColumns]:
    yield block.name, np.arange(block.start, block.stop)


def _tensors(block: Block) -> Iterator[NamedColumns]:
    for slot in block.slots:
        yield slot.name, np.arange(slot.start, slot.stop)


def _rows(block: Block) -> Iterator[NamedColumns]:
    weights = [slot for slot in block.slots if len(slot.shape) > 1]
    beside: dict[str, list[Slot]] = {}
    for slot in block.slots:
        fits = [weight for weight in weights if weight.module == slot.module and weight.shape[:1] == slot.shape]
        if len(fits) == 1:  # with two such weights in a module nobody can say whose bias it is
            beside.setdefault(fits[0].name, []).append(slot)
    placed = {slot.name for slots in beside.values() for slot in slots}
    for slot in block.slots:
        if len(slot.shape) > 1:
            together = [slot, *beside.get(slot.name, [])]
            lies = [np.arange(one.start, one.stop).reshape(slot.shape[0], -1 if one.size else 0) for one in together]
            yield from ((f"{slot.name}:rows[{i}]", row) for i, row in enumerate(np.concatenate(lies, axis=1)))
        elif slot.name not in placed:
            yield slot.name, np.arange(slot.start, slot.stop)


def _columns(block: Block) -> Iterator[NamedColumns]:
    for slot in block.slots:
        lies = np.arange(slot.start, slot.stop).reshape(slot.shape)
        if lies.ndim > 1:
            yield from ((f"{slot.name}:columns[{i}]", lies[:, i].reshape(-1)) for i in range(slot.shape[1]))
        else:
            yield slot.name, lies.reshape(-1)


_KINDS: dict[GroupKind, Cutter] = {"block": _whole, "tensor": _tensors, "row": _rows, "column": _columns}
