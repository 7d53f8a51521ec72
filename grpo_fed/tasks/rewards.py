r"""What completions are rewarded for: functions with the signature of TRL's rewards, and their weighted sum.

A reward is called as TRL's GRPOTrainer calls it,

    function(prompts=[...], completions=[...], completion_ids=[...], log_extra=..., log_metric=..., **columns)

and returns a number, or None, for each completion; None leaves the completion out of this reward. Prompts are text and
so are completions; where a prompt is a list of chat messages, its completion is `[{"role": "assistant", "content":
text}]`. Each column of the prompts is a list with the value of each completion. A function that is written for TRL
works unchanged unless it needs a `trainer_state` or `environments`. What it logs is not kept.

A scenario names a reward of shipped_rewards.py, or an object of the user by its import path: a function, an instance
that can be called, or a class, of which one instance is made with `kwargs`. This is the way to use a learned reward
model: its class loads it once.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_fed.scenario.importing import describe_exception, import_object
from grpo_fed.scenario.settings import ClientSettings, RewardSettings
from grpo_fed.tasks.prompts import REASONING_GYM, Row
from grpo_fed.tasks.shipped_rewards import SHIPPED_REWARDS, score_answers
from grpo_fed.tasks.task import MissingPackageError, TaskError

_ALWAYS_PASSED = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")
_NOT_PASSED = ("trainer_state", "environments")

# Rewards of a client -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardFunction:
    """One reward of a client."""

    name: str
    """As the scenario has it: the name of a shipped reward, or an import path."""
    function: Callable[..., Any]
    weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """More keyword arguments; they take the place of columns with the same names."""


@dataclass(frozen=True)
class Rewards:
    """The R rewards of a client."""

    functions: tuple[RewardFunction, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Short names of the rewards, all different: "exact", and "right" of `my.rewards:right`."""
        short = [reward.name.rpartition(":")[2] for reward in self.functions]
        seen: Counter[str] = Counter()
        names = []
        for name in short:
            seen[name] += 1
            names.append(f"{name}-{seen[name]}" if short.count(name) > 1 else name)
        return tuple(names)

    def score(
        self,
        client: str,
        rows: Sequence[Row],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """Return the rewards of N completions, [N, R]; NaN where a function returned None.

        rows: of each completion the row of its prompt, so a row is repeated for each of its completions.
        completion_ids: the tokens of each completion.

        TaskError, with the client, the function and a prompt, if a function fails or returns something else.
        """
        if not (len(rows) == len(completions) == len(completion_ids)):
            raise ValueError(f"{len(rows)} rows, {len(completions)} completions, {len(completion_ids)} of tokens")
        scores = np.empty((len(rows), len(self.functions)))
        if len(rows):
            arguments = _arguments(rows, completions, completion_ids)
            for index, reward in enumerate(self.functions):
                scores[:, index] = _score_function(client, reward, arguments)
        return scores

    def total(self, scores: np.ndarray) -> np.ndarray:
        """Return the weighted sum of the rewards that are not NaN, [N, R] -> [N]; NaN where all of them are.

        Such a completion has no reward and is to be left out.
        """
        weights = np.array([reward.weight for reward in self.functions])
        total: np.ndarray = np.nansum(scores * weights, axis=1)
        return np.where(np.isnan(scores).all(axis=1), np.nan, total)


# Opening -------------------------------------------------------------------------------------------------------------


def open_rewards(client: str, settings: ClientSettings) -> Rewards:
    """Open the rewards of a client: those of its settings, or those of its reasoning-gym task if there are none.

    ValueError, with the cause and a cure, if one cannot be opened. It is a MissingPackageError where another machine
    may have what is missing here.
    """
    if settings.rewards:
        return Rewards(tuple(_open_reward(client, reward) for reward in settings.rewards))
    sources = [source for source in (settings.prompts, settings.eval_prompts) if source is not None]
    if sources and all(source.startswith(REASONING_GYM) for source in sources):
        return Rewards((RewardFunction("reasoning_gym", score_answers),))
    own = next((source for source in sources if not source.startswith(REASONING_GYM)), None)
    raise ValueError(
        f"client {client}: rewards: none, and {own} has none of its own, as only reasoning-gym has; give some, such as"
        ' [{ function = "exact" }]'
    )


def _open_reward(client: str, settings: RewardSettings) -> RewardFunction:
    """Find the function of a reward, and check its arguments as far as that is possible without completions."""
    name, kwargs, where = settings.function, settings.kwargs, f"client {client}: rewards: {settings.function}"
    if name in SHIPPED_REWARDS:
        function: Any = SHIPPED_REWARDS[name]
        kwargs = _defaults(function) | kwargs  # so that no column of the prompts takes the place of a default
        _check_shipped(where, function, kwargs, settings.kwargs)
        return RewardFunction(name, function, settings.weight, kwargs)
    try:
        function = import_object(name)
    except ValueError as error:
        error_type = MissingPackageError if isinstance(error.__cause__, ModuleNotFoundError) else ValueError
        raise error_type(f"{where}: {error}") from error
    if inspect.isclass(function):
        try:
            function, kwargs = function(**kwargs), {}
        except Exception as error:
            raise ValueError(f"{where}: cannot be made with kwargs = {kwargs}: {describe_exception(error)}") from error
    if not callable(function):
        raise ValueError(f"{where}: is a {type(function).__name__}, which cannot be called")
    _check_signature(where, function)
    return RewardFunction(name, function, settings.weight, kwargs)


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function that have defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {part.name: part.default for part in parameters if part.default is not part.empty}


def _check_shipped(where: str, function: Callable[..., Any], kwargs: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError if a shipped reward has no such arguments, or not with these values."""
    columns = {"completions", "completion_ids", "answer"}
    parameters = [part for part in inspect.signature(function).parameters.values() if part.name not in columns]
    accepted = [part.name for part in parameters if part.kind is not part.VAR_KEYWORD]
    listed = ", ".join(accepted) or "none"
    for key in given:
        if key not in accepted:
            raise ValueError(f"{where}: kwargs.{key}: there is no such argument; it has {listed}")
    missing = [part.name for part in parameters if part.name in accepted and part.name not in kwargs]
    if missing:
        raise ValueError(f"{where}: kwargs.{missing[0]}: missing; it has {listed}")
    try:
        function(completions=[], completion_ids=[], answer=[], **kwargs)
    except Exception as error:
        raise ValueError(f"{where}: kwargs = {given}: {describe_exception(error)}") from error


def _check_signature(where: str, function: Callable[..., Any]) -> None:
    """Raise ValueError if a function cannot be called as TRL calls a reward, or needs what only TRL's trainer has."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return  # of a function in C; calling it will show
    for name in _NOT_PASSED:
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{where}: needs {name}, which only TRL's trainer has; give it a default")
    takes_all = any(part.kind is part.VAR_KEYWORD for part in parameters.values())
    if not takes_all and not set(_ALWAYS_PASSED) <= set(parameters):
        raise ValueError(f"{where}: must take **kwargs: it is called with {', '.join(_ALWAYS_PASSED)} and all columns")


# Scoring -------------------------------------------------------------------------------------------------------------


def _arguments(
    rows: Sequence[Row], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return the keyword arguments that all rewards are called with, as TRL has them."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    prompts = [row["prompt"] for row in rows]
    return columns | {
        "prompts": prompts,
        "completions": [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ],
        "completion_ids": [list(tokens) for tokens in completion_ids],
        "log_extra": _ignore_log,
        "log_metric": _ignore_log,
    }


def _ignore_log(name: str, values: object) -> None:
    """Take what a reward would log to TRL's trainer."""


def _score_function(client: str, reward: RewardFunction, arguments: dict[str, Any]) -> list[float]:
    """Call one reward and return its N numbers, NaN for None."""
    prompts = arguments["prompts"]

    def failure(problem: str, index: int = 0) -> TaskError:
        prompt = f" (prompt {index + 1} of {len(prompts)}: {_shorten(prompts[index])})"
        return TaskError(client, f"rewards: {reward.name}", problem + prompt)

    missing = _missing_columns(reward, arguments)
    if missing:
        columns = [key for key in arguments if key not in _ALWAYS_PASSED]
        raise failure(f"needs the column {missing[0]}, and besides prompt there is {', '.join(columns) or 'none'}")
    try:
        returned = reward.function(**{**arguments, **reward.kwargs})
        if inspect.iscoroutine(returned):
            returned = _wait_for(returned)
        values = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str | Mapping) else None
    except Exception as error:
        raise failure(describe_exception(error)) from error
    if values is None:
        raise failure(f"returned a {type(returned).__name__}; it must return a list")
    if len(values) != len(prompts):
        raise failure(f"returned {len(values)} rewards for {len(prompts)} completions")
    numbers = [_number(value) for value in values]
    for index, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if number is None or math.isinf(number) or (math.isnan(number) and value is not None):
            cure = "; return None to leave a completion out" if number is not None else ""
            raise failure(f"returned {value!r}, which is no finite number{cure}", index)
    return [number for number in numbers if number is not None]


def _missing_columns(reward: RewardFunction, arguments: Mapping[str, Any]) -> list[str]:
    """List the arguments that a function needs and that are neither columns nor given."""
    return [name for name in _needed(reward.function) if name not in {*arguments, *reward.kwargs}]


def _needed(function: Callable[..., Any]) -> Iterator[str]:
    """Find the arguments of a function that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    for part in parameters:
        if part.default is part.empty and part.kind in (part.POSITIONAL_OR_KEYWORD, part.KEYWORD_ONLY):
            yield part.name


def _wait_for(coroutine: Any) -> Any:
    """Run a coroutine to its end in an event loop of its own; its thread is new, as this one may run a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _number(value: Any) -> float | None:
    """Return a reward as a number, NaN for None; None if it is no number."""
    if value is None:
        return math.nan
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shorten(prompt: Any) -> str:
    """Return the beginning of a prompt on one line; of chat messages, that of the last one."""
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
