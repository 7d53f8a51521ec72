"""What a sweep varies: `--grid KEY=A,B,C` and `--grid KEY=0..4`, `--over KEY=log:1e-4..1e-2`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
MOST_VALUES = 10_000
"""Values that one key may have; a longer range is hardly meant."""


@dataclass(frozen=True)
class Axis:
    """The values of one key in a grid."""

    key: str
    values: tuple[str, ...]
    """As TOML, or as text that `--set` takes."""

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Parse `KEY=A,B,C` or `KEY=0..4`, of whole numbers with both ends; ValueError for anything else."""
        key, value = _split(text, "--grid objective.learning_rate=1e-3,3e-3")
        if ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", value):
            first, last = int(ends[1]), int(ends[2])
            if not 0 <= last - first < MOST_VALUES:
                raise ValueError(f"--grid {text}: a range goes up, with at most {MOST_VALUES:,} values, such as 0..4")
            return cls(key, tuple(map(str, range(first, last + 1))))
        values = tuple(split_values(value))
        if repeated := [each for each in values if values.count(each) > 1]:
            raise ValueError(f"--grid {text}: {repeated[0]} is listed twice")
        if not all(values):
            raise ValueError(f"--grid {text}: a value is missing; write {key}=A,B or {key}=0..4")
        return cls(key, values)


Scale: TypeAlias = Literal["linear", "log", "int", "choice"]


@dataclass(frozen=True)
class Space:
    """What Optuna may choose for one key."""

    key: str
    scale: Scale
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    """The values of a choice, as TOML."""

    @classmethod
    def parse(cls, text: str) -> Space:
        """Parse `KEY=LOW..HIGH`, `KEY=log:LOW..HIGH`, `KEY=int:LOW..HIGH` or `KEY=A,B,C`; ValueError otherwise."""
        key, value = _split(text, "--over objective.learning_rate=log:1e-4..1e-2")
        kind, colon, rest = value.partition(":")
        scale: Scale = "linear"
        if colon and ".." in rest:
            if kind not in ("log", "int", "linear"):
                raise ValueError(f"--over {text}: {kind} is no scale; there are linear, log and int")
            scale, value = kind, rest  # type: ignore[assignment]
        ends = re.fullmatch(rf"({NUMBER})\.\.({NUMBER})", value)
        if ends is None:
            choices = tuple(split_values(value))
            if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
                raise ValueError(f"--over {text}: write {key}=LOW..HIGH, {key}=log:LOW..HIGH or {key}=A,B,C")
            return cls(key, "choice", choices=choices)
        low, high = float(ends[1]), float(ends[2])
        if low >= high:
            raise ValueError(f"--over {text}: a range goes up, and {low:g} is not below {high:g}")
        if scale == "log" and low <= 0:
            raise ValueError(f"--over {text}: a logarithmic range begins above 0")
        if scale == "int" and (low != int(low) or high != int(high)):
            raise ValueError(f"--over {text}: the ends of int are whole numbers")
        return cls(key, scale, low, high)


def _split(text: str, example: str) -> tuple[str, str]:
    """Split KEY=VALUES; ValueError if a part is missing."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise ValueError(f"{example.split()[0]} {text}: must be KEY=VALUES, such as {example}")
    return key, value


def split_values(text: str) -> list[str]:
    """Split at commas that are in no brackets, braces or quotes."""
    parts, depth, quote, part = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()]


def check_keys(keys: Sequence[str], option: str) -> None:
    """ValueError for a key that is given twice."""
    if repeated := [key for key in keys if list(keys).count(key) > 1]:
        raise ValueError(f"{option} {repeated[0]}: is given twice; list all of its values at once")
