"""What the user wrote, the position of every key in it, and the values that `--set` puts on top of it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fed.scenario.toml.lines import KeyPath, line_numbers, split_key
from grpo_fed.scenario.toml.text import closest_match, did_you_mean, short_toml, shorten, toml_key

MOST_NESTED = 50
"""How deep lists and tables may be in one another; what reads them calls itself for each."""
TOO_DEEP = f"lists and tables are nested more than {MOST_NESTED} deep; is a bracket or a dot repeated?"


class ScenarioError(ValueError):
    """Lists all mistakes of a scenario, one a line: `file:line: key = value: what is wrong; what to write instead`."""


SourcePosition = tuple[int, int]
"""(0, line of the file) or (1, number of the override): sorts in the order in which a user reads."""


@dataclass(frozen=True)
class Source:
    """What the user wrote in a file and on the command line, with the position of every key."""

    name: str
    """The file's name, as errors show it."""
    data: dict[str, Any]
    """The tables of the file, with the overrides applied."""
    positions: dict[KeyPath, SourcePosition]
    """Where each key is written: on a line of the file, or in the override that replaced it."""
    overrides: list[str]
    """The overrides that were applied, such as `objective.clip=0.3`."""

    @classmethod
    def parse(cls, text: str, name: str) -> Source:
        """Parse a TOML text; ScenarioError if it is not TOML."""
        data = _parse(text, name)
        if is_too_deep(data):
            raise ScenarioError(f"{name}: {TOO_DEEP}")
        return cls(name, data, {path: (0, line) for path, line in line_numbers(text).items()}, [])

    def apply_override(self, override: str) -> str | None:
        """Put KEY=VALUE on top of the file; returns a line of error if that is not possible."""
        key, equals, value = override.partition("=")
        try:
            if not equals:
                raise ValueError("must be KEY=VALUE, such as objective.clip=0.3")
            keys, parsed = split_key(key), _parse_value(value)
            if len(keys) > MOST_NESTED or is_too_deep(parsed):
                raise ValueError(TOO_DEEP)
            path = _assign(self.data, keys, parsed)
        except ValueError as error:
            return f"--set {_one_line(override)}: {error}"
        for replaced in [inner for inner in self.positions if inner[: len(path)] == path]:
            del self.positions[replaced]
        for depth in range(1, len(path) + 1):
            self.positions.setdefault(path[:depth], (1, len(self.overrides)))
        self.overrides.append(override)
        return None

    def position_at(self, path: KeyPath) -> SourcePosition:
        """Return the position of a key, or else of the innermost table around it."""
        prefixes = (path[:depth] for depth in range(len(path), 0, -1))
        return next((self.positions[prefix] for prefix in prefixes if prefix in self.positions), (0, 1))

    def has_key(self, path: KeyPath) -> bool:
        """Whether the user gave this key."""
        return self.value_at(path) is not None

    def value_at(self, path: KeyPath) -> Any:
        """Return the value of a key; None if the user did not give it."""
        value: Any = self.data
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            else:
                is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
                value = value[part] if is_index else None
        return value

    def dotted_key(self, path: KeyPath) -> str:
        """Write a key as `--set` takes it: a table in a list by its name, if the name is its own, else by its index."""
        return ".".join(toml_key(self._part(path[:depth], part)) for depth, part in enumerate(path))

    def _part(self, above: KeyPath, part: str | int) -> str:
        if isinstance(part, str):
            return part
        names = _names(self.value_at(above))
        name = names[part] if part < len(names) else None
        return name if name and names.count(name) == 1 else str(part)

    def error_line(self, path: KeyPath, text: str) -> str:
        """Write a line of error about a key, beginning with the key's place and value."""
        kind, number = self.position_at(path)
        value = self.value_at(path)
        if kind:
            override = self.overrides[number]
            is_whole_value = len(split_key(override.partition("=")[0])) == len(path)
            return f"--set {_one_line(override)}: {'' if is_whole_value else f'{self.dotted_key(path)}: '}{text}"
        if value is None or isinstance(value, dict):
            return f"{self.name}:{number}: {self.dotted_key(path)}: {text}"
        key_and_value = f"{self.dotted_key(path)} = {short_toml(value)}"
        return f"{self.name}:{number}: {'' if text.startswith(key_and_value) else f'{key_and_value}: '}{text}"


def is_too_deep(value: Any) -> bool:
    """Whether lists and tables are in one another more than `MOST_NESTED` deep."""
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _one_line(text: str) -> str:
    return shorten(text.replace("\n", "\\n"))


def _assign(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> KeyPath:
    """Set a value in nested tables and lists, making missing tables; ValueError where that is not possible."""
    container: Any = data
    path: KeyPath = ()
    for depth, key in enumerate(keys, start=1):
        part: Any = key
        if isinstance(container, list):
            part = _index(container, key, ".".join(keys[: depth - 1]))
        elif not isinstance(container, dict):
            raise ValueError(f"{'.'.join(keys[: depth - 1])} is {short_toml(container)}, not a table")
        path = (*path, part)
        if depth == len(keys):
            container[part] = value
        else:
            container = container[part] if isinstance(container, list) else container.setdefault(part, {})
    return path


def _index(items: list[Any], key: str, list_name: str) -> int:
    """Return the index of the item that a key means, by its number or its name."""
    names = _names(items)
    if names.count(key) == 1:
        return names.index(key)
    if key in names:
        raise ValueError(f"{list_name} has {names.count(key)} items called {key}; use an index, counted from 0")
    if not re.fullmatch("[0-9]+", key):
        suggestion = did_you_mean(closest_match(key, [name for name in names if name]))
        raise ValueError(f"{list_name} has no item called {key}{suggestion}")
    if int(key) >= len(items):
        raise ValueError(f"{list_name} has no item {key}: it has {len(items)}, counted from 0")
    return int(key)


def _names(items: Any) -> list[str | None]:
    """List the names of the tables in a list, None for a table without one."""
    if not isinstance(items, list):
        return []
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [name if isinstance(name, str) else None for name in names]


def _parse_value(text: str) -> Any:
    """Parse the value of an override, which is TOML or a bare word."""
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        if text.startswith(("[", "{", '"', "'")):
            message = "the value is not TOML; is a quote or bracket missing, or did the shell remove it?"
            raise ValueError(message) from None
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def read_text(path: Path) -> str:
    """Read a text file; ScenarioError if that is not possible."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        files = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        similar = closest_match(path.name, files)
        cure = did_you_mean(str(path.parent / similar) if similar else None)
        raise ScenarioError(f"{path}: there is no such file{cure}") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: must be text in UTF-8; byte {error.start} is not") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ScenarioError(f"{name}: {TOO_DEEP}") from None
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{name}:{_explain_syntax_error(text, str(error))}") from None


def _explain_syntax_error(text: str, error: str) -> str:
    """From `Invalid value (at line 3, column 8)` make `3: that line: not TOML: invalid value at column 8; the cure`."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    match = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", error)
    message = match[1][:1].lower() + match[1][1:] if match else error
    if match and match[2]:
        number, column = int(match[2]), int(match[3])
        rest = lines[number - 1][column - 1 :] if number <= len(lines) else ""
        where = f"at column {column}"
    else:
        number, rest, where = len(lines), "", "at the end of the file"
    line = shorten(lines[number - 1].strip()) if number <= len(lines) else ""
    return f"{number}: {line}: not TOML: {message} {where}{_syntax_cure(message, rest.partition('#')[0].strip())}"


def _syntax_cure(message: str, rest: str) -> str:
    """Guess what was meant, from tomllib's message and the rest of the line."""
    if message == "invalid value" and rest.lower() in ("true", "false"):
        return f"; write {rest.lower()}"
    if message == "invalid value" and re.match("[A-Za-z_/]", rest):
        return f"; text needs quotes: {short_toml(rest)}"
    if message.startswith(("cannot overwrite", "cannot declare")):
        return "; it is in the file twice"
    if message.startswith(("illegal character '\\n'", "unclosed", "unterminated")):
        return "; is a quote or bracket left open?"
    return ""
