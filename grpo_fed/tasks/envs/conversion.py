"""Between policies, which say and see flat floats, and environments, whose spaces have shapes and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector.utils import iterate

from grpo_fed.tasks.task import Space, Task


def observation_flattener(task: Task) -> Callable[[Any], np.ndarray]:
    """What makes of one observation of a task what its policy sees, [D] float32."""
    flat = flattener(task.observation_space)
    return lambda seen: np.array(seen if flat is None else flat(seen), np.float32)


@final
class ActionConverter:
    """From what policies say to what environments take, for tasks whose actions have one shape and type."""

    def __init__(self, tasks: Task | Sequence[Task], squash: bool) -> None:
        """A task for each row of actions, or one for all rows."""
        rows = [tasks] if isinstance(tasks, Task) else tasks
        space, kind = rows[0].action_space, rows[0].action.kind
        self.shape = (-1, *(space.shape or ()))
        self.dtype = np.dtype(space.dtype)
        self.start = np.array([row.action.start for row in rows]).astype(self.dtype)
        # the bounds of a box of whole numbers are those of the floats that are rounded to them
        self.whole = self.dtype.kind != "f"
        self.floats = np.dtype(np.float64) if self.whole else self.dtype
        self.low = np.array([row.action.low for row in rows], self.floats)
        self.high = np.array([row.action.high for row in rows], self.floats)
        self.bounded = bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())
        self.convert = self._chosen
        if kind == "gaussian":
            self.convert = self._squashed if squash else self._clipped

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """[L, A] floats -> [L, ...], new, of the environments' shape and type."""
        return self.convert(actions)

    def _chosen(self, actions: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = np.rint(actions).astype(self.dtype)
        chosen += self.start
        return chosen.reshape(self.shape)

    def _clipped(self, actions: np.ndarray) -> np.ndarray:
        inside = actions.astype(self.floats)
        if self.bounded:
            np.minimum(np.maximum(inside, self.low, out=inside), self.high, out=inside)
        return self._shaped(inside)

    def _squashed(self, actions: np.ndarray) -> np.ndarray:
        share = (np.tanh(actions, dtype=np.float64) + 1) / 2
        inside = self.low + share * (self.high - self.low)
        return self._shaped(np.minimum(inside, self.high).astype(self.floats))

    def _shaped(self, inside: np.ndarray) -> np.ndarray:
        return (np.rint(inside).astype(self.dtype) if self.whole else inside).reshape(self.shape)


def flattener(space: Space) -> Callable[[Any], np.ndarray] | None:
    """What makes one observation flat; None where it is already."""
    match space:
        case spaces.Box() if len(space.shape) == 1:
            return None
        case spaces.Box():
            shape = space.shape

            def ravel(seen: Any) -> np.ndarray:
                seen = np.asarray(seen)
                if seen.shape != shape:
                    raise ValueError(f"an observation has shape {seen.shape}; its space says {shape}")
                return np.ravel(seen)

            return ravel
        case spaces.Discrete():
            start, rows = int(space.start), np.eye(int(space.n), dtype=np.float32)
            return lambda seen: np.asarray(rows[_inside(seen - start)])
    return lambda seen: np.asarray(flatten(space, seen))


def _inside(number: int) -> int:
    if number < 0:
        raise IndexError(f"an observation is {-number} less than its space's least")
    return number


def batch_flattener(space: Space, batch: Space) -> Callable[[Any], np.ndarray]:
    """What makes the observations of all lanes, from the space `batch`, flat: [L, D] float32 and new."""
    match space:
        case spaces.Box():
            shape = space.shape

            def ravel(seen: Any) -> np.ndarray:
                flat = np.array(seen, np.float32)
                if flat.shape[1:] != shape:
                    raise ValueError(f"observations have shape {flat.shape}; their space says (lanes, {shape})")
                return flat.reshape(len(flat), -1)

            return ravel
        case spaces.Discrete():
            start, rows = int(space.start), np.eye(int(space.n), dtype=np.float32)
            return lambda seen: np.asarray(rows[np.asarray(seen) - start])
    return lambda seen: np.array([flatten(space, one) for one in iterate(batch, seen)], np.float32)
