"""The form of a summary's parts: sections of paragraphs, lists and tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[str, ...] = ()
    """Columns of text beside the first; all others hold numbers."""
    literal_columns: tuple[str, ...] = ()
    """Of these, columns of texts that somebody or a model wrote: backticks in them mark nothing."""


@dataclass(frozen=True)
class Section:
    """A part of a summary; backticks in its texts mark names."""

    title: str
    paragraphs: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    """A list below the paragraphs."""
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    """Names of the figures that belong here; those that a run does not have are left out."""
