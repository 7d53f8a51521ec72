"""Keys that have no effect beside the kind of a scenario's clients: those with `prompts`, and those with `env`.

It is a part of the table in unused_table.py, whose rows come first.
"""

from __future__ import annotations

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import LanguageSettings
from grpo_fed.scenario.unused_table import Unused


def _has_no_prompts(scenario: Scenario) -> bool:
    return all(client.prompts is None for client in scenario.clients)


def _has_prompts_alone(scenario: Scenario) -> bool:
    return all(client.prompts is not None for client in scenario.clients)


WITHOUT_PROMPTS = Unused(
    tuple(f"language.{key}" for key in LanguageSettings.model_fields),
    _has_no_prompts,
    "no client has prompts, and there is no language model",
)
WITH_PROMPTS_ALONE = (
    Unused(
        tuple(f"policy.{key}" for key in ("hidden", "activation", "torso", "squash", "log_std", "orthogonal")),
        _has_prompts_alone,
        "all clients have prompts, and their policy is the model of [language]",
    ),
    Unused(
        ("rollout.episode_limit", "evaluate.step_limit"),
        _has_prompts_alone,
        "all clients have prompts, and language.length limits completions",
    ),
    Unused(
        ("objective.gamma",),
        _has_prompts_alone,
        "all clients have prompts, and a completion is rewarded once, at its end",
    ),
    Unused(
        ("objective.entropy_groups", "objective.entropy_weights"),
        _has_prompts_alone,
        "all clients have prompts, and a token is an action of one component",
    ),
)
WITHOUT_REDRAWS = Unused(
    ("group.redraws",),
    lambda scenario: scenario.group.equal != "redraw",
    'group.equal is "{0.group.equal}", and no prompt is drawn again',
)
LANGUAGE_UNUSED: tuple[Unused, ...] = (WITHOUT_PROMPTS, WITHOUT_REDRAWS, *WITH_PROMPTS_ALONE)
"""The rows."""
