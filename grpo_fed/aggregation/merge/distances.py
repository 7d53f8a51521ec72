"""Distances of replies from a point, group by group, and from each other.

The columns of a parameter group are seldom scattered: a block is one run of columns, and the rows of a weight are runs
of equal length side by side. Such runs are summed as one matrix, in float32 but pairwise; scattered columns are added
up entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from grpo_fed.policy.groups import Groups

ENTRIES = 1 << 19
"""Numbers worked on at a time; they fit into the cache."""
SCATTERED = 32
"""With runs of more different lengths than this, adding up entry by entry is faster."""


def distances(points: Sequence[Tensor], centre: Tensor, groups: Groups) -> Tensor:
    """Compute each point's Euclidean distance from the centre in each group, K of [P], [P] -> [K, G] float64."""
    runs, size = _runs(groups), centre.numel()
    owners = torch.cat([run.groups for run in runs])
    sums = torch.zeros(len(points), len(groups.names) + 1, dtype=torch.float64, device=centre.device)
    rows = min(len(points), max(1, ENTRIES // max(1, size)))
    buffer = centre.new_empty(rows, size)
    for first in range(0, len(points), max(1, rows)):
        batch = points[first : first + rows]
        squares = buffer[: len(batch)]
        for row, point in zip(squares, batch, strict=True):
            torch.sub(point, centre, out=row).square_()
        by_run = [run.sums(squares) for run in runs]
        sums[first : first + len(batch)].index_add_(1, owners, torch.cat(by_run, 1).double())
    return sums[:, :-1].sqrt()


@lru_cache(maxsize=8)
def contiguous_groups(groups: Groups) -> tuple[slice, ...] | None:
    """Return the columns of each group if all groups follow each other and hold every column; else None."""
    sizes = groups.sizes.long()
    expected = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    if len(sizes) > SCATTERED or not torch.equal(groups.ids, expected):
        return None
    stops = sizes.cumsum(0).tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes.tolist(), stops, strict=True))


@dataclass(frozen=True, eq=False)
class ColumnRuns:
    """Runs of columns, equally long and side by side, each of them in one parameter group."""

    start: int
    """The first column."""
    length: int
    """The length of each run."""
    groups: Tensor
    """[n] int64: the group of each run; G, one past the last, for none."""

    def sums(self, values: Tensor) -> Tensor:
        """Sum values over each run, [K, P] -> [K, n]."""
        width = self.length * len(self.groups)
        part = values[:, self.start : self.start + width]
        return part if self.length == 1 else part.view(len(values), -1, self.length).sum(2)


def columns_of_groups(groups: Groups, wanted: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield groups of equal size together: their numbers [g] and their columns [g, n], int64 each."""
    order, sizes = _ordered(groups)
    starts = sizes.cumsum(0) - sizes
    chosen = torch.as_tensor(wanted, dtype=torch.int64, device=order.device)
    for size in sizes[chosen].unique().tolist():
        equal_sized = chosen[sizes[chosen] == size]
        yield equal_sized, order[starts[equal_sized, None] + torch.arange(size, device=order.device)]


def offsets(points: Sequence[Tensor], origin: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts [g, t] of columns [g, n], and the N points minus the origin [P] there, [g, N, t] float64."""
    width = max(1, ENTRIES // max(1, len(points) * len(columns)))
    for part in columns.split(width, 1):
        first, size = int(part[0, 0]), part.shape[1]
        if len(part) == 1 and int(part[0, -1]) - first == size - 1:  # one run, as blocks are: a slice is faster
            values = [point[first : first + size].unsqueeze(0) for point in points]
        else:
            values = [point[part] for point in points]
        yield part, torch.stack(values, 1).double().sub_(origin[part].unsqueeze(1))


def products(points: Sequence[Tensor], origin: Tensor, columns: Tensor) -> Tensor:
    """Compute inner products of the N points minus the origin, over columns [g, n] of g groups, [g, N, N] float64."""
    count = len(points)
    sums = torch.zeros(len(columns), count, count, dtype=torch.float64, device=origin.device)
    for _, offset in offsets(points, origin, columns):
        sums.baddbmm_(offset, offset.mT)
    return sums


def squared_distances(points: Sequence[Tensor], origin: Tensor, columns: Tensor) -> Tensor:
    """Compute squared distances of N points from each other over columns [n], [N, N] float64.

    origin: [P], a point near them, so that the difference of products keeps its digits.
    """
    product = products(points, origin, columns.unsqueeze(0))[0]
    squares = product.diagonal()
    return (squares + squares.unsqueeze(1) - 2 * product).clamp(min=0).fill_diagonal_(0.0)


@lru_cache(maxsize=8)
def _ordered(groups: Groups) -> tuple[Tensor, Tensor]:
    """Return all columns in the order of their groups, [P] int64, and the groups' sizes, [G] int64."""
    sizes = torch.bincount(groups.ids_or_last, minlength=len(groups.names) + 1)
    return groups.ids_or_last.argsort(stable=True), sizes[:-1]


@lru_cache(maxsize=8)
def _runs(groups: Groups) -> list[ColumnRuns]:
    """Divide all columns into runs. They are cached, as groups are the same in every round."""
    ids, size = groups.ids_or_last, groups.ids_or_last.numel()
    starts = _changes(ids)
    lengths = torch.diff(starts, append=starts.new_tensor([size]))
    firsts = _changes(lengths).tolist()
    if len(firsts) > SCATTERED:
        return [ColumnRuns(0, 1, ids)]
    return [
        ColumnRuns(int(starts[first]), int(lengths[first]), ids[starts[first:stop]])
        for first, stop in zip(firsts, [*firsts[1:], len(starts)], strict=True)
    ]


def _changes(values: Tensor) -> Tensor:
    """Return where values differ from the one before, and 0: [n] -> [m] int64."""
    different = torch.ones_like(values, dtype=torch.bool)
    different[1:] = values[1:] != values[:-1]
    return different.nonzero().squeeze(1)
