"""Tables of clients on a terminal: while a run goes on, and when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from grpo_fed.reports.formatting import (
    CURVE_WIDTH,
    draw_curve,
    format_count,
    format_names,
    format_return,
    format_share,
    format_small,
    is_finite,
)
from grpo_fed.runs.departures import by_round
from grpo_fed.runs.records import list_differences
from grpo_fed.runs.results import ClientResult, Result, SiteResult

MAX_ROWS = 20
"""Of more clients a table shows those with the lowest returns, and quantiles of all."""
LOWEST_ROWS = 5
"""How many clients with the lowest returns such a table shows."""
MAX_LETTERS = 24
"""Characters of the names of several groups in a cell; the summary names them all."""
QUANTILES = {"highest": 1.0, "75 %": 0.75, "median": 0.5, "25 %": 0.25, "lowest": 0.0}


@dataclass
class ClientProgress:
    """What a client has reached so far in a run."""

    before: float | None = None
    """Return of the first policy."""
    returns: list[float] = field(default_factory=list)
    """Mean training return of each round in which the client finished an episode."""
    kl: float | None = None
    """KL of the latest update."""
    entropy: float | None = None
    """Entropy of the policy in the latest update."""
    equal: float | None = None
    """Share of the latest round's groups of completions that were rewarded equally; None without prompts."""
    departed: tuple[str, ...] | None = None
    """Groups of the shared blocks that the client has departed from; None without a federation."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """Block to the client's cluster, where the merge makes clusters."""
    failure: str = ""
    """Kind of the failure in the latest round, such as `late`; empty if the client answered."""

    @property
    def latest(self) -> float | None:
        """Return of the latest round."""
        return self.returns[-1] if self.returns else None

    @property
    def best(self) -> float | None:
        """Return of the best round."""
        return max(self.returns, default=None)


@dataclass(frozen=True)
class TrainingColumn:
    """One number of a client's training, and how it is written."""

    name: str
    value: Callable[[ClientProgress], float | None]
    format: Callable[[float | None], str] = format_small


KL = TrainingColumn("KL", lambda client: client.kl)
ENTROPY = TrainingColumn("entropy", lambda client: client.entropy)
EQUAL = TrainingColumn("equal groups", lambda client: client.equal, format_share)
SMALLEST_KL = 5e-5
"""A KL below is written as zero."""


def training_columns(clients: Iterable[ClientProgress]) -> list[TrainingColumn]:
    """Choose the numbers of training that these clients have.

    Clients with prompts have no entropy. Their KL is of rounding errors, unless there are several updates of a batch.
    """
    known = list(clients)
    if all(client.equal is None for client in known):
        return [KL, ENTROPY]
    has_kl = any(client.kl is not None and client.kl >= SMALLEST_KL for client in known)
    has_entropy = any(client.entropy is not None for client in known)
    return [*([KL] if has_kl else []), *([ENTROPY] if has_entropy else []), EQUAL]


@dataclass(frozen=True)
class _Column:
    """One number of every client, and how it is written."""

    name: str
    values: Sequence[float | None]
    format: Callable[[float | None], str] = format_return


def progress_table(
    clients: Mapping[str, ClientProgress],
    max_rows: int = MAX_ROWS,
    curve_width: int = CURVE_WIDTH,
    narrow: bool = False,
) -> RenderableType:
    """Make the table of a run that goes on: numbers and the curve of returns for each client.

    max_rows: of more clients, show those with the lowest returns, and quantiles. narrow: leave out the columns
    `before` and of the numbers of training all but the first.
    """
    shown = _shown_clients({name: client.latest for name, client in clients.items()}, max_rows)
    federated = any(client.departed is not None for client in clients.values())
    training = training_columns(clients.values())
    training = training[:1] if narrow else training
    table = make_table("client", *([] if narrow else ["before"]), "return", "best", *[each.name for each in training])
    table.add_column("by round", justify="left", no_wrap=True)
    if federated:
        table.add_column(_difference_head(clients.values()), justify="left", overflow="fold")
    for name in shown:
        client = clients[name]
        cells = [] if narrow else [format_return(client.before)]
        cells += [format_return(client.latest), format_return(client.best)]
        cells += [each.format(each.value(client)) for each in training]
        curve = Text(draw_curve(client.returns, curve_width), style="cyan")
        table.add_row(name, *cells, curve, *([_difference_cell(client)] if federated else []))
    if len(shown) == len(clients):
        return table
    columns = [
        _Column("before", [client.before for client in clients.values()]),
        _Column("return", [client.latest for client in clients.values()]),
        _Column("best", [client.best for client in clients.values()]),
        *(_Column(each.name, [each.value(client) for client in clients.values()], each.format) for each in training),
    ]
    took_part = sum(client.latest is not None for client in clients.values())
    return Group(_lowest_note(len(clients), took_part), table, _quantiles_table(columns))


def results_table(result: Result, narrow: bool = False) -> RenderableType:
    """Make the table of a run that has ended: every client's return before and after, and what it departed from.

    If clients were adapted, it has their returns after the local updates. With the merge rule `persistence` it has the
    round of each departure and the rho that decided. narrow: leave out the column `best`.
    """
    clients = result.clients
    shown = list(clients)
    if len(clients) > MAX_ROWS:
        shown = lowest_clients({name: clients[name].rank for name in taking_part(result)}, LOWEST_ROWS)
    federated = any(client.personal_groups or client.clusters for client in clients.values())
    has_evidence = any(client.departures for client in clients.values())
    is_adapted = any(client.adapted_last for client in clients.values())
    has_costs = any(client.cost is not None for client in clients.values())
    more = (*(("adapted",) if is_adapted else ()), *(("cost",) if has_costs else ()))
    numbers = ("before", "after", *more, "sampled", *(() if narrow else ("best",)))
    counts = ("episodes", "steps") if result.unit == "steps" else (result.unit,)
    table = make_table("client", *numbers, *(() if federated else counts))
    if federated:
        table.add_column(_difference_head(clients.values()), justify="left", overflow="fold")
    if has_evidence:
        table.add_column("round", justify="right", no_wrap=True)
        table.add_column("rho", justify="right", no_wrap=True)
    for name in shown:
        client = clients[name]
        cells: list[RenderableType] = [format_return(client.before), _after_cell(client)]
        cells += [format_return(client.adapted_last[-1] if client.adapted_last else None)] if is_adapted else []
        cells += [format_return(client.cost)] if has_costs else []
        cells += [format_return(client.sampled), *([] if narrow else [format_return(client.best)])]
        if has_evidence:
            _add_departures(table, name, cells, client)
            continue
        if federated:
            differences = list_differences(client.personal_groups, client.clusters)
            cells.append(Text(format_names(differences), style="yellow"))
        else:
            cells += [f"{client.episodes:,}", f"{client.env_steps:,}"][-len(counts) :]
        table.add_row(name, *cells)
    if len(shown) == len(clients):
        return table
    note = _lowest_note(len(clients), len(taking_part(result)))
    columns = [
        _Column("before", [client.before for client in clients.values()]),
        _Column("after", [client.after for client in clients.values()]),
        _Column("sampled", [client.sampled for client in clients.values()]),
        _Column("best", [client.best for client in clients.values()]),
    ]
    return Group(note, table, _quantiles_table(columns))


def taking_part(result: Result) -> list[str]:
    """List the clients that learned in some round; all clients if none did."""
    return [name for name, client in result.clients.items() if client.env_steps] or list(result.clients)


def sites_table(result: Result) -> Table:
    """Make the table of sites: the mean return of their clients before and after, and what each has departed from."""
    table = make_table("site", "clients", "before", "after")
    table.add_column("departed", justify="left", overflow="fold")
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("rho", justify="right", no_wrap=True)
    for name, site in result.sites.items():
        clients = [result.clients[client] for client in site.clients]
        is_mixed = len({each.scale for each in clients}) > 1  # then their returns have no mean
        before, after = (
            None if is_mixed else _mean([getattr(each, key) for each in clients]) for key in ("before", "after")
        )
        cells = [f"{len(clients):,}", format_return(before), format_return(after)]
        _add_departures(table, name, cells, site)
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    """Average the known values; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def make_table(first: str, *numbers: str) -> Table:
    """Make an empty table with a first column of names, and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column(first, style="bold", overflow="ellipsis", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def lowest_clients(returns: Mapping[str, float | None], count: int) -> list[str]:
    """Choose the `count` clients with the lowest returns, of those that have one; if there are none, the first."""
    known = {name: value for name, value in returns.items() if value is not None}
    return sorted(known, key=lambda name: known[name])[:count] or list(returns)[:count]


def _shown_clients(returns: Mapping[str, float | None], max_rows: int) -> list[str]:
    """Choose all clients, or of more than `max_rows` those with the lowest returns that are known."""
    if len(returns) <= max(max_rows, LOWEST_ROWS):
        return list(returns)
    return lowest_clients(returns, LOWEST_ROWS)


def _difference_head(clients: Iterable[ClientProgress | ClientResult]) -> str:
    """Name the column that says where clients differ from most others."""
    return "cluster" if any(client.clusters for client in clients) else "departed"


def _add_departures(
    table: Table, name: str, cells: Sequence[RenderableType], client: ClientResult | SiteResult
) -> None:
    """Add the row of a client or a site, and one for each further round in which it left groups."""
    together = by_round(client.personal_groups, client.departures)
    if not together:
        table.add_row(name, *cells, "", "", "")
    for index, departed in enumerate(together):
        groups = Text(_short_groups(departed.groups), style="yellow")
        round = "" if departed.round is None else f"{departed.round}"
        rho = "" if departed.round is None else f"{departed.lowest:.2f}"
        rho = rho if len(departed.groups) == 1 or not rho else f"≥{rho}"
        table.add_row(*((name, *cells) if index == 0 else [""] * (1 + len(cells))), groups, round, rho)


def _short_groups(groups: Sequence[str]) -> str:
    """Name groups, or count several whose names would fill many lines of a narrow column."""
    names = format_names(groups)
    return names if len(groups) == 1 or len(names) <= MAX_LETTERS else format_count(len(groups), "group")


def _difference_cell(client: ClientProgress) -> Text:
    """Name what a client does not share with most others, or why it did not answer."""
    if client.failure:
        return Text(client.failure, style="bold red")
    return Text(format_names(list_differences(client.departed or (), client.clusters)), style="yellow")


def _after_cell(client: ClientResult) -> Text:
    """Write the final return, green if it is higher than the first one and red if it is lower."""
    if client.after is None or client.before is None or client.after == client.before:
        return Text(format_return(client.after))
    return Text(format_return(client.after), style="bold green" if client.after > client.before else "bold red")


def _lowest_note(clients: int, took_part: int) -> Text:
    """Say which clients a table shows. took_part: how many of all clients have learned so far."""
    who = f"{clients:,}" if took_part == clients else f"{took_part:,} that took part, of {clients:,}"
    return Text(f"The {LOWEST_ROWS} clients with the lowest returns of {who}; below them the quantiles of all.", "dim")


def _quantiles_table(columns: Sequence[_Column]) -> Table:
    """Make a row for each quantile; every column is sorted by itself."""
    table = make_table("quantile", *[column.name for column in columns])
    known = [np.array([value for value in column.values if is_finite(value)], float) for column in columns]
    for name, share in QUANTILES.items():
        values = [float(np.quantile(array, share)) if array.size else None for array in known]
        table.add_row(name, *[column.format(value) for value, column in zip(values, columns, strict=True)])
    return table
