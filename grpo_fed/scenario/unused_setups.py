"""Keys that have no effect beside other values: those of what runs start from, of how rewards and scores are scaled, of
sites, of privacy, and of rounds that do not wait.

It is a part of the table in unused_table.py, whose rows come first.
"""

from __future__ import annotations

from collections.abc import Callable

from grpo_fed.scenario.curricula import CURRICULA
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import PrivacySettings
from grpo_fed.scenario.unused_rows import Unused


def _judges_by_scale_free_scores(scenario: Scenario) -> bool:
    """Whether only the order or the spread of a group's returns counts, so that a common factor does not."""
    is_free = scenario.objective.advantage == "group" and scenario.group.score in ("zscore", "rank")
    return is_free and scenario.rollout.reward_clip is None


def _kinds_of_curriculum(scenario: Scenario) -> set[str]:
    """List the kinds of curriculum of the clients that train."""
    return {entry.curriculum.kind for entry in scenario.clients if entry.trains and entry.curriculum is not None}


def _has_no_curriculum(*kinds: str) -> Callable[[Scenario], bool]:
    """Make the condition that no client which trains has a curriculum of one of these kinds."""
    return lambda scenario: _kinds_of_curriculum(scenario).isdisjoint(kinds)


def _any_of(key: str) -> str:
    """List the kinds of curriculum that read a key."""
    return " or ".join(f'"{name}"' for name, kind in CURRICULA.items() if key in kind.keys)


NOT_OF_EPSILON = frozenset(("epsilon", "secure", "reach", "metrics", "errors"))
"""Keys of `[privacy]` that do not depend on a budget."""


def _is_not_private(scenario: Scenario) -> bool:
    return scenario.privacy.epsilon is None


def _has_fixed_bounds(scenario: Scenario) -> bool:
    """Whether no bound of a difference follows the clients' lengths."""
    return scenario.privacy.noise == "local" or not scenario.privacy.rate


def _has_prompts_alone(scenario: Scenario) -> bool:
    return all(client.prompts is not None for client in scenario.clients)


def _count_training(scenario: Scenario) -> int:
    """Count the clients that take part in training."""
    return sum(entry.count for entry in scenario.clients if entry.trains)


SETUPS_UNUSED: tuple[Unused, ...] = (
    Unused(
        ("newcomers.most",),
        lambda scenario: scenario.newcomers.like is None,
        "newcomers.like names no entry, and nobody may join who is not in the scenario",
    ),
    Unused(
        ("round.buffer", "round.staleness", "round.max_staleness", "round.rate_fair", "round.again"),
        lambda scenario: scenario.round.mode == "sync",
        'round.mode is "sync", and rounds wait for all of their clients',
    ),
    Unused(
        ("round.again",),
        lambda scenario: scenario.round.buffer * _count_training(scenario) <= 1,
        "with round.buffer = {0.round.buffer} one answer makes a merge",
    ),
    Unused(
        ("rollout.reward_scale",),
        lambda scenario: all(client.reward_scale is not None for client in scenario.clients),
        "every client has its own reward_scale",
    ),
    Unused(
        ("rollout.reward_scale", "clients.reward_scale"),
        _judges_by_scale_free_scores,
        'group.score is "{0.group.score}", which no common factor of the returns changes',
    ),
    Unused(
        ("evaluate.twins",),
        lambda scenario: not scenario.policy.shared,
        "policy.shared = [] shares nothing, and every client learns alone",
    ),
    Unused(
        ("clients.score.random", "clients.score.reference"),
        lambda scenario: len({client.scale for client in scenario.clients}) == 1,
        "all clients have one environment, whose returns are averaged as they are",
    ),
    Unused(
        ("merge.momentum",),
        lambda scenario: scenario.merge.optimiser == "sgd",
        'merge.optimiser is "sgd", which has no momentum',
    ),
    Unused(
        ("merge.epsilon",),
        lambda scenario: scenario.merge.optimiser != "adam",
        'merge.optimiser is "{0.merge.optimiser}", not "adam"',
    ),
    Unused(
        ("merge.weights",),
        lambda scenario: bool(scenario.sites),
        "a site has the weight of all of its clients, and every site has its own weights",
    ),
    Unused(
        ("merge.episodes",),
        lambda scenario: bool(scenario.sites),
        "no client plays to compare, and sites compare by evaluate.episodes",
    ),
    Unused(
        tuple(f"privacy.{key}" for key in PrivacySettings.model_fields if key not in NOT_OF_EPSILON),
        _is_not_private,
        "privacy.epsilon = inf asks for no privacy",
    ),
    Unused(
        ("evaluate.every", "evaluate.adapt"),
        lambda scenario: scenario.privacy.metrics == "withheld",
        'privacy.metrics is "withheld", so that no client is evaluated',
    ),
    Unused(
        ("privacy.reach",),
        lambda scenario: not scenario.privacy.secure,
        "privacy.secure is false, so that numbers of any size travel",
    ),
    Unused(
        ("privacy.rate",),
        lambda scenario: scenario.privacy.noise == "local",
        'privacy.noise is "local", with which bounds stay as they are',
    ),
    Unused(
        ("privacy.quantile", "privacy.share"),
        _has_fixed_bounds,
        'bounds stay as they are, with privacy.rate = 0 or privacy.noise = "local"',
    ),
    Unused(
        ("policy.start",),
        lambda scenario: all(client.start is not None for client in scenario.clients) and not scenario.policy.shared,
        "every client has its own start, and no block is shared",
    ),
    Unused(
        ("clients.start",),
        lambda scenario: not scenario.normalise.observations,
        "all blocks are shared, and the shared ones are the server's",
        lambda tasks: not tasks.private_blocks,
    ),
    Unused(
        ("curriculum.by",),
        _has_no_curriculum(*(name for name, kind in CURRICULA.items() if kind.by_returns)),
        "no client that trains has a curriculum that returns move",
    ),
    *(
        Unused(
            (f"clients.curriculum.{key}",),
            _has_no_curriculum(*(name for name, kind in CURRICULA.items() if key in kind.keys)),
            f"of the curricula of clients that train none is {_any_of(key)}",
        )
        for key in dict.fromkeys(key for kind in CURRICULA.values() for key in kind.keys)
    ),
)
"""The rows."""
PROMPTS_UNUSED: tuple[Unused, ...] = (
    Unused(
        ("rollout.reward_scale", "rollout.reward_clip"),
        _has_prompts_alone,
        "all clients have prompts, and each of their rewards has a weight",
    ),
)
"""The rows for clients with prompts alone."""
