"""Where environments wait that nobody steps at the moment, since some take long to be made."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import final

from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.task import Env, Task


@final
class EnvCache:
    """Of some clients. One's own come out in the order in which they went in: a lane gets back what it has had."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Env]] = defaultdict(deque)

    def take(self, task: Task) -> Env:
        """One of the client's, or a new one."""
        idle = self._idle[task.client]
        return idle.popleft() if idle else make_env(task, lean=True)

    def give(self, task: Task, env: Env) -> None:
        """It is not stepped for now."""
        self._idle[task.client].append(env)

    def close(self) -> None:
        """Close those that are here."""
        while self._idle:
            _, idle = self._idle.popitem()
            for env in idle:
                env.close()
