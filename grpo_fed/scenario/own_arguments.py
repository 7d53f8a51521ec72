"""The scenario as one client may read it: without the arguments of other clients, and of the server's own code.

Arguments may be anything, such as the path of a file or a password, and no other client needs them.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import tomli_w

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

ARGUMENTS = "kwargs"
OWN_KEYS: Mapping[str, type] = {ARGUMENTS: dict, "spread": dict, "changes": list, "wrappers": list}
"""Keys of an entry of `[[clients]]` that only its own clients get, and what others get instead."""

DIGITS = 16
"""Of a digest: it finds mistakes, and is in every message."""


@lru_cache(maxsize=4096)
def withhold_arguments(text: str, client: str | None) -> str:
    """Remove from a scenario, TOML, the arguments that are not this client's; None for no client's at all.

    An entry's clients share its arguments, also with those that may join as clients like them. The text still is a
    whole scenario.
    """
    if not text:
        return text
    tables = tomllib.loads(text)
    entries = tables.get("clients", ())
    joins = client is not None and all(client not in _names_of(entry) for entry in entries)
    like = tables.get("newcomers", {}).get("like") if joins else None
    for entry in entries:
        if client not in _names_of(entry) and entry["name"] != like:
            entry |= {key: kind() for key, kind in OWN_KEYS.items() if key in entry}
            entry.pop("start", None)
            for reward in entry.get("rewards", ()):
                reward[ARGUMENTS] = {}
    tables["callbacks"] = []
    if ARGUMENTS in tables.get("merge", {}):
        tables["merge"][ARGUMENTS] = {}
    return tomli_w.dumps(tables)


def digest_entry(scenario: Scenario, client: str) -> str:
    """Return a hash of a client's own entry, by which it finds out whether it has the arguments that are meant for it.

    ValueError if the scenario has no such client.
    """
    entry = next((entry for entry in scenario.clients if client in entry.names), None)
    if entry is None:
        raise ValueError(f"scenario {scenario.name} has no client {client}")
    return _digest(entry.model_dump_json())


@lru_cache(maxsize=4096)
def _digest(text: str) -> str:
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()[:DIGITS]


def _names_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of an entry's clients, as `ClientSettings.names` does."""
    name, count = str(entry["name"]), int(entry.get("count", 1))
    return (name,) if count == 1 else tuple(f"{name}-{number}" for number in range(count))
