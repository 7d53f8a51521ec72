"""EnvCache: keeps environments that are not stepped at the moment, since some take long to make."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import final

from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.gym_task import Env, GymTask


@final
class EnvCache:
    """Idle environments by client, first in, first out: each env copy gets the environment that it had before."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Env]] = defaultdict(deque)

    def take(self, task: GymTask) -> Env:
        """Take an idle environment of the client out of the cache, or make a new one."""
        idle = self._idle[task.client]
        return idle.popleft() if idle else make_env(task, lean=True)

    def put(self, task: GymTask, env: Env) -> None:
        """Put an environment of the client into the cache."""
        self._idle[task.client].append(env)

    def close(self) -> None:
        """Close the environments that are in the cache."""
        while self._idle:
            _, idle = self._idle.popitem()
            for env in idle:
                env.close()
