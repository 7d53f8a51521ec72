"""A scenario in sentences: what a run will do, from the final values of all keys and the real names of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from grpo_fed.aggregation.merge.rules import check_rule
from grpo_fed.federation.server_step import block_budgets
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.explain_constraints import explain_costs, explain_entropy, explain_rollback
from grpo_fed.reports.explain_language import explain_language
from grpo_fed.reports.explain_merge import explain_merge, explain_sites
from grpo_fed.reports.explain_privacy import explain_privacy
from grpo_fed.reports.explain_secure import explain_secure
from grpo_fed.reports.explain_setups import (
    explain_adaptation,
    explain_callbacks,
    explain_levels,
    explain_newcomers,
    explain_optimiser,
    explain_rewards,
    explain_start,
    explain_twins,
)
from grpo_fed.reports.formatting import format_count, format_range, list_names
from grpo_fed.reports.score_text import explain_scores
from grpo_fed.scenario.methods import METHODS, Method
from grpo_fed.scenario.presets import PRESETS, Preset
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings
from grpo_fed.scenario.sites import levels_of
from grpo_fed.scenario.tables import TableRow, find_row_or_none
from grpo_fed.scenario.toml.text import short_toml
from grpo_fed.scenario.unused import GivenKeys
from grpo_fed.tasks.scores import scales_of

SURROGATES = {
    "score": "log pi * A, the plain policy gradient",
    "ratio": "ratio * A, where ratio is the new policy's probability of the action over the old one's",
    "clip": "min(ratio * A, clip(ratio) * A), where ratio is the new policy's probability of the action over the old"
    " one's",
}
GROUPS = {
    "start": "those of the client's other episodes from the same start state",
    "task": "those of the client's other episodes",
    "context": "those of the client's other episodes with the same context in `info`",
    "similarity": "those of the client's other episodes from similar start states",
}
COMPLETION_GROUPS = {
    "start": "those of the other completions of the same prompt",
    "task": "those of all other completions of the batch",
}
SCORES = {
    "zscore": "its distance from their mean in standard deviations",
    "centre": "its distance from their mean",
    "rank": "its rank among them",
    "leave-one-out": "its distance from the mean of the others",
}
MAX_ENTRIES = 6
"""How many entries of `[[clients]]` are named."""


@dataclass(frozen=True)
class Part:
    """The sentences about one aspect of a scenario."""

    title: str
    sentences: tuple[str, ...]


def explain_scenario(scenario: Scenario, given: GivenKeys | None = None) -> list[Part]:
    """Explain what a run of a scenario will do; ValueError if the run would be refused before its first round.

    given: the keys that the user wrote; those without effect are named.
    """
    setup = FederationSetup.of(scenario)
    shared = setup.shared_blocks
    for level in levels_of(scenario):
        check_rule(level.merge, shared)
        block_budgets(level.proximity, shared)
    budgets = block_budgets(scenario.proximity, shared)
    parts = {
        "Clients and rounds": _explain_rounds(scenario),
        "Objective": _explain_objective(scenario),
        "Shared and private blocks": (
            *_explain_blocks(scenario, shared, _private_blocks(setup)),
            *explain_start(scenario, _frozen_blocks(setup)),
        ),
        "Sites": explain_sites(scenario, shared),
        "Merge": (*explain_merge(scenario, shared), *explain_optimiser(scenario)),
        "Privacy": (*explain_privacy(scenario, shared), *explain_secure(scenario, shared)),
        "Step of the server": _explain_step(scenario, budgets),
        "Evaluation and files": _explain_files(scenario),
        "Method and preset": _explain_sources(scenario),
        "Keys without effect": () if given is None else given.unused_lines(scenario, setup.task_facts),
    }
    explained = [Part(title, tuple(sentences)) for title, sentences in parts.items()]
    return [part for part in explained if part.sentences]


def _private_blocks(setup: FederationSetup) -> list[str]:
    """List the blocks that are private to some client."""
    policies = {task.signature: task for task in setup.tasks.values()}
    layouts = [make_policy(task, setup.scenario.policy).layout for task in policies.values()]
    names = dict.fromkeys(block.name for layout in layouts for block in layout.blocks)
    return [name for name in names if name not in setup.shared_blocks.blocks]


def _frozen_blocks(setup: FederationSetup) -> list[str]:
    """List the blocks that do not learn."""
    layouts = [make_policy(tasks[0], setup.scenario.policy).layout for tasks in setup.tasks_by_policy]
    return list(dict.fromkeys(slot.block for layout in layouts for slot in layout.frozen))


def _explain_rounds(scenario: Scenario) -> Iterator[str]:
    count = sum(entry.count for entry in scenario.clients)
    entries = [f"{entry.count} x {entry.name} on {entry.task}" for entry in scenario.clients[:MAX_ENTRIES]]
    if len(scenario.clients) > MAX_ENTRIES:
        entries.append(f"and {len(scenario.clients) - MAX_ENTRIES} more entries")
    yield f"{format_count(count, 'client')}: {list_names(entries)}."
    if any(entry.env for entry in scenario.clients):
        yield (
            f"{format_count(scenario.rounds, 'round')}. In each round a client learns from {scenario.steps:,} steps in"
            " its own environments."
        )
    yield from explain_language(scenario)
    yield from _explain_changes(scenario)
    yield from explain_levels(scenario)
    sampling, stop = scenario.round, scenario.stop
    who = "All" if sampling.fraction == 1 else f"A random {sampling.fraction:.0%} of the"
    deadline = (
        "the server waits for every answer without a time limit"
        if sampling.deadline is None
        else f"a client that has not answered after {sampling.deadline:g} seconds is left out of the round"
    )
    whose = "" if all(entry.trains for entry in scenario.clients) else " that train"
    yield f"{who} connected clients{whose} take part in a round; {deadline}."
    yield (
        f"If fewer than {sampling.quorum:.0%} of them answer, the shared blocks do not change;"
        f" {format_count(sampling.patience, 'such round')} in a row end the run as failed."
    )
    yield from explain_scores(scenario)
    score = "normalised score" if scales_of(scenario) else "return"
    if stop.target is not None:
        yield f"The run ends early at a median {score} of {stop.target:g}."
    if stop.patience:
        yield f"The run ends early after {format_count(stop.patience, 'evaluation')} without a new best median {score}."


def _explain_changes(scenario: Scenario) -> Iterator[str]:
    """Explain which tasks change, and which of these changes the run does not reach."""
    changes = [(entry, change) for entry in scenario.clients for change in entry.changes]
    for entry, change in changes[:MAX_ENTRIES]:
        reached = "" if change.round <= scenario.rounds else f", which a run of {scenario.rounds} rounds does not reach"
        yield f"The task of {entry.name} changes in round {change.round}{reached}: {short_toml(change.kwargs)}."
    if len(changes) > MAX_ENTRIES:
        yield f"There are {len(changes) - MAX_ENTRIES} more changes of tasks."
    if changes:
        yield "A changed client begins new episodes; its policy, optimiser and normalisers go on."


# Objective ------------------------------------------------------------------------------------------------------------


def _explain_objective(scenario: Scenario) -> Iterator[str]:
    """Explain the terms of the objective, each with its sign, then how it is optimised."""
    objective = scenario.objective
    clip = ""
    if objective.surrogate == "clip":
        high = objective.clip if objective.clip_high is None else objective.clip_high
        clip = f"; the ratio is clipped to [1 - {objective.clip:g}, 1 + {high:g}]"
    maximised = SURROGATES[objective.surrogate]
    if scenario.unit == "completions" and objective.ratio == "step":
        maximised = maximised.replace("the action", "the token")
    yield f"A client maximises {maximised}{clip}."
    yield _explain_advantage(scenario)
    if objective.advantage == "gae" and objective.step == "adam":  # after a natural step the critic learns by itself
        yield f"Minus {objective.value_coefficient:g} times the critic's squared error."
    yield from explain_entropy(scenario)
    yield from explain_costs(scenario)
    yield from explain_rewards(scenario)
    if scenario.trust.region != "none":
        yield _explain_trust_region(scenario.trust)
    if scenario.trust.stop is not None:
        yield f"An update ends as soon as the policy's KL exceeds {scenario.trust.stop:g}."
    yield from explain_rollback(scenario)
    for pattern, limit in scenario.trust.blocks.items():
        yield f"After an update the change of {pattern} is shortened until it alone causes a KL of at most {limit:g}."
    yield from _explain_penalty(scenario)
    yield _explain_optimiser(objective)


def _explain_penalty(scenario: Scenario) -> Iterator[str]:
    """Explain the group penalty, and the squared one."""
    objective, penalty = scenario.objective, scenario.penalty
    weights = {penalty.weight if entry.penalty is None else entry.penalty for entry in scenario.clients}
    if weights != {0.0} or penalty.l1 or penalty.outer:
        values = "parameters" if penalty.toward == "zero" else "differences from the start of the round"
        extra = f", and {penalty.l1:g} times their absolute values" if penalty.l1 else ""
        extra += f", and {penalty.outer:g} times the norms of whole blocks" if penalty.outer else ""
        yield (
            f"Minus {format_range(weights)} times the norms of the groups of {', '.join(penalty.blocks)}{extra}:"
            f" their {values} can become exactly zero."
        )
        if objective.step == "natural" or penalty.step == "decoupled":
            yield (
                "These weights are relative to the learning rate, not to the loss: the penalty's step is decoupled from"
                " the optimiser's, so what is reached is no minimum of the sum."
            )
        if penalty.toward == "zero":
            yield "A group that clients with more than half of the weight have at zero is merged to zero."
    if penalty.squared:
        yield (
            f"Minus {penalty.squared:g}/2 ||x - s||^2, which pulls the shared blocks towards s, their values at the"
            " start of the round."
        )


def _explain_advantage(scenario: Scenario) -> str:
    objective, group = scenario.objective, scenario.group
    if objective.advantage == "gae":
        return (
            f"A is the advantage, estimated with a critic (GAE, gamma {objective.gamma:g}, lambda"
            f" {objective.gae_lambda:g})."
        )
    compared = f"an episode's return is compared with {GROUPS[group.by]}"
    if scenario.unit == "completions":
        compared = f"a completion's reward is compared with {COMPLETION_GROUPS[group.by]}"
    return f"A is the advantage, without a critic: {compared} and scored by {SCORES[group.score]}."


def _explain_trust_region(trust: TrustSettings) -> str:
    order = "KL(old, new)" if trust.direction == "old-new" else "KL(new, old)"
    if trust.region == "hard":
        search = "; a line search shortens it" if trust.line_search else ""
        return f"An update stays within {order} <= {trust.target:g}{search}."
    old = {
        "old": "the policy that collected the batch",
        "shared": "the policy at the start of the round",
        "start": "the policy at the start of the run",
    }[trust.reference]
    change = f", a weight that is doubled or halved to hold it near {trust.target:g}"
    change = change if trust.region == "adaptive" else ""
    return f"Minus {trust.coefficient:g} times {order}{change}, where old is {old}."


def _explain_optimiser(objective: ObjectiveSettings) -> str:
    if objective.step == "natural":
        epochs = format_count(objective.value_epochs, "epoch")
        return f"The optimiser makes one natural-gradient step for each batch, and {epochs} for the critic."
    schedule = "" if objective.schedule == "constant" else f" that falls to 0 ({objective.schedule})"
    epochs = format_count(objective.epochs, "epoch")
    minibatches = f"{objective.minibatches} minibatch{'es' if objective.minibatches > 1 else ''}"
    rate = f"a learning rate of {objective.learning_rate:g}{schedule}"
    return f"The optimiser is Adam, {epochs} of {minibatches}, with {rate}."


# Server ---------------------------------------------------------------------------------------------------------------


def _explain_blocks(scenario: Scenario, shared: SharedBlocks, private: list[str]) -> Iterator[str]:
    personal = scenario.personal
    if not shared.size:
        yield f"Nothing is shared; private to each client: {list_names(private)}."
    else:
        groups = format_count(len(shared.groups.names), "group")
        yield f"Shared by all clients: {list_names(shared.blocks)} ({shared.size:,} parameters in {groups})."
        yield f"Private to each client: {list_names(private)}." if private else "No block is private."
    if any(entry.env for entry in scenario.clients):
        yield "Observations, actions, rewards, normalisers and the optimiser's state never leave a client."
    else:
        yield "Prompts, completions, the rewards of each and the optimiser's state never leave a client."
    if personal.first:
        yield f"The first {personal.first:.0%} of an update's epochs train private blocks, the others shared blocks."
    if personal.model:
        yield (
            f"Each client also trains a personal policy with {personal.steps:.0%} of its steps, pulled towards the"
            f" shared one by {personal.pull:g}/2 ||v - s||^2; evaluations use the personal policy."
        )


def _explain_step(scenario: Scenario, budgets: Mapping[str, float]) -> Iterator[str]:
    proximity = scenario.proximity
    if not budgets:
        yield "There is no shared block, and no step to limit."
        return
    if proximity.mode == "off":
        yield "The shared blocks go all the way to the merge; no KL budget limits the step."
        return
    states = "completions" if scenario.unit == "completions" else "states"
    how = {
        "measured": f"clients measure it on {proximity.states} {states} that stay with them",
        "quadratic": "it is predicted from Fisher information",
    }[proximity.mode]
    over = "mean over clients" if proximity.over == "mean" else "worst client"
    yield f"The step of each block is shortened until the KL that it causes ({over}) is within a budget; {how}."
    blocks = list_names(f"{name} {_budget(limit)}" for name, limit in budgets.items())
    joint = "no limit" if proximity.kl_joint is None else f"{proximity.kl_joint:g}"
    yield f"KL budgets: {blocks}; all blocks together {joint}."
    if proximity.adaptive:
        yield "A block's budget widens after steps that raised the clients' returns, and tightens if they lowered them."


def _budget(limit: float) -> str:
    return "no limit" if limit == float("inf") else f"{limit:g}"


# Files and values -----------------------------------------------------------------------------------------------------


def _explain_files(scenario: Scenario) -> Iterator[str]:
    every, checkpoint = scenario.evaluate.every, scenario.checkpoint
    when = "before the first round and after the last" + (
        f", and every {format_count(every, 'round')}" if every else ""
    )
    noun = "prompt" if scenario.unit == "completions" else "episode"
    if scenario.privacy.metrics == "withheld":
        yield "Clients report no returns or other metrics, and none is evaluated: the run has no scores."
    else:
        yield f"Each client is evaluated on {format_count(scenario.evaluate.episodes, noun)} {when}."
        yield from explain_adaptation(scenario)
    yield from explain_twins(scenario)
    yield from explain_newcomers(scenario)
    yield from explain_callbacks(scenario)
    yield "The run's folder gets a line for each round, results.json, summary.md, figures and every client's policy."
    if checkpoint.every:
        often = "each round" if checkpoint.every == 1 else f"every {checkpoint.every} rounds"
        yield f"A checkpoint is written {often}, and the latest {checkpoint.keep} are kept; --resume continues there."
    else:
        yield "There are no checkpoints: a run that is stopped cannot be resumed."


def _explain_sources(scenario: Scenario) -> Iterator[str]:
    """Say which values of its method and of its preset the scenario changes."""
    method, preset = scenario.method, scenario.objective.preset
    yield _explain_row(scenario, "Method", method, find_row_or_none(method, METHODS, Method))
    yield _explain_row(scenario, "Preset", preset, find_row_or_none(preset, PRESETS, Preset))
    yield "All other values are set in the scenario or are defaults; grpo-fed config lists the defaults."


def _explain_row(scenario: Scenario, kind: str, name: str, row: TableRow | None) -> str:
    """Say which values of a row the scenario changes.

    row: None if the name is an import path that cannot be imported here.
    """
    if row is None:
        return f"{kind} {name} cannot be imported here; the scenario has all of its values."
    changes = [
        f"{section}.{key} = {short_toml(value)}"
        for section, keys in row.values.items()
        for key, value_of_row in keys.items()
        if (value := getattr(getattr(scenario, section), key)) != value_of_row
    ]
    return f"{kind} {name} ({row.name}): this scenario changes {', '.join(changes) or 'none of its values'}."
