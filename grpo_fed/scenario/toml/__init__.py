"""Reads TOML strictly, and says what is wrong with it; it knows no scenario.

    source.py   a TOML text with the position of every key, and values set from outside
    lines.py    the line of every key
    reading.py  from TOML to a pydantic model, with all mistakes at once
    text.py     values as TOML writes them, and errors in plain words

Begin with reading.py.
"""
