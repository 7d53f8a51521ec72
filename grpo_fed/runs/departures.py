"""Departures of the merge rule `persistence`: when a client left a parameter group, and with which rho."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """Says when and why a client left a parameter group."""

    round: int
    """The round after which it no longer shared the group."""
    rho: float
    """The evidence: how much its deviation from the others agreed with itself over the rounds until then."""


@dataclass(frozen=True)
class DepartedGroups:
    """Parameter groups that a client left in the same round."""

    groups: tuple[str, ...]
    """The groups' names, at least one."""
    round: int | None = None
    """The round; None with a merge rule that judges every round anew."""
    lowest: float = 0.0
    """The lowest rho of these groups."""
    highest: float = 0.0
    """The highest rho of these groups."""

    @property
    def since(self) -> str:
        """The round and the evidence in words: `since round 4, rho 0.93`; empty without a round."""
        if self.round is None:
            return ""
        low, high = f"{self.lowest:.2f}", f"{self.highest:.2f}"
        return f"since round {self.round}, rho {low if low == high else f'{low} to {high}'}"


def note_departures(
    departures: dict[str, Departure], round: int, left: Mapping[str, float], returned: Iterable[str]
) -> None:
    """Add the groups that a client left in a round, and remove those that it returned to.

    departures: the client's by group, changed in place. left: group -> rho.
    """
    for group in returned:
        departures.pop(group, None)
    for group, rho in left.items():
        departures[group] = Departure(round, rho)


def by_round(groups: Iterable[str], departures: Mapping[str, Departure]) -> list[DepartedGroups]:
    """Collect the groups that a client has left by the round in which it left them; those without a round come last."""
    together: dict[int | None, list[str]] = {}
    for group in groups:
        together.setdefault(departures[group].round if group in departures else None, []).append(group)
    known = [
        DepartedGroups(tuple(names), round, min(rho), max(rho))
        for round, names in sorted((round, names) for round, names in together.items() if round is not None)
        for rho in [[departures[name].rho for name in names]]
    ]
    return [*known, *([DepartedGroups(tuple(together[None]))] if None in together else [])]
