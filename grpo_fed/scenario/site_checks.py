"""Contradictions of sites: clients that are in none or in several, and what no tree of servers can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from grpo_fed.scenario.settings import COLLUDING_ATTACKS, MergeSettings, ProximitySettings, Section, SiteSettings
from grpo_fed.scenario.sites import OF_CLIENTS, clients_of_sites, scenario_of_site
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.mistakes import Mistake, mistake_from_error
from grpo_fed.scenario.toml.text import shorten, suggest_name

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

SECTIONS: dict[str, type[Section]] = {"merge": MergeSettings, "proximity": ProximitySettings}
"""The sections of which a site may give keys."""
FLAT = "leave [[sites]] out"
"""The cure for whatever sites do not allow."""


def site_contradictions(
    scenario: Scenario, contradictions: Callable[[Scenario], Iterable[Mistake]]
) -> Iterator[Mistake]:
    """Find what is wrong with a scenario's sites; nothing without any.

    contradictions: finds the contradictions of a scenario without sites.
    """
    if not scenario.sites:
        return
    invalid = [mistake for number, site in enumerate(scenario.sites) for mistake in _invalid_keys(number, site)]
    yield from invalid
    yield from _membership_mistakes(scenario)
    yield from _unsupported(scenario)
    yield from _mixing_mistakes(scenario)
    if not invalid:
        yield from _merge_contradictions(scenario, contradictions)


def _invalid_keys(number: int, site: SiteSettings) -> Iterator[Mistake]:
    """Check the keys that a site gives of `[merge]` and `[proximity]`."""
    for name, section in SECTIONS.items():
        table: KeyPath = ("sites", number, name)
        values = getattr(site, name)
        try:
            section.model_validate(values)
        except ValidationError as invalid:
            for error in invalid.errors():
                mistake = mistake_from_error(section, values, error)
                yield Mistake(tuple((*table, *key) for key in mistake.keys), mistake.text)
        for key in OF_CLIENTS[name]:
            if key in values:
                yield Mistake(((*table, key),), f"clients of all sites go by the same: give it in [{name}]")


def _membership_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Check that every client is in one site, and every site has a client."""
    clients, members = [name for entry in scenario.clients for name in entry.names], clients_of_sites(scenario)
    names = Counter(site.name.lower() for site in scenario.sites)
    for number, site in enumerate(scenario.sites):
        if names[site.name.lower()] > 1:
            yield Mistake((("sites", number, "name"),), "another site has this name; names must differ")
        elif not members[site.name]:
            text = f"matches no client{suggest_name(site.clients[0], clients)}"
            yield Mistake((("sites", number, "clients"),), text)
    if max(names.values()) > 1:
        return
    counts = Counter(name for of_site in members.values() for name in of_site)
    for number, entry in enumerate(scenario.clients):
        if lonely := [name for name in entry.names if not counts[name]]:
            text = f"{shorten(', '.join(lonely))} in no site; add a pattern to the clients of one of [[sites]]"
            yield Mistake((("clients", number, "name"), ("sites",)), text)
        if shared := [name for name in entry.names if counts[name] > 1]:
            text = f"{shorten(', '.join(shared))} in several sites; narrow a pattern in the clients of one of [[sites]]"
            yield Mistake((("clients", number, "name"), ("sites",)), text)


def _unsupported(scenario: Scenario) -> Iterator[Mistake]:
    """List what no tree of servers can do."""
    if scenario.round.mode == "buffered":
        text = f'sites merge all of their clients in a round: use round.mode = "sync", or {FLAT}'
        yield Mistake((("round", "mode"), ("sites",)), text)
    if scenario.merge.correct_drift:
        text = "merge.correct_drift finds the mean step of all in one server's step, and with sites there are two"
        yield Mistake((("merge", "correct_drift"), ("method",), ("sites",)), f"{text}; {FLAT}")
    for number, entry in enumerate(scenario.clients):
        if entry.attack in COLLUDING_ATTACKS:
            text = f'clients of several sites cannot collude: use an attack such as "sign-flip", or {FLAT}'
            yield Mistake((("clients", number, "attack"), ("sites",)), text)
    given: list[tuple[KeyPath, SiteSettings | None]] = [((), None)]
    given += [(("sites", number), site) for number, site in enumerate(scenario.sites)]
    for path, site in given:
        rule = scenario.merge.rule if site is None else site.merge.get("rule")
        mode = scenario.proximity.mode if site is None else site.proximity.get("mode")
        if rule in ("clusters", "fisher"):
            text = f'is for a server without sites: use "persistence", "mean" or a robust rule, or {FLAT}'
            yield Mistake(((*path, "merge", "rule"), ("method",), ("sites",)), text)
        if mode == "quadratic":
            text = f'predicts the KL of one server\'s step, and there are two: use "measured" or "off", or {FLAT}'
            yield Mistake(((*path, "proximity", "mode"), ("sites",)), text)


def _mixing_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Check that mixing leaves more than half of what a server merges: the sites, or the clients of a site."""
    members = clients_of_sites(scenario)
    if scenario.merge.mix and 2 * scenario.merge.mix >= len(scenario.sites):
        text = f"must be less than half of the sites: at most {(len(scenario.sites) - 1) // 2}"
        yield Mistake((("merge", "mix"), ("sites",)), text)
    for number, site in enumerate(scenario.sites):
        mix, count = site.merge.get("mix", scenario.merge.mix), len(members[site.name])
        if isinstance(mix, int) and mix and count and 2 * mix >= count:
            text = f"must be less than half of the clients of {site.name}: at most {(count - 1) // 2}"
            yield Mistake((("sites", number, "merge", "mix"), ("merge", "mix")), text)


def _merge_contradictions(
    scenario: Scenario, contradictions: Callable[[Scenario], Iterable[Mistake]]
) -> Iterator[Mistake]:
    """Find the contradictions that a site's own keys bring in, and name these keys."""
    known = {mistake.text for mistake in contradictions(scenario.model_copy(update={"sites": []}))}
    for number, site in enumerate(scenario.sites):
        if not (site.merge or site.proximity):
            continue
        for mistake in contradictions(scenario_of_site(scenario, site)):
            if mistake.text not in known:
                yield Mistake(tuple(_key_at_site(key, number, site) for key in mistake.keys), mistake.text)


def _key_at_site(key: KeyPath, number: int, site: SiteSettings) -> KeyPath:
    """Find where a key has its value for a site: in the site's own table, or where all have it."""
    section, *rest = key
    is_own = section in SECTIONS and rest and rest[0] in getattr(site, str(section))
    return ("sites", number, *key) if is_own else key
