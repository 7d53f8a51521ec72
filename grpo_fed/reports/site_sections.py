"""The part of a summary about sites: how their clients did, and what each site has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_fed.reports.formatting import format_count, format_names, format_return, is_finite
from grpo_fed.reports.section import Section, Table
from grpo_fed.runs.departures import DepartedGroups, Departure, by_round
from grpo_fed.runs.history import History

HEAD = ("site", "clients", "after", "departed groups")


def describe_sites(history: History) -> Section:
    """Make a row for each site, with the mean return of its clients."""
    after = {
        name: value for name, value in zip(history.clients, history.after.tolist(), strict=True) if is_finite(value)
    }
    rows = []
    for site, clients in history.sites.items():
        left = _describe_departures(history.site_personal[site], history.site_departures[site])
        known = [after[name] for name in clients if name in after]
        mean = sum(known) / len(known) if known else None
        rows.append((site, format_count(len(clients), "client"), format_return(mean), left or "none"))
    text = (
        "The server merges the sites. A site that has departed from a group keeps a block of its own there, which its"
        " clients share."
    )
    return Section(
        "Sites", (text,), tables=(Table(HEAD, tuple(rows), ("clients", "departed groups")),), figures=("sites",)
    )


def _describe_departures(groups: Sequence[str], departures: Mapping[str, Departure]) -> str:
    """Name the groups that a site has left, since when and with which rho if that is known; empty if none."""
    return "; ".join(_describe(departed) for departed in by_round(groups, departures))


def _describe(departed: DepartedGroups) -> str:
    return f"{format_names(departed.groups)} {departed.since}".strip()
