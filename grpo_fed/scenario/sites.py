"""Sites of a federation: which clients each of them has, and the settings that it merges them by."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from grpo_fed.scenario.methods import fill_from_rule
from grpo_fed.scenario.settings import MergeSettings, ProximitySettings, SiteSettings

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

OF_CLIENTS = {"merge": ("episodes", "correct_drift"), "proximity": ("states",)}
"""Keys that clients go by, which are the same at all sites."""


def clients_of_sites(scenario: Scenario) -> dict[str, tuple[str, ...]]:
    """Name the clients of each site, in the scenario's order; empty without sites."""
    names = [name for entry in scenario.clients for name in entry.names]
    return {
        site.name: tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in site.clients))
        for site in scenario.sites
    }


def scenario_of_site(scenario: Scenario, site: SiteSettings) -> Scenario:
    """Return the scenario with the site's own merge and budgets, and without sites.

    A key that the site does not give has the value of `[merge]` or `[proximity]`.
    """
    own = fill_from_rule({"merge": site.merge, "proximity": site.proximity})
    merge = {key: getattr(scenario.merge, key) for key in scenario.merge.model_fields_set} | own["merge"]
    proximity = {key: getattr(scenario.proximity, key) for key in ProximitySettings.model_fields} | own["proximity"]
    values = {
        "merge": MergeSettings.model_validate(merge),
        "proximity": ProximitySettings.model_validate(proximity),
        "sites": [],
    }
    return scenario.model_copy(update=values)


def levels_of(scenario: Scenario) -> Iterator[Scenario]:
    """Yield the scenario of every server: the federation's own, and then those of its sites."""
    yield scenario
    for site in scenario.sites:
        yield scenario_of_site(scenario, site)
