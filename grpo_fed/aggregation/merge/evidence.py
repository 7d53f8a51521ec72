"""What the server remembers of its clients' updates over the rounds, and what is systematic in them.

Each round gives every client and group a *unit update* e = (theta - s) / ||theta - s||, which has no scale: learning
rate, schedule and a client's own rate drop out. Over rounds r the server sums, for clients j and k,

    E_k = sum_r e_k(r)        A_jk = sum_r <e_j(r), e_k(r)>        C_jk = number of rounds that both took part in

    M_jk = (<E_j, E_k> - A_jk) / (N_j N_k - C_jk)    products of different rounds: what is systematic, unbiased
    V_jk = A_jk / C_jk                               products within a round: systematic and noise

with N_k = C_kk, a client's clock. Where rounds do not wait for all clients, s is what each client began with.

Clients are divided into panels of at most 128, and one is compared with the others of its panel alone. So memory grows
with the number of clients, not with its square; a mean of 127 others has hardly more noise than one of 999.

K clients of a panel, G groups, D numbers of a sketched update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge.records import Replies, Reply
from grpo_fed.policy.groups import Groups

PANEL = 128
"""Clients of a panel at most."""
LEAST_PANEL = 16
"""Clients of a panel at least, however many groups there are."""
PRODUCTS = 1 << 24
"""Products of pairs of clients that are kept, over all panels and groups, down to the least panel."""
LEAST_EVIDENCE = 400
"""Least evidence about a group: rounds x (rounds - 1) x its parameters. By chance rho has a standard deviation of about
sqrt(2 / evidence), so a group of few parameters takes more rounds."""
NUMBERS = 1 << 17
"""Numbers that the sketches of a group may take for all clients of a panel together."""
LEAST_NUMBERS = 256
"""Numbers of a group's sketch that there are always room for."""
FEW = 32
"""With more groups than this, norms are added up entry by entry."""
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Panel:
    """Clients that are compared with each other, and what is known of them."""

    clients: tuple[str, ...]
    """[K]: in the order of their names."""
    sums: Tensor
    """[K, D] float64: E, the sketched unit updates of all groups side by side."""
    products: Tensor
    """[G, K, K] float64: A."""
    common: Tensor
    """[K, K] int64: C; on the diagonal each client's clock, the rounds of it since its evidence began."""
    decisions: Tensor
    """[K] int64: how often a client has left something, come back, or was asked and stayed: each begins its clock."""
    departed: Tensor
    """[K, G] bool: the groups that a client has left."""
    asked: Tensor
    """[K, G] bool: the groups that a client is to try with its own parameters and with the shared ones. A group that it
    has not left is one that it may leave; one that it has left is one that it may come back to."""
    rho: Tensor
    """[K, G] float64: the evidence with which a client left a group or is asked to; NaN elsewhere."""
    waiting: Tensor
    """[K] int64: the rounds that a client took part in since it last left a group or was asked to come back."""
    returns_tried: Tensor
    """[K] int64: how often a client was asked to come back."""
    fallen: Tensor
    """[K] bool: whether a client's evidence began with a fall of its returns, which have not risen again."""
    newcomers: Tensor
    """[K] bool: whether a client has joined a run that went on, and has not been asked yet what fits it."""

    @property
    def rounds(self) -> Tensor:
        """[K] int64: every client's clock."""
        return self.common.diagonal()

    @property
    def asked_clients(self) -> Mapping[str, tuple[int, ...]]:
        """The groups that clients are to try, in order; only clients with some."""
        rows = self.asked.any(1).nonzero().squeeze(1).tolist()
        return {self.clients[row]: tuple(self.asked[row].nonzero().squeeze(1).tolist()) for row in rows}

    def rows(self, clients: Sequence[str]) -> Tensor:
        """Find the rows [n] int64 of some clients."""
        row_of = {client: row for row, client in enumerate(self.clients)}
        return torch.tensor([row_of[client] for client in clients], dtype=torch.int64)

    def arrays(self) -> dict[str, Tensor]:
        """Name all tensors."""
        return {name: getattr(self, name) for name in TENSORS}

    def with_arrays(self, arrays: Mapping[str, Tensor], prefix: str = "") -> Panel:
        """Put other values in the place of all tensors; ValueError naming one that is missing or does not fit."""
        for name, own in self.arrays().items():
            array = arrays.get(prefix + name)
            if array is None or array.shape != own.shape or array.dtype != own.dtype:
                raise ValueError(prefix + name)
        return Panel(self.clients, *(arrays[prefix + name] for name in TENSORS))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the server knows of all clients."""

    panels: tuple[Panel, ...]

    @property
    def asked(self) -> Mapping[str, tuple[int, ...]]:
        """The groups that clients are to try, in order; only clients with some."""
        return {client: groups for panel in self.panels for client, groups in panel.asked_clients.items()}

    def arrays(self) -> dict[str, Tensor]:
        """Name all tensors, for a checkpoint: the panel's number, then the field."""
        return {
            f"{number}.{name}": tensor
            for number, panel in enumerate(self.panels)
            for name, tensor in panel.arrays().items()
        }

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> Evidence:
        """Put other values in the place of all tensors; ValueError naming one that is missing or does not fit."""
        return Evidence(tuple(panel.with_arrays(arrays, f"{number}.") for number, panel in enumerate(self.panels)))


TENSORS: Collection[str] = tuple(each.name for each in fields(Panel) if each.name != "clients")
"""The fields of a panel that are tensors."""


def no_evidence(clients: Collection[str], groups: Groups, most: int = PANEL) -> Evidence:
    """Make the evidence before the first round.

    most: the greatest number of clients that are compared with each other; fewer where there are many groups.
    """
    names = sorted(clients)
    panels = -(-len(names) // min(most, _most_clients(len(names), groups)))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    members = [sorted(names[place] for place in order[number::panels]) for number in range(panels)]
    return Evidence(tuple(new_panel(tuple(part), groups) for part in members))


def new_panel(clients: tuple[str, ...], groups: Groups) -> Panel:
    """Make a panel of clients that nothing is known of."""
    count, width = len(clients), int(sketch_sizes(groups, len(clients)).sum())
    counts, choices = torch.zeros(count, dtype=torch.int64), torch.zeros(count, len(groups.names), dtype=torch.bool)
    return Panel(
        clients=clients,
        sums=torch.zeros(count, width, dtype=torch.float64),
        products=torch.zeros(len(groups.names), count, count, dtype=torch.float64),
        common=torch.zeros(count, count, dtype=torch.int64),
        decisions=counts,
        departed=choices,
        asked=choices,
        rho=torch.full(choices.shape, torch.nan, dtype=torch.float64),
        waiting=counts,
        returns_tried=counts,
        fallen=torch.zeros(count, dtype=torch.bool),
        newcomers=torch.zeros(count, dtype=torch.bool),
    )


def _most_clients(clients: int, groups: Groups) -> int:
    """How many of so many clients a panel has room for; fewer where there are many groups."""
    return max(LEAST_PANEL, PRODUCTS // max(1, clients * len(groups.names)))


def with_clients(evidence: Evidence, clients: Collection[str], groups: Groups, most: int = PANEL) -> Evidence:
    """Add clients that nothing is known of: to the last panel as far as it has room, then to new ones.

    most: clients of a panel at most. Where sketches become smaller with more clients, a panel's evidence begins anew;
    what its clients have left stays left.
    """
    known = {client for panel in evidence.panels for client in panel.clients}
    added = sorted(set(clients) - known)
    if not added:
        return evidence
    if not known:
        return no_evidence(added, groups, most)
    panels, most = list(evidence.panels), min(most, _most_clients(len(known) + len(added), groups))
    if (room := most - len(panels[-1].clients)) > 0:
        panels[-1] = _grown(panels[-1], added[:room], groups)
        added = added[room:]
    panels += [new_panel(tuple(added[at : at + most]), groups) for at in range(0, len(added), most)]
    return Evidence(tuple(panels))


def _grown(panel: Panel, added: Sequence[str], groups: Groups) -> Panel:
    """Return the panel with more clients, of which nothing is known."""
    grown = new_panel(tuple(sorted({*panel.clients, *added})), groups)
    rows, before, after = grown.rows(panel.clients), panel.arrays(), grown.arrays()
    fits = before["sums"].shape[1] == after["sums"].shape[1]
    for name in (name for name in TENSORS if name not in ("sums", "products", "common")):
        after[name] = after[name].index_copy(0, rows, before[name])
    if fits:
        pairs = rows[:, None], rows
        after["sums"].index_copy_(0, rows, before["sums"])
        after["common"][pairs] = before["common"]
        after["products"][:, pairs[0], pairs[1]] = before["products"]
    return Panel(grown.clients, *(after[name] for name in TENSORS))


def add_round(panel: Panel, replies: Replies, updates: Updates, groups: Groups) -> Panel:
    """Add the unit updates of a panel's replies; in a group that a client has left it adds nothing."""
    if not replies.all:
        return panel
    rows, sizes = panel.rows(replies.clients), sketch_sizes(groups, len(panel.clients))
    norms = _norms_of_units(updates.norms, ~panel.departed[rows], groups)
    scale = torch.where((norms > TINY) & ~panel.departed[rows], 1 / norms.clamp(min=TINY), 0.0)
    sums, products, common = panel.sums.clone(), panel.products.clone(), panel.common.clone()
    waiting = panel.waiting.clone()
    units = updates.sketches.double()
    for group, part in enumerate(units.split(sizes.tolist(), 1)):
        part *= scale[:, group, None]
        products[group, rows[:, None], rows] += part @ part.mT
    sums.index_add_(0, rows, units)
    common[rows[:, None], rows] += 1
    waiting[rows] += 1
    return replace(panel, sums=sums, products=products, common=common, waiting=waiting)


def _norms_of_units(norms: Tensor, shares: Tensor, groups: Groups) -> Tensor:
    """Replace the norms [n, G] in blocks with learned groups by the norm of all that a client shares of the block.

    shares: [n, G] bool.
    """
    if not groups.learned:
        return norms
    blocks = groups.block_of_group
    squares = norms.new_zeros(len(norms), len(groups.as_blocks.names))
    whole = squares.index_add_(1, blocks, norms.square() * shares).sqrt()[:, blocks]
    return torch.where(torch.tensor([block in groups.learned for block in groups.blocks]), whole, norms)


def begin_anew(panel: Panel, clients: Tensor) -> Panel:
    """Forget all evidence about some clients, [n] int64, since what they do from now on is something else."""
    sums, products, common = panel.sums.clone(), panel.products.clone(), panel.common.clone()
    sums[clients] = 0
    products[:, clients] = 0
    products[:, :, clients] = 0
    common[clients] = 0
    common[:, clients] = 0
    fallen = panel.fallen.clone()
    fallen[clients] = False
    return replace(panel, sums=sums, products=products, common=common, fallen=fallen)


def systematic(panel: Panel, groups: Groups) -> tuple[Tensor, Tensor]:
    """Compute M and V, [G, K, K] float64 each; 0 where two clients have no rounds to compare."""
    rounds = panel.rounds.double()
    pairs = rounds[:, None] * rounds - panel.common
    parts = panel.sums.split(sketch_sizes(groups, len(panel.clients)).tolist(), 1)
    across = torch.stack([part @ part.mT for part in parts]) - panel.products
    between = torch.where(pairs > 0, across / pairs.clamp(min=1), 0.0)
    within = torch.where(panel.common > 0, panel.products / panel.common.clamp(min=1), between)
    return between, within


def parts_of(evidence: Evidence, replies: Replies) -> Iterator[tuple[Panel, Replies]]:
    """Yield each panel with its clients' replies."""
    panel_of = {client: number for number, panel in enumerate(evidence.panels) for client in panel.clients}
    parts: list[list[Reply]] = [[] for _ in evidence.panels]
    for reply in replies.all:
        parts[panel_of[reply.client]].append(reply)
    for panel, part in zip(evidence.panels, parts, strict=True):
        yield panel, Replies(tuple(part))


def least_pairs(numbers: Tensor) -> Tensor:
    """[G] int64: the pairs of different rounds after which there is enough evidence about each group.

    numbers: [G] int64, those that are kept of each group.
    """
    return -(-LEAST_EVIDENCE // numbers)


# Sketches ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def sketch_sizes(groups: Groups, clients: int) -> Tensor:
    """[G] int64: numbers of each group's sketch: all of its parameters, or as many as all clients have room for."""
    return groups.sizes.long().clamp(max=max(LEAST_NUMBERS, NUMBERS // max(1, clients)))


@dataclass(frozen=True, eq=False)
class Updates:
    """What is kept of the updates of n replies."""

    norms: Tensor
    """[n, G] float64."""
    sketches: Tensor
    """[n, D] float32."""


@dataclass(frozen=True, eq=False)
class SketchLayout:
    """How the P parameters of an update are folded into the D numbers of its sketch."""

    order: np.ndarray | None
    """[Q] int64: the parameters, group by group; None if they are in that order already."""
    group_of_place: np.ndarray
    """[Q] int64: the group of each of them."""
    signs: np.ndarray | None
    """[Q] float32: what each is multiplied with; None if no group is folded."""
    places: tuple[slice, ...]
    """[G]: where each group is in the order."""
    numbers: tuple[slice, ...]
    """[G]: where each group is in the sketch."""


@lru_cache(maxsize=8)
def _layout(groups: Groups, clients: int) -> SketchLayout:
    """Lay a sketch out.

    A group that is larger than its sketch has its parameters added up in turn with random signs (a count sketch). An
    inner product of two unit vectors has a standard error of about 1 / sqrt(numbers) over signs; the signs are the same
    in all rounds, so it does not average out.
    """
    order = groups.ids_or_last.argsort(stable=True)[: int(groups.sizes.sum())].numpy()
    sizes, numbers = groups.sizes.long().numpy(), sketch_sizes(groups, clients).numpy()
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), len(order))
    signs[np.repeat(sizes <= numbers, sizes)] = 1
    return SketchLayout(
        None if np.array_equal(order, np.arange(len(order))) else order,
        groups.ids.numpy()[order],
        signs if (sizes > numbers).any() else None,
        _runs_of(sizes),
        _runs_of(numbers),
    )


def _runs_of(sizes: np.ndarray) -> tuple[slice, ...]:
    """Return slices of these sizes, one after another."""
    stops = sizes.cumsum().tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes.tolist(), stops, strict=True))


def measure_updates(replies: Replies, shared: Tensor, groups: Groups, clients: int) -> Updates:
    """Measure and sketch the updates of replies, in one pass over them.

    clients: of the panel that they are in. The loop is in numpy, whose calls cost less than torch's.
    """
    layout, count = _layout(groups, clients), len(groups.names)
    squares = np.zeros((len(replies.all), count))
    sketches = np.zeros((len(replies.all), layout.numbers[-1].stop), np.float32)
    update = np.zeros(len(shared), np.float32)
    for reply, square, sketch in zip(replies.all, squares, sketches, strict=True):
        np.subtract(reply.point.numpy(), (shared if reply.start is None else reply.start).numpy(), out=update)
        values = update[: len(layout.group_of_place)] if layout.order is None else update[layout.order]
        if count > FEW:
            square += np.bincount(layout.group_of_place, values.astype(np.float64) ** 2, count)
        else:
            square += [np.dot(values[part], values[part]) for part in layout.places]
        if layout.signs is None:
            sketch[:] = values
            continue
        for part, numbers in zip(layout.places, layout.numbers, strict=True):
            _fold(values[part], layout.signs[part], sketch[numbers])
    return Updates(torch.from_numpy(np.sqrt(squares)), torch.from_numpy(sketches))


def _fold(values: np.ndarray, signs: np.ndarray, sketch: np.ndarray) -> None:
    """Add values [n] times signs [n] up in turn into the numbers of a sketch [m], which are 0."""
    width = len(sketch)
    whole = len(values) // width * width
    np.einsum("ij,ij->j", values[:whole].reshape(-1, width), signs[:whole].reshape(-1, width), out=sketch)
    sketch[: len(values) - whole] += values[whole:] * signs[whole:]
