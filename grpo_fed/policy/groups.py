"""Cuts blocks into parameter groups: what a group penalty or a merge keeps or drops as one.

`policy.groups` says how each block is cut. Weights are [outputs, inputs, ...], as in `nn.Linear` and `nn.Conv2d`: a row
feeds one output, and one input feeds a column. A group's name is what a scenario would write: `torso.0.weight:rows[3]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_fed.policy.blocks import Block, Layout, Slot
from grpo_fed.policy.patterns import values_by_name
from grpo_fed.scenario.toml.text import short_toml, suggest_name, toml_key

GroupKind: TypeAlias = Literal["block", "tensor", "row", "column", "learned"]
IndexSets: TypeAlias = Mapping[str, Mapping[str, Sequence[int]]]
"""Named index sets: the set's name -> `<parameter>:rows`, `:columns` or `:entries` -> indices."""
NamedColumns: TypeAlias = tuple[str, np.ndarray]
"""A group's name, and its columns, [n] int64."""
Cutter: TypeAlias = Callable[[Block], Iterator[NamedColumns]]
"""Cuts a block into groups."""

PARTIAL_SUMS = 4
"""Partial sums of a group that are added up side by side: a single sum has to wait for its last addition."""
_NO_COLUMNS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups of P parameters. No parameter is in two groups; some may be in none."""

    names: tuple[str, ...]
    """[G]: the groups' names."""
    ids: Tensor
    """[P] int64: the group of each parameter, -1 for none."""
    sizes: Tensor
    """[G] float32: the number of parameters in each group, n_g; 1 or more."""
    blocks: tuple[str, ...]
    """[G]: the name of the block that each group lies in."""
    chains: tuple[str, ...] = ()
    """[G]: the name of the chain of layers that each group lies in; blocks of a chain follow each other from input to
    output. Empty if no two blocks are in an order."""
    learned: frozenset[str] = frozenset()
    """Names of the blocks whose groups are only units, of which a merge that remembers its clients makes groups."""

    def to(self, device: torch.device | str) -> Groups:
        """Copy the groups to a device."""
        return Groups(self.names, self.ids.to(device), self.sizes.to(device), self.blocks, self.chains, self.learned)

    @cached_property
    def as_blocks(self) -> Groups:
        """The same parameters grouped by block: all grouped parameters of a block are one group."""
        names = tuple(dict.fromkeys(self.blocks))
        ids = torch.cat([self.block_of_group, self.block_of_group.new_tensor([-1])])[self.ids_or_last]
        sizes = self.sizes.new_zeros(len(names)).index_add_(0, self.block_of_group, self.sizes)
        chain_of = dict(zip(self.blocks, self.chains, strict=bool(self.chains)))
        return Groups(names, ids, sizes, names, tuple(chain_of[name] for name in names) if self.chains else ())

    @cached_property
    def block_of_group(self) -> Tensor:
        """[G] int64: the group of `as_blocks` that each group lies in."""
        names = list(dict.fromkeys(self.blocks))
        return self.ids.new_tensor([names.index(block) for block in self.blocks])

    @cached_property
    def ungrouped(self) -> Tensor:
        """[P] bool: whether a parameter is in no group."""
        return self.ids < 0

    @cached_property
    def in_a_group(self) -> Tensor:
        """[P] float32: 1 for a parameter in a group, 0 for one in none."""
        return (~self.ungrouped).float()

    @cached_property
    def ids_or_last(self) -> Tensor:
        """[P] int64: the group of each parameter; G, one past the last group, for none."""
        return self.ids.masked_fill(self.ungrouped, len(self.names))

    @cached_property
    def sum_bins(self) -> Tensor:
        """[P] int64: the partial sum of (G + 1) * PARTIAL_SUMS that a parameter is added to; neighbours use others."""
        return self.ids_or_last * PARTIAL_SUMS + torch.arange(len(self.ids), device=self.ids.device) % PARTIAL_SUMS

    @cached_property
    def sqrt_sizes(self) -> Tensor:
        """[G] float64: sqrt(n_g), a group's weight in a penalty."""
        return self.sizes.double().sqrt()

    @cached_property
    def by_size(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The groups in sets whose sizes differ by less than a factor of 2: their numbers [g] and their columns [g, n].

        Rows of columns are filled up with P, one past the last column.
        """
        kinds = self.sizes.log2().floor().long().tolist()
        order = self.ids_or_last.argsort(stable=True)
        columns = order.split([*self.sizes.long().tolist(), int(self.ungrouped.sum())])[:-1]
        members = [[group for group, kind in enumerate(kinds) if kind == each] for each in sorted(set(kinds))]
        return tuple(
            (self.ids.new_tensor(each), pad_sequence([columns[group] for group in each], True, len(self.ids)))
            for each in members
        )

    def sums(self, values: Tensor) -> Tensor:
        """Add up each group's entries of [K, P], [K, G]."""
        clients, size = len(values), len(self.names) + 1
        sums = values.new_zeros(clients, size * PARTIAL_SUMS).index_add_(1, self.sum_bins, values)
        return sums.view(clients, size, PARTIAL_SUMS)[:, :-1].sum(2)

    def per_entry(self, values: Tensor, otherwise: float) -> Tensor:
        """Give every parameter the value of its group, [K, G] -> [K, P]; `otherwise` to those in no group."""
        padded = torch.cat([values, values.new_full((len(values), 1), otherwise)], 1)
        return padded.gather(1, self.ids_or_last.expand(len(values), -1))


def cut_groups(
    layout: Layout,
    settings: Mapping[str, GroupKind | IndexSets],
    default: GroupKind = "block",
    only: Iterable[Block] | None = None,
) -> Groups:
    """Cut the blocks of a layout into groups.

    - `block`, `tensor`: each block or tensor is a group.
    - `row`: a group is one output unit or action: row i of a weight with element i of the same module's bias (or
      log_std, ...). A tensor that is no weight and belongs to none is a group.
    - `column`: a group is one input or sensor: column i of a weight. A tensor that is no weight is a group.
    - `learned`: units of which the merge learns groups. A weight is cut into its rows or its columns, whichever are
      fewer and so have more parameters each, rows where they are as many; a row has its bias.
    - index sets: each set is a group; for each tensor, the entries that no set names are one more.

    settings: `policy.groups`, by pattern of blocks. default: for blocks that no pattern matches. only: the blocks to
    cut, all if None; the parameters of the others are in no group.

    Raises a ValueError where patterns or index sets do not fit the layout.
    """
    cutters = _cutters(layout, settings)
    chosen = {block.name for block in (layout.blocks if only is None else only)}
    ids = np.full(layout.size, -1, np.int64)
    blocks: dict[str, str] = {}
    learned: set[str] = set()
    for block in layout.blocks:
        cutter = cutters.get(block.name, _CUTTERS[default])
        if cutter is _cut_units:
            learned.add(block.name)
        for name, columns in cutter(block):
            if block.name not in chosen or not columns.size:
                continue
            if name in blocks:
                raise ValueError(f"policy.groups: two groups are called {short_toml(name)}; rename the index set")
            ids[columns] = len(blocks)
            blocks[name] = block.name
    sizes = np.bincount(ids[ids >= 0], minlength=len(blocks)).astype(np.float32)
    return Groups(
        names=tuple(blocks),
        ids=torch.from_numpy(ids),
        sizes=torch.from_numpy(sizes),
        blocks=tuple(blocks.values()),
        learned=frozenset(learned & set(blocks.values())),
    )


def _cutters(layout: Layout, settings: Mapping[str, GroupKind | IndexSets]) -> dict[str, Cutter]:
    """Return what cuts each block that a pattern of `policy.groups` matches, by the block's name."""
    names = [block.name for block in layout.blocks]
    pattern_of = values_by_name({pattern: pattern for pattern in settings}, names, "policy.groups", "block")
    cutters: dict[str, Cutter] = {}
    for pattern, kind in settings.items():
        blocks = [block for block in layout.blocks if pattern_of.get(block.name) == pattern]
        if isinstance(kind, str):
            cutters |= {block.name: _CUTTERS[kind] for block in blocks}
        else:
            sets = _sets_by_block(layout, blocks, kind, f"policy.groups.{toml_key(pattern)}")
            cutters |= {name: _index_set_cutter(some) for name, some in sets.items()}
    return cutters


def _sets_by_block(layout: Layout, blocks: Sequence[Block], sets: IndexSets, key: str) -> dict[str, list[NamedColumns]]:
    """Return the index sets that lie in each of the blocks, and refuse those that do not fit the layout."""
    slots = {slot.name: slot for block in blocks for slot in block.slots}
    by_block: dict[str, list[NamedColumns]] = {block.name: [] for block in blocks}
    set_of_column: dict[int, str] = {}
    for name, parts in sets.items():
        set_key = f"{key}.{toml_key(name)}"
        columns = [_columns_of_part(layout, slots, part, indices, set_key) for part, indices in parts.items()]
        members = np.unique(np.concatenate([_NO_COLUMNS, *columns]))
        if not members.size:
            raise ValueError(f"{set_key}: the set is empty; name some indices, or leave it out")
        reached = [block.name for block in blocks if ((members >= block.start) & (members < block.stop)).any()]
        if len(reached) > 1:
            raise ValueError(
                f"{set_key}: the set reaches over the blocks {short_toml(reached)}; give each block a set of its"
                " own, or make one block of them in policy.blocks"
            )
        for column in members.tolist():
            first = set_of_column.setdefault(column, name)
            if first != name:
                raise ValueError(
                    f"{set_key}: {_entry(slots.values(), column)} is in the set {short_toml(first)} too; a parameter"
                    " belongs to one group: take it out of one of them"
                )
        by_block[reached[0]].append((name, members))
    return by_block


def _columns_of_part(
    layout: Layout, slots: Mapping[str, Slot], part: str, indices: Sequence[int], key: str
) -> np.ndarray:
    """Return the columns [n] that the indices of `<parameter>:<axis>` stand for."""
    key = f"{key}.{toml_key(part)}"
    parameter, _, axis = part.rpartition(":")
    assert axis in ("rows", "columns", "entries"), "a scenario allows no other"
    if parameter not in slots:
        for slot in layout.slots:
            if slot.name == parameter:
                raise ValueError(f"{key}: {parameter} is in block {short_toml(slot.block)}; write the set there")
        raise ValueError(f"{key}: no parameter {short_toml(parameter)}{suggest_name(parameter, slots)}")
    slot = slots[parameter]
    columns = np.arange(slot.start, slot.stop).reshape(slot.shape)
    match axis:
        case "entries":
            columns = columns.reshape(-1)
        case "rows" if columns.ndim > 0:
            pass
        case "columns" if columns.ndim > 1:
            columns = columns.swapaxes(0, 1)
        case _:
            raise ValueError(f"{key}: {parameter} has shape {slot.shape} and no {axis}; write {parameter}:entries")
    out = [index for index in indices if not 0 <= index < len(columns)]
    if out:
        raise ValueError(f"{key}: {short_toml(out)} is out of range; {parameter} has {axis} 0 to {len(columns) - 1}")
    return columns[np.array(indices, np.int64)].reshape(-1)


def _entry(slots: Iterable[Slot], column: int) -> str:
    """Name a column by its parameter and its indices there: `torso.0.weight[3, 1]`."""
    slot = next(slot for slot in slots if slot.start <= column < slot.stop)
    indices = [int(index) for index in np.unravel_index(column - slot.start, slot.shape)]
    return f"{slot.name}{indices if indices else ''}"


def _index_set_cutter(sets: Sequence[NamedColumns]) -> Cutter:
    """Return what cuts a block into its index sets and, for each tensor, one group of the entries that no set names."""

    def cut(block: Block) -> Iterator[NamedColumns]:
        yield from sets
        in_sets = np.concatenate([_NO_COLUMNS, *(columns for _, columns in sets)])
        for name, columns in _cut_tensors(block):
            rest = np.setdiff1d(columns, in_sets)
            yield name if rest.size == columns.size else f"{name}:rest", rest

    return cut


def _cut_block(block: Block) -> Iterator[NamedColumns]:
    yield block.name, np.arange(block.start, block.stop)


def _cut_tensors(block: Block) -> Iterator[NamedColumns]:
    for slot in block.slots:
        yield slot.name, np.arange(slot.start, slot.stop)


def _cut_rows(block: Block) -> Iterator[NamedColumns]:
    beside = _vectors_of_rows(block)
    in_rows = {slot.name for slots in beside.values() for slot in slots}
    for slot in block.slots:
        if len(slot.shape) > 1:
            yield from _rows(slot, beside.get(slot.name, []))
        elif slot.name not in in_rows:
            yield slot.name, np.arange(slot.start, slot.stop)


def _cut_columns(block: Block) -> Iterator[NamedColumns]:
    for slot in block.slots:
        yield from _columns(slot)


def _cut_units(block: Block) -> Iterator[NamedColumns]:
    beside = _vectors_of_rows(block)
    by_rows = {slot.name for slot in block.slots if len(slot.shape) > 1 and slot.shape[0] <= slot.shape[1]}
    in_rows = {slot.name for weight in by_rows for slot in beside.get(weight, [])}
    for slot in block.slots:
        if slot.name in by_rows:
            yield from _rows(slot, beside.get(slot.name, []))
        elif slot.name not in in_rows:
            yield from _columns(slot)


def _vectors_of_rows(block: Block) -> dict[str, list[Slot]]:
    """Find the vectors with one element for each row of a weight, by the weight's name."""
    weights = [slot for slot in block.slots if len(slot.shape) > 1]
    beside: dict[str, list[Slot]] = {}
    for slot in block.slots:
        fits = [weight for weight in weights if weight.module == slot.module and weight.shape[:1] == slot.shape]
        if len(fits) == 1:  # with two such weights in a module the bias could be either's
            beside.setdefault(fits[0].name, []).append(slot)
    return beside


def _rows(weight: Slot, beside: Sequence[Slot]) -> Iterator[NamedColumns]:
    """Cut a weight into rows, each with its elements of the vectors beside it."""
    tensors = [weight, *beside]
    columns = [np.arange(t.start, t.stop).reshape(weight.shape[0], -1 if t.size else 0) for t in tensors]
    yield from ((f"{weight.name}:rows[{i}]", row) for i, row in enumerate(np.concatenate(columns, axis=1)))


def _columns(slot: Slot) -> Iterator[NamedColumns]:
    """Cut a weight into columns; a tensor that is no weight is left whole."""
    columns = np.arange(slot.start, slot.stop).reshape(slot.shape)
    if columns.ndim > 1:
        yield from ((f"{slot.name}:columns[{i}]", columns[:, i].reshape(-1)) for i in range(slot.shape[1]))
    else:
        yield slot.name, columns.reshape(-1)


_CUTTERS: dict[GroupKind, Cutter] = {
    "block": _cut_block,
    "tensor": _cut_tensors,
    "row": _cut_rows,
    "column": _cut_columns,
    "learned": _cut_units,
}
