"""Words of clients and scenarios in Markdown: they are shown as they are, and make no link, image, code or HTML."""

from __future__ import annotations

import re

CODE = re.compile(r"(`[^`\n]*`)")
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])[(\[]|(?<=!)\[|\\(?=[!-/:-@\[-`{-~])")
"""What begins HTML or an automatic link, turns brackets into a link or an image, or escapes a sign."""
BLOCK = "#>-+*=[|~"
"""What at the beginning of a line makes it a heading, a quote, a list, a table or the address of a link."""


def plain(text: str) -> str:
    """Put a foreign text on one line, without the backticks by which our texts mark names as code."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.replace("`", "'").split())


def escape_markdown(text: str) -> str:
    """Escape what is more than letters in Markdown, but for `code` in backticks."""
    parts = CODE.split(text)
    escaped = "".join(part if part.startswith("`") else MARKUP.sub(r"\\\g<0>", part) for part in parts)
    return f"\\{escaped}" if escaped.startswith(tuple(BLOCK)) else escaped
