"""A run as tables for other programs, as CSV or in pandas: a row for each client and round, or for each client."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import CSV_FILES
from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.metrics import TEXTS

Row = Mapping[str, Any]


def round_rows(history: History) -> list[Row]:
    """Make a row for each client and round that `rounds.jsonl` has: the round, the client, its entry and its numbers.

    Columns `server:...` repeat the numbers of the whole round, such as its bytes, in every row of it.
    """
    entry_of = dict(zip(history.clients, history.entries, strict=True))
    env_of = dict(zip(history.clients, history.envs, strict=True))
    rows: list[Row] = []
    for line in history.lines:
        server = {f"server:{key}": value for key, value in line.items() if _is_number(key, value) and key != "round"}
        for name, client in line["clients"].items():
            numbers = {key: value for key, value in client.items() if _is_number(key, value)}
            place = {"round": line["round"], "client": name, "entry": entry_of.get(name), "env": env_of.get(name)}
            rows.append({**place, **numbers, **server})
    return rows


def client_rows(history: History) -> list[Row]:
    """Make a row for each client of the results: its returns before and after, its steps, and what it departed from."""
    results = {} if history.results is None else history.results["clients"]
    rows: list[Row] = []
    for index, name in enumerate(history.clients):
        client = results.get(name, {})
        numbers = {key: value for key, value in client.items() if isinstance(value, int | float | str | None)}
        departed = " ".join(history.personal[name])
        place = {"client": name, "entry": history.entries[index], "env": history.envs[index]}
        rows.append({**place, **numbers, "departed": departed, "trains": bool(history.trains[index])})
    return rows


def write_csv(folder: str | Path) -> list[Path]:
    """Write `rounds.csv` and `clients.csv` of a run's folder; ValueError if it holds no run."""
    folder = Path(folder)
    history, paths = read_history(folder), [folder / name for name in CSV_FILES]
    for path, rows in zip(paths, (round_rows(history), client_rows(history)), strict=True):
        write_atomic(path, csv_text(rows))
    return paths


def csv_text(rows: Sequence[Row]) -> str:
    """Write rows as CSV, with a head of all columns; a number that is unknown is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def columns_of(rows: Iterable[Row]) -> list[str]:
    """List the columns of rows, in the order in which they come first."""
    return list(dict.fromkeys(key for row in rows for key in row))


def read_pandas(folder: str | Path, by: Literal["round", "client"] = "round") -> Any:
    """Read a run's folder as a table of pandas.

    by: `round` for a row for each client and round, `client` for a row for each client.
    """
    pandas: Any = import_module("pandas")  # it has no types

    if by not in ("round", "client"):
        raise ValueError(f"by = {by!r}: must be round or client")
    history = read_history(folder)
    rows = round_rows(history) if by == "round" else client_rows(history)
    return pandas.DataFrame.from_records(list(rows), columns=columns_of(rows))


def _is_number(key: str, value: object) -> bool:
    return key not in TEXTS and (value is None or isinstance(value, int | float))
