"""EnvCache: keeps environments that are not stepped at the moment, since some take long to make."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import final

from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.gym_task import Env, GymTask


@final
class EnvCache:
    """Idle environments by client, first in, first out: each env copy gets the environment that it had before.

    A client's environments are all of one task: those of the task that it had before are closed once the task changes.
    """

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Env]] = defaultdict(deque)
        self._tasks: dict[str, GymTask] = {}
        """The task of each client's environments."""

    def take(self, task: GymTask) -> Env:
        """Take an idle environment of the client's task out of the cache, or make a new one."""
        if self._tasks.get(task.client) != task:
            self._close_idle(task.client)
            self._tasks[task.client] = task
        idle = self._idle[task.client]
        return idle.popleft() if idle else make_env(task, lean=True)

    def put(self, task: GymTask, env: Env) -> None:
        """Put an environment of the client into the cache; close it if the client's task has changed."""
        if self._tasks.setdefault(task.client, task) == task:
            self._idle[task.client].append(env)
        else:
            env.close()

    def close(self) -> None:
        """Close the environments that are in the cache."""
        for client in list(self._idle):
            self._close_idle(client)
        self._tasks.clear()

    def _close_idle(self, client: str) -> None:
        idle = self._idle.pop(client, deque())
        for env in idle:
            env.close()
