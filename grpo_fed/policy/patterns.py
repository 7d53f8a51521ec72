"""Matches names of blocks and groups with patterns such as `torso.*`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from grpo_fed.scenario.toml.text import short_toml, suggest_name


def match_names(pattern: str, names: Sequence[str], knob: str, what: str) -> list[str]:
    """The names that fit a pattern; one that fits none is a mistake at `knob`."""
    taken = [name for name in names if fnmatchcase(name, pattern)]
    if not taken:
        raise ValueError(f"{knob}: {short_toml(pattern)} takes no {what}{suggest_name(pattern, names)}")
    return taken
