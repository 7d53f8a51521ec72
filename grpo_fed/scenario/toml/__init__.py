"""Reads TOML strictly into a pydantic model and explains every mistake; it knows nothing of scenarios.

    reading.py   from TOML to a model and back, with all mistakes at once
    source.py    a TOML text with the position of every key, and `--set` on top of it
    lines.py     the line of every key
    mistakes.py  what is wrong with a key, and what the user probably meant
    keys.py      the keys of a model of sections
    text.py      values as TOML writes them, and errors in plain words

Begin with reading.py.
"""
