"""Reads the fields of Flower's records one by one, and refuses what does not fit."""

from __future__ import annotations

import math
import reprlib
from typing import TypeVar, final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

LARGEST = 1e100
"""The largest number that a client may report: its square is still a float, so that means and variances are too."""

Value = TypeVar("Value")


class InvalidMessageError(ValueError):
    """A message does not have the form that it must have; nothing of it is used."""


@final
class FieldReader:
    """Takes the fields of a record one by one; in the end no field may be left."""

    def __init__(
        self, content: RecordDict, name: str, kind: type[ArrayRecord] | type[ConfigRecord] | type[MetricRecord]
    ) -> None:
        """Read the record of that name; InvalidMessageError if it is not of that kind."""
        record = content[name]
        if not isinstance(record, kind):
            raise InvalidMessageError(f"{name} is a {type(record).__name__}; it has to be a {kind.__name__}")
        self._name = name
        self._rest: dict[str, object] = dict(record)

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, kind: type[Value]) -> Value:
        """Take a field that must have exactly this type: to Python a bool is an int too."""
        if name not in self._rest:
            raise InvalidMessageError(f"{self._name}.{name} is missing")
        value = self._rest.pop(name)
        if type(value) is not kind:
            raise InvalidMessageError(f"{self._name}.{name} is {show(value)}; it has to be a {kind.__name__}")
        return value

    def take_float(self, name: str, least: float = -LARGEST, most: float = LARGEST) -> float:
        """Take a finite float from `least` to `most`."""
        value = self.take(name, float)
        if not (math.isfinite(value) and least <= value <= most):
            raise InvalidMessageError(
                f"{self._name}.{name} is {value}; it has to be finite, from {least:g} to {most:g}"
            )
        return value

    def take_count(self, name: str, least: int, most: int) -> int:
        """Take an integer from `least` to `most`."""
        value = self.take(name, int)
        if not least <= value <= most:
            raise InvalidMessageError(f"{self._name}.{name} is {show(value)}; it has to be from {least} to {most}")
        return value

    def take_floats(self, name: str, count: int) -> tuple[float, ...]:
        """Take a list of so many finite floats."""
        values = self.take(name, list)
        if len(values) != count or not all(type(value) is float and abs(value) <= LARGEST for value in values):
            raise InvalidMessageError(f"{self._name}.{name} is {show(values)}; it has to be {count} finite floats")
        return tuple(values)

    def take_some_floats(self, name: str, most: int) -> tuple[float, ...]:
        """Take a list of finite floats, one at least and not more than `most`."""
        values = self._rest.get(name)
        return self.take_floats(name, min(max(len(values), 1), most) if isinstance(values, list) else 1)

    def take_divergences(self, name: str, count: int) -> tuple[float, ...]:
        """Take a list of so many KL divergences: finite, and not negative but for rounding."""
        values = self.take(name, list)
        if len(values) != count or not all(type(value) is float and -1e-6 <= value < math.inf for value in values):
            raise InvalidMessageError(
                f"{self._name}.{name} is {show(values)}; it has to be {count} finite floats, 0 or more"
            )
        return tuple(values)

    def refuse_rest(self) -> None:
        """Raise InvalidMessageError if there are fields that were not taken."""
        if self._rest:
            raise InvalidMessageError(f"{self._name} has {show(sorted(self._rest))}, which is not part of this message")


def check_records(content: RecordDict, names: set[str]) -> None:
    """Raise InvalidMessageError unless a message has exactly these records."""
    if set(content) != names:
        raise InvalidMessageError(
            f"the records are {show(sorted(content))}; they have to be {', '.join(sorted(names))}"
        )


def show(value: object) -> str:
    """Represent any value that was received as a short text."""
    return reprlib.repr(value)
