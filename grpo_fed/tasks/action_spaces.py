"""What actions of a space consist of; of spaces that are made of others, Tuple and Dict, where each part is.

A flat action has the choices of all parts first, in the order of the space, and then their real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from grpo_fed.tasks.gym_task import Space
from grpo_fed.tasks.task import ActionSpec


@dataclass(frozen=True)
class ActionPart:
    """A part of an action, which is no Tuple and no Dict."""

    space: Space
    action: ActionSpec
    columns: slice
    """The part's entries of a flat action."""


def describe_actions(where: str, space: Space) -> ActionSpec:
    """Return what actions of a space consist of; ValueError for a space that no policy of ours has actions for."""
    match space:
        case spaces.Discrete():
            return ActionSpec("categorical", (int(space.n),), (int(space.start),))
        case spaces.MultiDiscrete() if space.nvec.size:
            sizes, start = space.nvec.ravel().tolist(), space.start.ravel().tolist()
            return ActionSpec("multi-categorical", tuple(sizes), tuple(start))
        case spaces.MultiBinary() if math.prod(space.shape):
            components = math.prod(space.shape)
            return ActionSpec("multi-categorical", (2,) * components, (0,) * components)
        case spaces.Box() if math.prod(space.shape):
            low = np.where(space.bounded_below, space.low, -np.inf).ravel().tolist()
            high = np.where(space.bounded_above, space.high, np.inf).ravel().tolist()
            return ActionSpec("gaussian", (math.prod(space.shape),), (), tuple(low), tuple(high))
        case spaces.Tuple() | spaces.Dict() if parts := list(leaf_spaces(space)):
            return join_actions([describe_actions(where, part) for part in parts])
    raise ValueError(
        f"{where}: no policy has actions for {space}; put a wrapper around it that makes a Discrete, MultiDiscrete,"
        " MultiBinary, Box, or a Dict or Tuple of them"
    )


def is_nested(space: Space) -> bool:
    """Return whether a space is made of others."""
    return isinstance(space, spaces.Tuple | spaces.Dict)


def leaf_spaces(space: Space) -> Iterator[Space]:
    """Yield the parts of a space, or the space itself, in order."""
    if isinstance(space, spaces.Dict):
        for inner in space.values():
            yield from leaf_spaces(inner)
    elif isinstance(space, spaces.Tuple):
        for inner in space.spaces:
            yield from leaf_spaces(inner)
    else:
        yield space


def join_actions(parts: Sequence[ActionSpec]) -> ActionSpec:
    """Describe an action of several parts: choices if it has no real numbers, and real numbers if it has no choices."""
    choices = [count for part in parts for count in part.choices]
    start = [first for part in parts for first in part.start]
    low = tuple(bound for part in parts for bound in part.low)
    high = tuple(bound for part in parts for bound in part.high)
    reals = sum(part.reals for part in parts)
    if not reals:
        return ActionSpec("categorical" if len(choices) == 1 else "multi-categorical", tuple(choices), tuple(start))
    if not choices:
        return ActionSpec("gaussian", (reals,), (), low, high)
    return ActionSpec("hybrid", (*choices, reals), tuple(start), low, high)


def action_parts(space: Space) -> list[ActionPart]:
    """List the parts of a nested space with their places in a flat action."""
    leaves = [(leaf, describe_actions("", leaf)) for leaf in leaf_spaces(space)]
    choice, real = 0, sum(len(action.choices) for _, action in leaves)
    parts = []
    for leaf, action in leaves:
        begin = real if action.reals else choice
        parts.append(ActionPart(leaf, action, slice(begin, begin + action.size)))
        choice, real = choice + len(action.choices), real + action.reals
    return parts


def nest(space: Space, values: Iterator[Any]) -> Any:
    """Put the values of the parts, in order, into a sample of the space."""
    if isinstance(space, spaces.Dict):
        return {key: nest(inner, values) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(nest(inner, values) for inner in space.spaces)
    return next(values)


def action_form(space: Space) -> Hashable:
    """Return a key that is equal for spaces whose samples have the same structure, shapes and types."""
    if isinstance(space, spaces.Dict):
        return "dict", tuple((key, action_form(inner)) for key, inner in space.items())
    if isinstance(space, spaces.Tuple):
        return "tuple", tuple(action_form(inner) for inner in space.spaces)
    return space.shape, space.dtype


def rows_of(values: np.ndarray) -> list[Any]:
    """Return the rows of an array, [L, ...], numbers as Python's."""
    return values.tolist() if values.ndim == 1 and values.dtype.kind in "iu" else list(values)
