"""What the user wrote, where each key of it stands, and what `--set` puts on top of it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from grpo_fed.scenario.toml.lines import KeyPath, line_numbers, split_key
from grpo_fed.scenario.toml.text import closest_match, did_you_mean, short_toml, shorten, toml_key


class ScenarioError(ValueError):
    """All that is wrong, a line for each mistake: `file:line: key = value: what is wrong, what would be right`."""


SourcePosition = tuple[int, int]
"""(0, line of the file) or (1, number of the override): sorts as the user reads."""


@dataclass(frozen=True)
class Source:
    """What the user wrote, and where."""

    name: str
    """Of the file."""
    data: dict[str, Any]
    positions: dict[KeyPath, SourcePosition]
    overrides: list[str]

    @classmethod
    def of(cls, text: str, name: str) -> Source:
        """A TOML text; ScenarioError if it is none."""
        return cls(name, _parse(text, name), {path: (0, line) for path, line in line_numbers(text).items()}, [])

    def set(self, override: str) -> str | None:
        """Puts KEY=VALUE on top; gives back what is wrong with it, if something is."""
        key, equals, value = override.partition("=")
        try:
            if not equals:
                raise ValueError("must be KEY=VALUE, such as objective.clip=0.3")
            path = _assign(self.data, split_key(key), _value(value))
        except ValueError as error:
            return f"--set {_one_line(override)}: {error}"
        for replaced in [other for other in self.positions if other[: len(path)] == path]:
            del self.positions[replaced]
        for depth in range(1, len(path) + 1):
            self.positions.setdefault(path[:depth], (1, len(self.overrides)))
        self.overrides.append(override)
        return None

    def position(self, path: KeyPath) -> SourcePosition:
        """Of the key, or else of the innermost table around it."""
        around = (path[:depth] for depth in range(len(path), 0, -1))
        return next((self.positions[outer] for outer in around if outer in self.positions), (0, 1))

    def has(self, path: KeyPath) -> bool:
        """Whether the user gave this key."""
        return self.value(path) is not None

    def value(self, path: KeyPath) -> Any:
        """Of a key; None if the user did not give it."""
        value: Any = self.data
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            else:
                inside = isinstance(value, list) and isinstance(part, int) and part < len(value)
                value = value[part] if inside else None
        return value

    def key(self, path: KeyPath) -> str:
        """As one writes it for `--set`: the tables in a list by name where they have one."""
        return ".".join(toml_key(self._part(path[:depth], part)) for depth, part in enumerate(path))

    def _part(self, above: KeyPath, part: str | int) -> str:
        if isinstance(part, str):
            return part
        names = _names(self.value(above))
        name = names[part] if part < len(names) else None
        return name if name and names.count(name) == 1 else str(part)

    def line(self, path: KeyPath, text: str) -> str:
        """What is said of a key, with its place and its value before it."""
        kind, number = self.position(path)
        value = self.value(path)
        if kind:
            override = self.overrides[number]
            same = len(split_key(override.partition("=")[0])) == len(path)
            return f"--set {_one_line(override)}: {'' if same else f'{self.key(path)}: '}{text}"
        if value is None or isinstance(value, dict):
            return f"{self.name}:{number}: {self.key(path)}: {text}"
        told = f"{self.key(path)} = {short_toml(value)}"
        return f"{self.name}:{number}: {'' if text.startswith(told) else f'{told}: '}{text}"


def _one_line(text: str) -> str:
    return shorten(text.replace("\n", "\\n"))


def _assign(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> KeyPath:
    """Sets a value in nested tables and lists, making tables that are not there; ValueError where that cannot be."""
    here: Any = data
    path: KeyPath = ()
    for depth, key in enumerate(keys, start=1):
        step: Any = key
        if isinstance(here, list):
            step = _index(here, key, ".".join(keys[: depth - 1]))
        elif not isinstance(here, dict):
            raise ValueError(f"{'.'.join(keys[: depth - 1])} is {short_toml(here)}, not a table")
        path = (*path, step)
        if depth == len(keys):
            here[step] = value
        else:
            here = here[step] if isinstance(here, list) else here.setdefault(step, {})
    return path


def _index(items: list[Any], key: str, where: str) -> int:
    """Which item of a list a key means: by number or by name."""
    names = _names(items)
    if names.count(key) == 1:
        return names.index(key)
    if key in names:
        raise ValueError(f"{where} has {names.count(key)} called {key}; give the number of one, counted from 0")
    if not re.fullmatch("[0-9]+", key):
        known = [name for name in names if name]
        raise ValueError(f"{where} has none called {key}{did_you_mean(closest_match(key, known))}")
    if int(key) >= len(items):
        raise ValueError(f"{where} has no number {key}: it has {len(items)}, counted from 0")
    return int(key)


def _names(items: Any) -> list[str | None]:
    """What the tables in a list are called."""
    if not isinstance(items, list):
        return []
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [name if isinstance(name, str) else None for name in names]


def _value(text: str) -> Any:
    """The value of an override: TOML, or else a bare word."""
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text.startswith(("[", "{", '"', "'")):
            raise ValueError("the value is not TOML; is a quote or bracket missing, or eaten by the shell?") from None
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def read_text(path: FilePath) -> str:
    """The text of a file; ScenarioError if there is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        close = closest_match(path.name, beside)
        cure = did_you_mean(str(path.parent / close) if close else None)
        raise ScenarioError(f"{path}: there is no such file{cure}") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: must be text in UTF-8; byte {error.start} is not") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{name}:{_syntax(text, str(error))}") from None


def _syntax(text: str, error: str) -> str:
    """From `Invalid value (at line 3, column 8)` make `3: that line: not TOML: invalid value at column 8; the cure`."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    found = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", error)
    what = found[1][:1].lower() + found[1][1:] if found else error
    if found and found[2]:
        number, column = int(found[2]), int(found[3])
        rest = lines[number - 1][column - 1 :] if number <= len(lines) else ""
        where = f"at column {column}"
    else:
        number, rest, where = len(lines), "", "at the end of the file"
    line = shorten(lines[number - 1].strip()) if number <= len(lines) else ""
    return f"{number}: {line}: not TOML: {what} {where}{_syntax_cure(what, rest.partition('#')[0].strip())}"


def _syntax_cure(what: str, rest: str) -> str:
    """What was probably meant, from tomllib's words and the rest of the line."""
    if what == "invalid value" and rest.lower() in ("true", "false"):
        return f"; write {rest.lower()}"
    if what == "invalid value" and re.match("[A-Za-z_/]", rest):
        return f"; text needs quotes: {short_toml(rest)}"
    if what.startswith(("cannot overwrite", "cannot declare")):
        return "; it stands in the file twice"
    if what.startswith(("illegal character '\\n'", "unclosed", "unterminated")):
        return "; is a quote or bracket left open?"
    return ""
