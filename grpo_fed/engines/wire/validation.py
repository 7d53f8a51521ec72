"""Values of Flower's records, taken one by one and checked before anybody uses them."""

from __future__ import annotations

import math
import reprlib
from typing import TypeVar, final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

LARGEST = 1e100
"""Number that a client may tell of itself: means and squares of such are numbers too, as JSON needs them."""

Value = TypeVar("Value")


class InvalidMessageError(ValueError):
    """What came in is not what it has to be; nothing of it is used."""


@final
class FieldReader:
    """The values of a record, to be taken one by one; none may be left."""

    def __init__(
        self, content: RecordDict, name: str, kind: type[ArrayRecord] | type[ConfigRecord] | type[MetricRecord]
    ) -> None:
        record = content[name]
        if not isinstance(record, kind):
            raise InvalidMessageError(f"{name} is a {type(record).__name__}; it has to be a {kind.__name__}")
        self._name = name
        self._rest: dict[str, object] = dict(record)

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, kind: type[Value]) -> Value:
        """Of exactly this type: to Python a bool is an int too."""
        if name not in self._rest:
            raise InvalidMessageError(f"{self._name}.{name} is missing")
        value = self._rest.pop(name)
        if type(value) is not kind:
            raise InvalidMessageError(f"{self._name}.{name} is {show(value)}; it has to be a {kind.__name__}")
        return value

    def number(self, name: str, least: float = -LARGEST, most: float = LARGEST) -> float:
        """Finite, and from `least` to `most`."""
        value = self.take(name, float)
        if not (math.isfinite(value) and least <= value <= most):
            raise InvalidMessageError(
                f"{self._name}.{name} is {value}; it has to be finite, from {least:g} to {most:g}"
            )
        return value

    def count(self, name: str, least: int, most: int) -> int:
        value = self.take(name, int)
        if not least <= value <= most:
            raise InvalidMessageError(f"{self._name}.{name} is {show(value)}; it has to be from {least} to {most}")
        return value

    def divergences(self, name: str, number: int) -> tuple[float, ...]:
        """So many, finite, and 0 or more but for rounding."""
        values = self.take(name, list)
        if len(values) != number or not all(type(value) is float and -1e-6 <= value < math.inf for value in values):
            raise InvalidMessageError(
                f"{self._name}.{name} is {show(values)}; it has to be {number} finite floats, 0 or more"
            )
        return tuple(values)

    def end(self) -> None:
        """Refuse what nobody has taken."""
        if self._rest:
            raise InvalidMessageError(f"{self._name} has {show(sorted(self._rest))}, which nobody asked for")


def check_records(content: RecordDict, names: set[str]) -> None:
    """Exactly these records."""
    if set(content) != names:
        raise InvalidMessageError(
            f"the records are {show(sorted(content))}; they have to be {', '.join(sorted(names))}"
        )


def show(value: object) -> str:
    """Short, whatever it is that came in."""
    return reprlib.repr(value)
