"""Numbers, curves and tables as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from grpo_fed.runs.records import list_differences
from grpo_fed.runs.results import ClientResult, Result

MANY = 20
"""Above so many clients a table has the worst ones and quantiles."""
WORST = 5
CURVE = 24
"""Letters of a curve."""
LEVELS = "▁▂▃▄▅▆▇█"
QUANTILES = {"highest": 1.0, "75 %": 0.75, "median": 0.5, "25 %": 0.25, "lowest": 0.0}

Show = Callable[[float | None], str]


@dataclass
class ClientProgress:
    """How a client has done so far."""

    before: float | None = None
    """Return of the first policy."""
    returns: list[float] = field(default_factory=list)
    """Mean return of the episodes of each round that had some."""
    kl: float | None = None
    entropy: float | None = None
    personal: tuple[str, ...] | None = None
    """The groups that it has left; None where there is no federation."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """By block the cluster that it is in, where the merge makes some."""
    state: str = ""
    """Why it had no answer in the latest round; empty if it had one."""

    @property
    def last(self) -> float | None:
        """Return of the latest round."""
        return self.returns[-1] if self.returns else None

    @property
    def best(self) -> float | None:
        """Return of the best round."""
        return max(self.returns, default=None)


# Tables ---------------------------------------------------------------------------------------------------------------


def standings_table(
    clients: dict[str, ClientProgress], most: int = MANY, letters: int = CURVE, narrow: bool = False
) -> RenderableType:
    """How the clients are doing, with the curve of each; above `most` the worst ones and quantiles.

    Where it is `narrow`, without the columns that can best be spared.
    """
    shown = _shown({name: one.last for name, one in clients.items()}, most)
    ones = list(clients.values())
    federated = any(one.personal is not None for one in ones)
    table = table_of("client", *(("return", "best", "KL") if narrow else ("before", "return", "best", "KL", "entropy")))
    table.add_column("by round", justify="left", no_wrap=True)
    if federated:
        table.add_column(_apart(ones), justify="left", overflow="fold")
    for name in shown:
        one = clients[name]
        cells = [number(one.last), number(one.best), small(one.kl)]
        cells = cells if narrow else [number(one.before), *cells, small(one.entropy)]
        table.add_row(
            name, *cells, Text(curve(one.returns, letters), style="cyan"), *([_keeps(one)] if federated else [])
        )
    if len(shown) == len(clients):
        return table
    columns: list[tuple[str, list[float | None], Show]] = [
        ("before", [one.before for one in ones], number),
        ("return", [one.last for one in ones], number),
        ("best", [one.best for one in ones], number),
        ("KL", [one.kl for one in ones], small),
        ("entropy", [one.entropy for one in ones], small),
    ]
    return Group(_few_of(len(clients)), table, _quantiles(columns))


def _apart(clients: Iterable[ClientProgress | ClientResult]) -> str:
    """The head over what clients have apart from most others."""
    return "cluster" if any(one.clusters for one in clients) else "keeps"


def _keeps(one: ClientProgress) -> Text:
    """What a client has to itself, or why nothing was heard of it."""
    if one.state:
        return Text(one.state, style="bold red")
    return Text(some(list_differences(one.personal or (), one.clusters)), style="yellow")


def results_table(result: Result) -> RenderableType:
    """Every client's return before and after."""
    clients = result.clients
    shown = _shown({name: one.latest for name, one in clients.items()}, MANY)
    federated = any(one.personal_groups or one.clusters for one in clients.values())
    table = table_of(
        "client", "before", "after", "sampled", "best round", *(() if federated else ("episodes", "steps"))
    )
    if federated:
        table.add_column(_apart(clients.values()), justify="left", overflow="fold")
    for name in shown:
        one = clients[name]
        cells = number(one.before), _after(one), number(one.sampled), number(one.best)
        rest = (
            [Text(some(list_differences(one.personal_groups, one.clusters)), style="yellow")]
            if federated
            else [f"{one.episodes:,}", f"{one.env_steps:,}"]
        )
        table.add_row(name, *cells, *rest)
    if len(shown) == len(clients):
        return table
    ones = list(clients.values())
    columns: list[tuple[str, list[float | None], Show]] = [
        ("before", [one.before for one in ones], number),
        ("after", [one.after for one in ones], number),
        ("sampled", [one.sampled for one in ones], number),
        ("best round", [one.best for one in ones], number),
    ]
    return Group(_few_of(len(clients)), table, _quantiles(columns))


def table_of(first: str, *numbers: str) -> Table:
    """A first column of names, and others of numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column(first, style="bold", overflow="ellipsis", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shown(returns: dict[str, float | None], most: int) -> list[str]:
    """All clients, or of more than `most` those with the lowest returns."""
    if len(returns) <= max(most, WORST):
        return list(returns)
    return lowest(returns, WORST)


def lowest(returns: dict[str, float | None], count: int) -> list[str]:
    """The clients with the lowest returns; those that have none first."""
    return sorted(returns, key=lambda name: -np.inf if (value := returns[name]) is None else value)[:count]


def _few_of(clients: int) -> Text:
    return Text(f"The {WORST} lowest of {clients} clients, and below them all:", style="dim")


def _quantiles(columns: Sequence[tuple[str, Sequence[float | None], Show]]) -> Table:
    """A row for each quantile, of every column on its own."""
    table = table_of("of all", *[name for name, _, _ in columns])
    arrays = [np.array([value for value in values if is_number(value)], float) for _, values, _ in columns]
    for name, share in QUANTILES.items():
        found = [float(np.quantile(array, share)) if array.size else None for array in arrays]
        table.add_row(name, *[show(value) for value, (_, _, show) in zip(found, columns, strict=True)])
    return table


def _after(client: ClientResult) -> Text:
    if client.after is None or client.before is None or client.after == client.before:
        return Text(number(client.after))
    return Text(number(client.after), style="bold green" if client.after > client.before else "bold red")


# Numbers --------------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A return."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def small(value: float | None) -> str:
    """A KL or an entropy."""
    return "-" if value is None or not np.isfinite(value) else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def span(seconds: float) -> str:
    """How long: 0.8 s, 12 s, 3:05, 1:02:03."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def many(count: int, what: str) -> str:
    """`1 client`, `6 clients`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def some(names: Sequence[str], most: int = 3) -> str:
    """Names in a line, or the first of them and how many more."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:most])} and {rest} more"


def is_number(value: float | None) -> bool:
    """Whether it is known and finite."""
    return value is not None and bool(np.isfinite(value))


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """A line of blocks; many values are means of as many as have to share one."""
    if not values:
        return ""
    parts = np.array_split(np.asarray(values, float), min(width, len(values)))
    means = np.array([part.mean() for part in parts])
    low, high = means.min(), means.max()
    heights = np.zeros(len(means)) if high == low else (means - low) / (high - low)
    return "".join(LEVELS[round(float(height) * (len(LEVELS) - 1))] for height in heights)
