"""Converts between policies, which use flat floats, and environments, whose spaces have shapes and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector.utils import iterate

from grpo_fed.tasks.action_spaces import action_parts, is_nested, nest, rows_of
from grpo_fed.tasks.gym_task import GymTask, Space
from grpo_fed.tasks.pictures import picture_shape


@final
class ActionConverter:
    """Converts actions of policies into those of environments, for tasks whose actions have one shape and type."""

    def __init__(self, tasks: GymTask | Sequence[GymTask], squash: bool) -> None:
        """tasks: one for each row of actions, or one for all rows. squash: map real numbers onto their box by tanh."""
        rows = [tasks] if isinstance(tasks, GymTask) else tasks
        space, kind = rows[0].action_space, rows[0].action.kind
        self.shape = (-1, *(space.shape or ()))
        self.dtype = np.dtype(space.dtype)
        self.start = np.array([row.action.start for row in rows]).astype(self.dtype)
        # the bounds of a box of whole numbers are those of the floats that are rounded to them
        self.is_whole = self.dtype.kind != "f"
        self.float_dtype = np.dtype(np.float64) if self.is_whole else self.dtype
        self.low = np.array([row.action.low for row in rows], self.float_dtype)
        self.high = np.array([row.action.high for row in rows], self.float_dtype)
        self.is_bounded = bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())
        self.convert = self._to_options
        if kind == "gaussian":
            self.convert = self._squash if squash else self._clip

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions, [L, A] floats -> [L, ...], new, of the environments' shape and type."""
        return self.convert(actions)

    def _to_options(self, actions: np.ndarray) -> np.ndarray:
        options: np.ndarray = np.rint(actions).astype(self.dtype)
        options += self.start
        return options.reshape(self.shape)

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        clipped = actions.astype(self.float_dtype)
        if self.is_bounded:
            np.minimum(np.maximum(clipped, self.low, out=clipped), self.high, out=clipped)
        return self._to_space(clipped)

    def _squash(self, actions: np.ndarray) -> np.ndarray:
        share = (np.tanh(actions, dtype=np.float64) + 1) / 2
        squashed = self.low + share * (self.high - self.low)
        return self._to_space(np.minimum(squashed, self.high).astype(self.float_dtype))

    def _to_space(self, values: np.ndarray) -> np.ndarray:
        return (np.rint(values).astype(self.dtype) if self.is_whole else values).reshape(self.shape)


@final
class NestedActionConverter:
    """Converts actions of policies into samples of a Tuple or a Dict, part by part."""

    def __init__(self, tasks: GymTask | Sequence[GymTask], squash: bool) -> None:
        """tasks, squash: as for `ActionConverter`."""
        rows = [tasks] if isinstance(tasks, GymTask) else tasks
        self.space = rows[0].action_space
        parts = {id(row): action_parts(row.action_space) for row in rows}
        self.columns = [part.columns for part in parts[id(rows[0])]]
        self.converters = []
        for number in range(len(self.columns)):
            leaves = {
                id(row): replace(row, action_space=parts[id(row)][number].space, action=parts[id(row)][number].action)
                for row in rows
            }
            self.converters.append(ActionConverter([leaves[id(row)] for row in rows], squash))

    def __call__(self, actions: np.ndarray) -> list[Any]:
        """Convert actions, [L, A] floats, into one sample for each row."""
        parts = [rows_of(values) for values in self._convert(actions)]
        return [nest(self.space, iter(values)) for values in zip(*parts, strict=True)]

    def batched(self, actions: np.ndarray) -> Any:
        """Convert actions, [L, A] floats, into one sample of arrays [L, ...], as vector environments take them."""
        return nest(self.space, self._convert(actions))

    def _convert(self, actions: np.ndarray) -> Iterator[np.ndarray]:
        for columns, convert in zip(self.columns, self.converters, strict=True):
            yield convert(actions[:, columns])


def make_action_converter(
    tasks: GymTask | Sequence[GymTask], squash: bool
) -> Callable[[np.ndarray], np.ndarray | list[Any]]:
    """Make the function that turns actions [L, A] of policies into L actions of environments."""
    first = tasks if isinstance(tasks, GymTask) else tasks[0]
    return NestedActionConverter(tasks, squash) if is_nested(first.action_space) else ActionConverter(tasks, squash)


def make_batch_converter(tasks: GymTask | Sequence[GymTask], squash: bool) -> Callable[[np.ndarray], Any]:
    """Make the function that turns actions [L, A] of policies into one action of a vector environment."""
    first = tasks if isinstance(tasks, GymTask) else tasks[0]
    if is_nested(first.action_space):
        return NestedActionConverter(tasks, squash).batched
    return ActionConverter(tasks, squash)


def observation_flattener(task: GymTask) -> Callable[[Any], np.ndarray]:
    """Make the function that turns an observation of a task into what its policy takes, [D] uint8 or float32."""
    flatten_one, dtype = flattener(task.observation_space), task.observation_dtype
    return lambda seen: np.array(seen if flatten_one is None else flatten_one(seen), dtype)


def flattener(space: Space) -> Callable[[Any], np.ndarray] | None:
    """Make the function that flattens one observation; None where observations are flat already."""
    match space:
        case spaces.Box() if len(space.shape) == 1:
            return None
        case spaces.Box():
            shape, is_picture = space.shape, bool(picture_shape(space))

            def ravel(seen: Any) -> np.ndarray:
                seen = np.asarray(seen)
                if is_picture and seen.dtype.kind == "f":
                    raise ValueError(f"an observation is {seen.dtype}; its space is uint8")
                if seen.shape != shape:
                    raise ValueError(f"an observation has shape {seen.shape}; its space has {shape}")
                return np.ravel(seen)

            return ravel
        case spaces.Discrete():
            start, rows = int(space.start), np.eye(int(space.n), dtype=np.float32)
            return lambda seen: np.asarray(rows[_non_negative(seen - start)])
    return lambda seen: np.asarray(flatten(space, seen))


def _non_negative(index: int) -> int:
    """Return the index of an option; IndexError where Python would count from the end."""
    if index < 0:
        raise IndexError(f"an observation is {-index} less than its space's least")
    return index


def batch_flattener(space: Space, batch: Space) -> Callable[[Any], np.ndarray]:
    """Make the function that flattens the observations of all env copies, -> new [L, D], uint8 of pictures, or float32.

    space: that of one observation. batch: that of all copies' observations together.
    """
    match space:
        case spaces.Box():
            shape, dtype = space.shape, np.uint8 if picture_shape(space) else np.float32

            def ravel(seen: Any) -> np.ndarray:
                flat = np.array(seen, dtype)
                if flat.shape[1:] != shape:
                    raise ValueError(f"observations have shape {flat.shape}; their space has (copies, {shape})")
                return flat.reshape(len(flat), -1)

            return ravel
        case spaces.Discrete():
            start, rows = int(space.start), np.eye(int(space.n), dtype=np.float32)
            return lambda seen: np.asarray(rows[np.asarray(seen) - start])
    return lambda seen: np.array([flatten(space, row) for row in iterate(batch, seen)], np.float32)
