"""Keys that have no effect beside the kind of a scenario's clients: those with `prompts`, and those with `env`.

It is a part of the table in unused_table.py, whose rows come first.
"""

from __future__ import annotations

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import LanguageSettings
from grpo_fed.scenario.unused_rows import Unused


def _has_no_prompts(scenario: Scenario) -> bool:
    return all(client.prompts is None for client in scenario.clients)


def _has_prompts_alone(scenario: Scenario) -> bool:
    return all(client.prompts is not None for client in scenario.clients)


def _holds_nothing_out(scenario: Scenario) -> bool:
    """Whether no client would keep a part of a file for its evaluations."""
    files = (".jsonl", ".parquet")
    sources = [client.prompts for client in scenario.clients if client.prompts is not None and not client.eval_prompts]
    return not any(source.lower().endswith(files) for source in sources)


WITHOUT_PROMPTS = Unused(
    tuple(f"language.{key}" for key in LanguageSettings.model_fields),
    _has_no_prompts,
    "no client has prompts, and there is no language model",
)
WITH_PROMPTS_ALONE = (
    Unused(
        tuple(
            f"policy.{key}"
            for key in (
                "kind",
                "encoder",
                "memory",
                "units",
                "hidden",
                "activation",
                "torso",
                "squash",
                "log_std",
                "orthogonal",
            )
        ),
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
    Unused(
        ("policy.same_start",),
        lambda scenario: _has_prompts_alone(scenario) and scenario.language.learn == "B",
        'language.learn is "B", and adapters begin with zeros',
    ),
    Unused(
        ("clients.held_out",),
        lambda scenario: _has_prompts_alone(scenario) and _holds_nothing_out(scenario),
        "no client is trained on a file whose rows it is evaluated on, too",
    ),
    Unused(
        ("trust.estimate",),
        lambda scenario: _has_prompts_alone(scenario) and scenario.trust.region not in ("penalty", "adaptive"),
        'trust.region is "{0.trust.region}", and no KL is penalised',
    ),
)
WITHOUT_REDRAWS = Unused(
    ("group.redraws",),
    lambda scenario: scenario.group.equal != "redraw",
    'group.equal is "{0.group.equal}", and no prompt is drawn again',
)
LANGUAGE_UNUSED: tuple[Unused, ...] = (WITHOUT_PROMPTS, WITHOUT_REDRAWS, *WITH_PROMPTS_ALONE)
"""The rows."""
