"""What was done in the episodes under way: all that is needed to take them up again, since episodes have seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_fed.tasks.envs import pad_actions


class ActionLog:
    """What lanes did since their episodes began, kept in the pieces it came in until somebody asks."""

    def __init__(self, lanes: int, action: int) -> None:
        self._pieces: list[np.ndarray] = [np.zeros((0, lanes, action), np.float32)]
        self._starts = np.zeros(lanes, np.int64)
        """[L]: the step within all the pieces that a lane's episode began with."""

    @classmethod
    def of(cls, actions: Sequence[np.ndarray]) -> ActionLog:
        """From each lane's own, [L] of [n, A]."""
        past = cls(len(actions), actions[0].shape[1])
        past._pieces = [pad_actions(actions, ends_together=True)]
        past._starts = len(past._pieces[0]) - np.array([len(each) for each in actions])
        return past

    def add(self, actions: np.ndarray, done: np.ndarray) -> None:
        """Another piece, [T, L, A], and which steps ended an episode, [T, L]."""
        before = sum(map(len, self._pieces))
        self._pieces.append(actions)
        self._starts = np.where(done.any(0), before + len(done) - done[::-1].argmax(0), self._starts)
        while len(self._pieces[0]) <= self._starts.min() and len(self._pieces) > 1:
            self._starts -= len(self._pieces.pop(0))

    def actions(self, lanes: slice) -> list[np.ndarray]:
        """Of some lanes, [n, A] each."""
        every = np.concatenate([piece[:, lanes] for piece in self._pieces])
        return [every[start:, lane] for lane, start in enumerate(self._starts[lanes].tolist())]
