"""Matches names of blocks and groups with patterns such as `torso.*`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from grpo_fed.scenario.toml import text as words


def match_names(pattern: str, names: Sequence[str], knob: str, what: str) -> list[str]:
    """The names that fit a pattern; one that fits none is a mistake at `knob`."""
    taken = [name for name in names if fnmatchcase(name, pattern)]
    if not taken:
        raise ValueError(f"{knob}: {words.short_toml(pattern)} takes no {what}{did_you_mean(pattern, names)}")
    return taken


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one most like it, or else those that there are."""
    names = list(dict.fromkeys(known))
    close = words.closest_match(word, names)
    return words.did_you_mean(words.short_toml(close)) if close else f"; there are {words.short_toml(names)}"
