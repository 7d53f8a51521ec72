"""Where the prompts of a client come from: a function, a file, or a task of reasoning-gym.

A row is a prompt with its other columns, such as the right answer, which rewards are given. Rows are drawn by number:
the `number`-th draw depends on the client's stream and on nothing that was drawn before, so that no source has a state
to save, and a run that is resumed continues with the same prompts.

Of each client two sources are opened, one to train on and one to evaluate on (`open_prompts`).
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from grpo_fed.scenario.extras import write_install_command
from grpo_fed.scenario.field_types import IMPORT_PATH
from grpo_fed.scenario.importing import describe_exception, import_object
from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.tasks.task import MissingPackageError, TaskError

Row: TypeAlias = Mapping[str, Any]
"""A prompt and its other columns. `row["prompt"]` is text, or a list of chat messages {"role": ..., "content": ...}."""
Stream: TypeAlias = Callable[[int], np.random.Generator]
"""Returns the `number`-th generator of a client's stream; equal numbers give equal generators."""

REASONING_GYM = "reasoning_gym:"
"""What a source begins with that is a task of reasoning-gym."""
_FILES = (".jsonl", ".parquet")

# Sources -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSource(ABC):
    """Where rows are drawn from."""

    client: str
    """The client's name."""
    name: str
    """What errors call the source: its key and value in the scenario, such as `prompts: questions.jsonl`."""

    @abstractmethod
    def rows(self, stream: Stream, number: int, count: int) -> list[Row]:
        """Draw `count` rows, for the `number`-th time; all have the same columns.

        stream: the client's own; the rows depend on it, on `number` and on `count` alone.
        """


@dataclass(frozen=True)
class FunctionPrompts(PromptSource):
    """Rows that a function of the user makes, called as `function(generator, count, **kwargs)`."""

    function: Callable[..., Any]
    kwargs: Mapping[str, Any]

    def rows(self, stream: Stream, number: int, count: int) -> list[Row]:
        """Call the function with the `number`-th generator; TaskError if it fails or returns something else."""
        try:
            rows = self.function(stream(number), count, **self.kwargs)
        except Exception as error:
            raise TaskError(self.client, self.name, describe_exception(error)) from error
        if not isinstance(rows, list) or len(rows) != count:
            returned = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
            problem = f"returned {returned}; it must return a list of {count} rows"
            raise TaskError(self.client, self.name, problem)
        for index, row in enumerate(rows):
            problem = _problem_of_row(row, rows[0])
            if problem:
                raise TaskError(self.client, self.name, f"row {index} {problem}")
        return rows


@dataclass(frozen=True)
class FilePrompts(PromptSource):
    """Rows of a file, all of which are drawn once before any is drawn again."""

    contents: Sequence[Row]
    """All rows, in the order of the file."""

    def rows(self, stream: Stream, number: int, count: int) -> list[Row]:
        """Return the rows at positions number * count, ..., number * count + count - 1 of an endless sequence.

        The sequence goes through the file again and again, the e-th time in the order that `stream(e)` permutes it to.
        It is gone through without gaps if all draws from a stream have the same `count`.
        """
        passes, positions = np.divmod(np.arange(number * count, (number + 1) * count), len(self.contents))
        orders = {index: stream(index).permutation(len(self.contents)) for index in np.unique(passes).tolist()}
        indices = [orders[index][position] for index, position in zip(passes.tolist(), positions, strict=True)]
        return [copy.deepcopy(self.contents[index]) for index in indices]  # a reward may change what it is given


@dataclass(frozen=True)
class ReasoningPrompts(PromptSource):
    """Rows that a task of reasoning-gym makes.

    Their columns: `prompt`, the question; `answer`; `entry`, the task's own record of the question; and `score_answer`,
    the task's function of an answer and an entry.
    """

    task: str
    """The task's name in reasoning-gym, such as `chain_sum`."""
    kwargs: Mapping[str, Any]

    def rows(self, stream: Stream, number: int, count: int) -> list[Row]:
        """Make a data set of `count` questions with a seed from the `number`-th generator; TaskError if that fails."""
        seed = int(stream(number).integers(2**31))
        try:
            dataset = _reasoning_gym().create_dataset(self.task, seed=seed, size=count, **self.kwargs)
            entries = [dataset[index] for index in range(count)]
        except Exception as error:
            raise TaskError(self.client, self.name, describe_exception(error)) from error
        score = dataset.score_answer
        return [
            {"prompt": entry["question"], "answer": entry["answer"], "entry": entry, "score_answer": score}
            for entry in entries
        ]


# Opening -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptPair:
    """The two sources of a client."""

    train: PromptSource
    evaluate: PromptSource
    """Its prompts are apart from those to train on: from `eval_prompts`, from the end of the file, or, for a function
    and for reasoning-gym, from the same source as long as it is given another stream."""


def open_prompts(client: str, settings: ClientSettings, folder: Path | None = None) -> PromptPair:
    """Open the sources that a client trains and is evaluated on.

    settings: `kwargs` are for the function or the reasoning-gym task of `prompts`, and of `eval_prompts` too.
    folder: what the paths of files are relative to; the working directory if not given.

    ValueError, with the cause and a cure, if a source cannot be opened. It is a MissingPackageError where another
    machine may have what is missing here.
    """
    named = {"prompts": settings.prompts, "eval_prompts": settings.eval_prompts}
    keys = {key: source for key, source in named.items() if source is not None}
    if "prompts" not in keys:
        raise ValueError(f"client {client}: prompts: missing; it must be {_ALLOWED}")
    if settings.kwargs and all(is_prompt_file(source) for source in keys.values()):
        raise ValueError(f"client {client}: kwargs = {settings.kwargs}: a file of prompts takes none; remove them")
    opened = {key: _open_source(client, key, source, settings.kwargs, folder) for key, source in keys.items()}
    train = opened["prompts"]
    if "eval_prompts" in opened:
        return PromptPair(train, opened["eval_prompts"])
    return _split_file(train, settings.held_out) if isinstance(train, FilePrompts) else PromptPair(train, train)


def is_prompt_file(source: str) -> bool:
    """Return whether a source is the path of a file."""
    return source.lower().endswith(_FILES)


_ALLOWED = (
    '"module:function", the path of a .jsonl or .parquet file, or "reasoning_gym:NAME", such as reasoning_gym:chain_sum'
)


def _split_file(source: FilePrompts, held_out: float) -> PromptPair:
    """Keep the last rows of a file for evaluation, at least one."""
    where, rows = f"client {source.client}: {source.name}", source.contents
    if held_out == 0:
        raise ValueError(
            f"{where}: held_out = 0 leaves no prompts for evaluation; give eval_prompts, or a held_out above 0"
        )
    cut = len(rows) - max(round(len(rows) * held_out), 1)
    if cut < 1:
        raise ValueError(
            f"{where}: has {len(rows)} rows, and held_out = {held_out} leaves none to train on; lower held_out, or give"
            " eval_prompts"
        )
    return PromptPair(
        FilePrompts(source.client, source.name, rows[:cut]), FilePrompts(source.client, source.name, rows[cut:])
    )


def _open_source(client: str, key: str, source: str, kwargs: Mapping[str, Any], folder: Path | None) -> PromptSource:
    """Open the source that a key of the scenario names."""
    where, name = f"client {client}: {key}: {source}", f"{key}: {source}"
    if source.startswith(REASONING_GYM):
        task = source.removeprefix(REASONING_GYM)
        _check_reasoning_task(where, task, kwargs)
        return ReasoningPrompts(client, name, task, kwargs)
    if is_prompt_file(source):
        return FilePrompts(client, name, read_rows(where, (folder or Path()) / source))
    if not re.fullmatch(IMPORT_PATH, source):
        raise ValueError(f"{where}: must be {_ALLOWED}")
    try:
        function = import_object(source)
    except ValueError as error:
        error_type = MissingPackageError if isinstance(error.__cause__, ModuleNotFoundError) else ValueError
        raise error_type(f"{where}: {error}") from error
    if not callable(function):
        raise ValueError(f"{where}: is a {type(function).__name__}, not a function")
    return FunctionPrompts(client, name, function, kwargs)


# Files ---------------------------------------------------------------------------------------------------------------


def read_rows(where: str, path: Path) -> list[Row]:
    """Read all rows of a .jsonl or .parquet file; a column that a row does not have becomes None.

    where: what errors call the file. ValueError names the line or row that is wrong.
    """
    if not path.is_file():
        raise MissingPackageError(f"{where}: there is no file {path.absolute()}")
    numbered = list(_read_jsonl(where, path) if path.suffix.lower() == ".jsonl" else _read_parquet(where, path))
    if not numbered:
        raise ValueError(f"{where}: the file has no rows")
    for place, row in numbered:
        problem = _problem_of_row(row)
        if problem:
            raise ValueError(f"{where}: {place} {problem}")
    columns = dict.fromkeys(column for _, row in numbered for column in row)
    return [columns | row for _, row in numbered]


def _read_jsonl(where: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Read the value of each line that is not blank, with the line's place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8: {error}; save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split within text
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: line {number} is no JSON: {error}") from error


def _read_parquet(where: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Read the rows of a parquet file, with their places."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{where}: needs pyarrow: pip install pyarrow ({error})") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:
        raise ValueError(f"{where}: cannot be read: {describe_exception(error)}") from error
    for number, row in enumerate(rows):
        yield f"row {number}", row


# Rows ----------------------------------------------------------------------------------------------------------------


def _problem_of_row(row: object, first: Row | None = None) -> str:
    """Say what is wrong with a row, "" for nothing; its columns must be those of the row `first`."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}; it must be a mapping with a key prompt"
    if "prompt" not in row:
        return f"has no key prompt, only {', '.join(map(str, row)) or 'none at all'}"
    if first is not None and row.keys() != first.keys():
        keys, first_keys = (", ".join(map(str, part)) for part in (row, first))
        return f"has the keys {keys}, and row 0 has {first_keys}; give all rows the same"
    return _problem_of_prompt(row["prompt"])


def _problem_of_prompt(prompt: object) -> str:
    """Say what is wrong with a prompt, "" for nothing."""
    if isinstance(prompt, str):
        return ""
    messages = prompt if isinstance(prompt, list) and prompt else [None]
    if all(isinstance(part, Mapping) and _has_text(part, "role") and _has_text(part, "content") for part in messages):
        return ""
    found = f"{prompt!r}"
    return (
        f"has the prompt {found[:60]}{'...' if len(found) > 60 else ''}; it must be text, or a list of messages with a"
        " role and a content, both text"
    )


def _has_text(message: Mapping[str, Any], key: str) -> bool:
    return isinstance(message.get(key), str)


# reasoning-gym -------------------------------------------------------------------------------------------------------


def _reasoning_gym() -> Any:
    """Import reasoning-gym, which only a scenario that names it needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports, cellpylib
        return importlib.import_module("reasoning_gym")


def _check_reasoning_task(where: str, task: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if reasoning-gym has no such task, or if it cannot be made with these arguments."""
    try:
        gym = _reasoning_gym()
    except ModuleNotFoundError as error:
        cure = write_install_command("reasoning")
        raise MissingPackageError(f"{where}: needs a package that is not installed: {cure} ({error})") from error
    known = list(gym.factory.DATASETS)
    if task not in known:
        similar = difflib.get_close_matches(task, known, n=3)
        cure = f"did you mean {' or '.join(similar)}?" if similar else "its GALLERY.md lists all"
        raise ValueError(f"{where}: reasoning-gym has no task {task!r}; {cure}")
    drawn = sorted({"seed", "size"} & set(kwargs))
    if drawn:
        raise ValueError(f"{where}: kwargs.{drawn[0]} = {kwargs[drawn[0]]!r}: it is drawn for each batch; remove it")
    try:
        gym.create_dataset(task, seed=0, size=1, **kwargs)
    except Exception as error:
        raise ValueError(f"{where}: cannot be made with kwargs = {kwargs}: {describe_exception(error)}") from error
