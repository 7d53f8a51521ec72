"""ActionLog: the actions of running episodes. With the episodes' seeds, they are all it takes to continue them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from grpo_fed.tasks.envs.base import pad_actions


@final
class ActionLog:
    """The actions of env copies since their episodes began. Pieces are joined only when they are asked for."""

    def __init__(self, num_copies: int, action_size: int) -> None:
        self._pieces: list[np.ndarray] = [np.zeros((0, num_copies, action_size), np.float32)]
        self._starts = np.zeros(num_copies, np.int64)
        """[L]: the step, counted over all pieces, with which a copy's episode began."""

    @classmethod
    def of(cls, actions: Sequence[np.ndarray]) -> ActionLog:
        """Make the log of copies that took these actions in their episodes, [L] of [n, A]."""
        log = cls(len(actions), actions[0].shape[1])
        log._pieces = [pad_actions(actions, ends_together=True)]
        log._starts = len(log._pieces[0]) - np.array([len(taken) for taken in actions])
        return log

    def add(self, actions: np.ndarray, done: np.ndarray) -> None:
        """Add a piece, actions [T, L, A], and which of its steps ended an episode, [T, L] bool."""
        before = sum(map(len, self._pieces))
        self._pieces.append(actions)
        self._starts = np.where(done.any(0), before + len(done) - done[::-1].argmax(0), self._starts)
        while len(self._pieces[0]) <= self._starts.min() and len(self._pieces) > 1:
            self._starts -= len(self._pieces.pop(0))

    def actions(self, copies: slice) -> list[np.ndarray]:
        """Return the actions that these copies took in their running episodes, [n, A] each."""
        joined = np.concatenate([piece[:, copies] for piece in self._pieces])
        return [joined[start:, copy] for copy, start in enumerate(self._starts[copies].tolist())]
