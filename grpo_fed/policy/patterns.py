"""Resolves patterns of names such as `torso.*`, as scenarios use them to speak of blocks, parameters and groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from grpo_fed.scenario.toml.text import short_toml, suggest_name

V = TypeVar("V")


def match_names(pattern: str, names: Sequence[str], key: str, what: str) -> list[str]:
    """Return the names that a pattern matches, in their order.

    key: where the scenario has the pattern, `policy.shared`. what: the noun for a name, `block`.

    Raises a ValueError where the pattern matches no name.
    """
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if not matches:
        raise ValueError(f"{key}: {short_toml(pattern)} matches no {what}{suggest_name(pattern, names)}")
    return matches


def values_by_name(patterns: Mapping[str, V], names: Sequence[str], key: str, what: str) -> dict[str, V]:
    """Resolve values by pattern to values by name: `{"torso.*": 0.1}` -> `{"torso.0": 0.1, "torso.1": 0.1}`.

    A name that no pattern matches has no value. key and what are as for `match_names`.

    Raises a ValueError where a pattern matches no name, and where two patterns match the same one.
    """
    matches = {pattern: match_names(pattern, names, key, what) for pattern in patterns}
    return {name: patterns[pattern] for name, pattern in owner_by_name(matches, key).items()}


def owner_by_name(matches: Mapping[str, Iterable[str]], key: str) -> dict[str, str]:
    """Invert what each owner matches to the owner of each name.

    matches: names by owner; an owner is a pattern, or what a list of patterns stands for.

    Raises a ValueError where two owners match the same name.
    """
    owners: dict[str, str] = {}
    for owner, names in matches.items():
        for name in names:
            first = owners.setdefault(name, owner)
            if first != owner:
                both = f"{short_toml(first)} and {short_toml(owner)} both match {short_toml(name)}"
                raise ValueError(f"{key}: {both}; narrow one of the patterns")
    return owners
