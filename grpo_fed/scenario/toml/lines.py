"""Finds the line of every key in a TOML text, for error messages; `tomllib` does not report it.

The text has been parsed by `tomllib` before, so it is valid and is not checked again.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

KeyPath = tuple[str | int, ...]
"""The way from the root to a value, by keys of tables and indices of arrays, such as `("clients", 0, "env")`."""

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n,]|#[^\n]*)*")
"""What separates two statements, or two items of an array or inline table."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'")
_STRING = re.compile(
    r'"""(?:[^\\]|\\[\s\S])*?"""{1}"{0,2}|' + r"'''[\s\S]*?'''{1}'{0,2}|" + _QUOTED.pattern,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def line_numbers(text: str) -> dict[KeyPath, int]:
    """Find the line, counted from 1, on which each table, key and array item of a valid TOML text first occurs."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


def split_key(text: str) -> tuple[str, ...]:
    """Split a dotted key as TOML writes it: `trust.blocks."torso.*"` has three parts. ValueError if it is not a key."""
    scanner = _Scanner(text)
    parts = scanner.key()
    if scanner.at != len(text):
        raise ValueError(f"{text!r} is not a key")
    return parts


class _Scanner:
    """Walks once through a text, from its first character to its last."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        """The next character to read."""
        self.starts = [0, *(i + 1 for i, letter in enumerate(text) if letter == "\n")]
        self.lines: dict[KeyPath, int] = {}
        self.counts: dict[KeyPath, int] = {}
        """The number of tables that each array of tables has so far."""

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while True:
            self.take(_BLANK)
            if self.at >= len(self.text):
                return self.lines
            table = self.header() if self.text[self.at] == "[" else self.pair(table)

    def header(self) -> KeyPath:
        """Read `[a.b]` or `[[a.b]]` and return the path of the table that begins here."""
        line = self.line()
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        *parents, last = self.key()
        self.at += 2 if array else 1
        path: KeyPath = ()
        for part in parents:
            self.lines.setdefault((*path, part), line)
            path = self.newest((*path, part))
        path = (*path, last)
        if array:
            self.lines.setdefault(path, line)
            self.counts[path] = self.counts.get(path, 0) + 1
            path = self.newest(path)
        self.lines[path] = line
        return path

    def newest(self, path: KeyPath) -> KeyPath:
        """Return the last table of an array of tables, to which a header below it belongs; other paths as they are."""
        return (*path, self.counts[path] - 1) if path in self.counts else path

    def pair(self, table: KeyPath) -> KeyPath:
        """Read `a.b = value` inside `table`, and return `table`."""
        line = self.line()
        path = table
        for part in self.key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self.at += 1
        self.take(_SPACE)
        self.value(path)
        return table

    def key(self) -> tuple[str, ...]:
        """Read a dotted key and the space around it, and return its parts."""
        parts = []
        while True:
            self.take(_SPACE)
            part = self.take(_BARE) or self.take(_QUOTED)
            if not part:
                raise ValueError(f"{self.text!r} is not a key")
            parts.append(tomllib.loads(f"part = {part}")["part"] if part[0] in "\"'" else part)
            self.take(_SPACE)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def value(self, path: KeyPath) -> None:
        """Read a value and note the lines of what is inside."""
        opening = self.text[self.at]
        if opening in "\"'":
            self.take(_STRING)
        elif opening in "[{":
            self.items(path, opening)
        else:
            self.take(_SCALAR)

    def items(self, path: KeyPath, opening: str) -> None:
        """Read an array or an inline table."""
        self.at += 1
        self.take(_BLANK)
        index = 0
        while self.text[self.at] not in "]}":
            if opening == "{":
                self.pair(path)
            else:
                self.lines[(*path, index)] = self.line()
                self.value((*path, index))
                index += 1
            self.take(_BLANK)
        self.at += 1

    def take(self, pattern: re.Pattern[str]) -> str:
        """Read and return what the pattern matches here; empty if it does not match."""
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match.group() if match else ""

    def line(self) -> int:
        return bisect_right(self.starts, self.at)
