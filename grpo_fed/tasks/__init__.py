"""What clients learn to do, and how copies of it are stepped.

    task.py             Task, what every kind of task has, and its parts, as records
    resolve.py          from a scenario's [[clients]] to tasks
    scores.py           scales of returns, and scores that make unlike environments comparable
    gym_task.py         GymTask, a task that is a gymnasium environment
    action_spaces.py    what actions of a space consist of
    pictures.py         observations that are pictures
    gym.py              gymnasium: finding, making and wrapping environments, and what to say if that fails
    curriculum.py       levels of a task, and how those that a client trains on are chosen
    level_replay.py     levels that are named by seeds, and which of them come again
    envs/               ClientEnvs: N copies of each of K clients' tasks, stepped together
    families/           parametric tasks of our own, stepped in one vectorised call
    wrappers.py         environment wrappers for scenarios: other physics, hostile rewards, seeding
    language_task.py    LanguageTask, a task of prompts that a language model answers, and rewards
    prompts.py          sources of prompts: a function, a file, or a task of reasoning-gym
    rewards.py          what completions are rewarded for: functions as TRL has them, and their weighted sum
    shipped_rewards.py  the rewards that a scenario names by a short word
    letters.py          prompts for the tiny language model, with their answers

Begin with task.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.tasks.envs.base import ClientEnvs
    from grpo_fed.tasks.envs.make import make_client_envs
    from grpo_fed.tasks.families.base import Family, Parameter
    from grpo_fed.tasks.gym_task import EnvConfig, GymTask
    from grpo_fed.tasks.resolve import resolve_tasks
    from grpo_fed.tasks.task import ActionSpec, MissingPackageError, Task, TaskError, TaskShape

__all__ = [
    "ActionSpec",
    "ClientEnvs",
    "EnvConfig",
    "Family",
    "GymTask",
    "MissingPackageError",
    "Parameter",
    "Task",
    "TaskError",
    "TaskShape",
    "make_client_envs",
    "resolve_tasks",
]

MODULES = {
    "ActionSpec": "grpo_fed.tasks.task",
    "ClientEnvs": "grpo_fed.tasks.envs.base",
    "EnvConfig": "grpo_fed.tasks.gym_task",
    "Family": "grpo_fed.tasks.families.base",
    "GymTask": "grpo_fed.tasks.gym_task",
    "MissingPackageError": "grpo_fed.tasks.task",
    "Parameter": "grpo_fed.tasks.families.base",
    "Task": "grpo_fed.tasks.task",
    "TaskError": "grpo_fed.tasks.task",
    "TaskShape": "grpo_fed.tasks.task",
    "make_client_envs": "grpo_fed.tasks.envs.make",
    "resolve_tasks": "grpo_fed.tasks.resolve",
}

__getattr__ = lazy_getattr(__name__, MODULES)
