"""Finds keys that have no effect beside other values, such as `merge.threshold` with `merge.rule = "mean"`.

Such a key is allowed, unlike a contradiction (checks.py), since a file is also run with other methods and presets. But
who gave it probably expects something of it. Only keys that the user wrote are named, not those that a method or a
preset fills in. unused_table.py, unused_language.py, unused_setups.py and unused_constraints.py have the combinations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from grpo_fed.scenario.methods import clear_replaced_method
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import scenario_of_site
from grpo_fed.scenario.tables import is_complete
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.mistakes import Mistake, mistake_lines
from grpo_fed.scenario.toml.reading import read_source
from grpo_fed.scenario.toml.source import Source, read_text
from grpo_fed.scenario.unused_constraints import CONSTRAINTS_UNUSED
from grpo_fed.scenario.unused_language import LANGUAGE_UNUSED
from grpo_fed.scenario.unused_rows import TaskFacts
from grpo_fed.scenario.unused_setups import PROMPTS_UNUSED, SETUPS_UNUSED
from grpo_fed.scenario.unused_table import UNUSED


@dataclass(frozen=True)
class UnusedKey:
    """A key of a scenario that has no effect in it."""

    key: KeyPath
    reason: str
    """Which other value is the cause."""


@dataclass(frozen=True)
class GivenKeys:
    """The keys that a user wrote in a scenario's file and on the command line."""

    source: Source
    keys: tuple[KeyPath, ...]

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str]) -> Self:
        """Read which keys a file and the overrides give.

        A file that gives every key, as the one in a run's folder does, was not written by hand: then the keys of the
        overrides alone count.
        """
        text = read_text(path)
        is_resolved = is_complete(Scenario, Source.parse(text, str(path)).data)
        source, _ = read_source(text, str(path), overrides, clear_replaced_method)
        keys = (key for key in _keys_in(source) if not is_resolved or _is_override(source, key))
        return cls(source, tuple(keys))

    def unused_lines(self, scenario: Scenario, tasks: TaskFacts | None = None) -> list[str]:
        """Write a line for each of these keys that has no effect, with its place, in the order of the places."""
        found = unused_keys(scenario, self.keys, tasks)
        return mistake_lines(
            self.source, [Mistake((unused.key,), f"has no effect: {unused.reason}") for unused in found]
        )


def unused_keys(scenario: Scenario, given: Iterable[KeyPath], tasks: TaskFacts | None = None) -> Iterator[UnusedKey]:
    """Find those of the given keys that have no effect in a scenario.

    tasks: None if they have not been made; then keys that may depend on them are not found.
    """
    reasons = _reasons(scenario, tasks)
    of_sites = [_reasons(scenario_of_site(scenario, site), tasks) for site in scenario.sites]
    for path in given:
        match path:
            case ("sites", int(number), ("merge" | "proximity") as section, str(key)):
                reason = of_sites[number].get(f"{section}.{key}")
            case (("merge" | "proximity") as section, str(key)):
                inherited = [
                    each.get(f"{section}.{key}")
                    for each, site in zip(of_sites, scenario.sites, strict=True)
                    if key not in getattr(site, section)
                ]
                reason = reasons.get(f"{section}.{key}") if None not in inherited else None
            case _:
                key = ".".join(part for part in path if isinstance(part, str))
                reason = reasons.get(key) if all(key in each for each in of_sites) else None
        if reason is not None:
            yield UnusedKey(path, reason)


def _reasons(scenario: Scenario, tasks: TaskFacts | None) -> dict[str, str]:
    """Find the keys that have no effect for one server of a scenario, and why."""
    reasons: dict[str, str] = {}
    for row in (*UNUSED, *LANGUAGE_UNUSED, *SETUPS_UNUSED, *CONSTRAINTS_UNUSED, *PROMPTS_UNUSED):
        if row.holds(scenario, tasks):
            for key in row.keys:
                reasons.setdefault(key, row.reason.format(scenario))
    return reasons


def _keys_in(source: Source) -> Iterator[KeyPath]:
    """List the keys of a scenario that a source gives, and the keys of tables in which a site gives other values."""
    for path, _ in all_keys(Scenario):
        keys: list[KeyPath] = [path]
        if path[0] in ("clients", "sites"):
            keys = [(path[0], number, *path[1:]) for number in range(len(source.data.get(path[0], [])))]
        for key in keys:
            if source.has_key(key):
                is_table = path[0] == "sites" and path[-1] in ("merge", "proximity")
                yield from ((*key, inner) for inner in source.value_at(key)) if is_table else (key,)


def _is_override(source: Source, key: KeyPath) -> bool:
    """Whether a key, or something in it, was given on the command line."""
    return any(kind == 1 for path, (kind, _) in source.positions.items() if path[: len(key)] == key)
