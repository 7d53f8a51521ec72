"""LanguageTask: a task that is a set of prompts, answered by a language model and rewarded."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

from grpo_fed.scenario.settings import ClientSettings, LanguageSettings
from grpo_fed.tasks.task import Task


@final
@dataclass(frozen=True)
class LanguageTask(Task):
    """One client's prompts and rewards, and the language model that answers.

    It holds settings alone. What opens the prompts, the rewards and the model is the client that trains: the server of
    a deployment needs none of them.
    """

    language: LanguageSettings
    """The model, and how it is adapted."""
    settings: ClientSettings
    """Where the prompts come from, and what is rewarded."""

    @property
    def signature(self) -> Hashable:
        """Equal for all clients with prompts: a scenario has one model."""
        return "tokens", self.language.model

    @property
    def description(self) -> str:
        return self.settings.task
