"""A scenario in sentences: what a run will do, from the final values of all keys and the real names of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from grpo_fed.aggregation.merge.conflicts import PAYS, UPSTREAM
from grpo_fed.aggregation.merge.persistence import CUT, MIN_ROUNDS, rounds_of_evidence
from grpo_fed.aggregation.merge.rules import check_rule
from grpo_fed.federation.comparison import MARGIN, TIMES
from grpo_fed.federation.server_step import block_budgets
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.formatting import format_count
from grpo_fed.scenario.methods import METHODS, Method
from grpo_fed.scenario.presets import PRESETS, Preset
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings, ObjectiveSettings, TrustSettings
from grpo_fed.scenario.tables import TableRow, find_row_or_none, is_import_path
from grpo_fed.scenario.toml.text import short_toml, shorten
from grpo_fed.scenario.unused import GivenKeys

SURROGATES = {
    "score": "log pi * A, the plain policy gradient",
    "ratio": "ratio * A, where ratio is the new policy's probability of the action over the old one's",
    "clip": "min(ratio * A, clip(ratio) * A), where ratio is the new policy's probability of the action over the old"
    " one's",
}
WEIGHTS = {
    "steps": "A client's weight is its number of steps.",
    "episodes": "A client's weight is its number of finished episodes.",
    "uniform": "All clients have the same weight.",
    "progress": "A client has more weight while its return rises.",
}
GROUPS = {
    "start": "those of the client's other episodes from the same start state",
    "task": "those of the client's other episodes",
    "context": "those of the client's other episodes with the same context in `info`",
    "similarity": "those of the client's other episodes from similar start states",
}
SCORES = {
    "zscore": "its distance from their mean in standard deviations",
    "centre": "its distance from their mean",
    "rank": "its rank among them",
    "leave-one-out": "its distance from the mean of the others",
}
MAX_ENTRIES = 6
"""How many entries of `[[clients]]` are named."""
MAX_LETTERS = 160
"""Characters of a list of names in a sentence."""


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
    check_rule(scenario.merge, shared)
    budgets = block_budgets(scenario.proximity, shared)
    parts = {
        "Clients and rounds": _explain_rounds(scenario),
        "Objective": _explain_objective(scenario),
        "Shared and private blocks": _explain_blocks(scenario, shared, _private_blocks(setup)),
        "Merge": _explain_merge(scenario, shared),
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


def _explain_rounds(scenario: Scenario) -> Iterator[str]:
    count = sum(entry.count for entry in scenario.clients)
    entries = [f"{entry.count} x {entry.name} on {entry.env}" for entry in scenario.clients[:MAX_ENTRIES]]
    if len(scenario.clients) > MAX_ENTRIES:
        entries.append(f"and {len(scenario.clients) - MAX_ENTRIES} more entries")
    yield f"{format_count(count, 'client')}: {_list(entries)}."
    yield (
        f"{format_count(scenario.rounds, 'round')}. In each round a client learns from {scenario.steps:,} steps in its"
        " own environments."
    )
    yield from _explain_changes(scenario)
    sampling, stop = scenario.round, scenario.stop
    who = "All" if sampling.fraction == 1 else f"A random {sampling.fraction:.0%} of the"
    deadline = (
        "the server waits for every answer without a time limit"
        if sampling.deadline is None
        else f"a client that has not answered after {sampling.deadline:g} seconds is left out of the round"
    )
    yield f"{who} connected clients take part in a round; {deadline}."
    yield (
        f"If fewer than {sampling.quorum:.0%} of them answer, the shared blocks do not change;"
        f" {format_count(sampling.patience, 'such round')} in a row end the run as failed."
    )
    if stop.target is not None:
        yield f"The run ends early at an interquartile mean return of {stop.target:g}."
    if stop.patience:
        yield f"The run ends early after {format_count(stop.patience, 'evaluation')} without a new best return."


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
    yield f"A client maximises {SURROGATES[objective.surrogate]}{clip}."
    yield _explain_advantage(scenario)
    if objective.advantage == "gae" and objective.step == "adam":  # after a natural step the critic learns by itself
        yield f"Minus {objective.value_coefficient:g} times the critic's squared error."
    weights = {objective.entropy if entry.entropy is None else entry.entropy for entry in scenario.clients}
    if weights != {0.0}:
        yield f"Plus {_range(weights)} times the policy's entropy."
    for name, weight in objective.entropy_weights.items():
        yield f"The entropy of the actions {name} has the weight {weight:g} instead."
    if scenario.trust.region != "none":
        yield _explain_trust_region(scenario.trust)
    if scenario.trust.stop is not None:
        yield f"An update ends as soon as the policy's KL exceeds {scenario.trust.stop:g}."
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
            f"Minus {_range(weights)} times the norms of the groups of {', '.join(penalty.blocks)}{extra}:"
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


def _range(weights: set[float]) -> str:
    """Write the weights of the clients: one number, or a range."""
    low, high = min(weights), max(weights)
    return f"{low:g}" if low == high else f"{low:g} to {high:g} (by client)"


def _explain_advantage(scenario: Scenario) -> str:
    objective, group = scenario.objective, scenario.group
    if objective.advantage == "gae":
        return (
            f"A is the advantage, estimated with a critic (GAE, gamma {objective.gamma:g}, lambda"
            f" {objective.gae_lambda:g})."
        )
    return (
        f"A is the advantage, without a critic: an episode's return is compared with {GROUPS[group.by]} and scored by"
        f" {SCORES[group.score]}."
    )


def _explain_trust_region(trust: TrustSettings) -> str:
    order = "KL(old, new)" if trust.direction == "old-new" else "KL(new, old)"
    if trust.region == "hard":
        search = "; a line search shortens it" if trust.line_search else ""
        return f"An update stays within {order} <= {trust.target:g}{search}."
    old = "the policy that collected the batch" if trust.reference == "old" else "the policy at the start of the round"
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
        yield f"Nothing is shared; private to each client: {_list(private)}."
    else:
        groups = format_count(len(shared.groups.names), "group")
        yield f"Shared by all clients: {_list(shared.blocks)} ({shared.size:,} parameters in {groups})."
        yield f"Private to each client: {_list(private)}." if private else "No block is private."
    yield "Observations, actions, rewards, normalisers and the optimiser's state never leave a client."
    if personal.first:
        yield f"The first {personal.first:.0%} of an update's epochs train private blocks, the others shared blocks."
    if personal.model:
        yield (
            f"Each client also trains a personal policy with {personal.steps:.0%} of its steps, pulled towards the"
            f" shared one by {personal.pull:g}/2 ||v - s||^2; evaluations use the personal policy."
        )


def _explain_merge(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    merge = scenario.merge
    if not shared.size:
        yield "There is nothing to merge: every client learns alone."
        return
    if merge.rule == "huber":
        yield from _explain_departures(merge)
    elif merge.rule == "persistence":
        yield from _explain_persistence(scenario, shared)
    elif is_import_path(merge.rule):
        kwargs = f" with {short_toml(merge.kwargs)}" if merge.kwargs else ""
        yield f"The shared blocks are merged by your own rule, {merge.rule}{kwargs}."
    else:
        yield {
            "mean": "The server takes the mean of the clients' parameters; no client departs from a group.",
            "fisher": "The server takes the mean of the clients' parameters, each weighted by its Fisher information.",
            "median": "The server takes the median of the clients, parameter by parameter.",
            "trimmed-mean": "The server takes the mean of the clients, parameter by parameter, without"
            f" {merge.fraction:.0%} of the weight at either end.",
            "krum": f"The server takes the mean of the {merge.keep} most similar clients, and tolerates up to"
            f" {merge.byzantine} hostile ones (Krum).",
            "clusters": "The server learns clusters of clients and takes the mean of each, with up to"
            f" {merge.most} clusters for each block.",
        }[merge.rule]
        if merge.rule == "clusters":
            yield (
                "Clients leave a cluster together where their deviation from it repeats from round to round, rho >"
                f" {_fraction(PAYS)}, and opposes it; from round {MIN_ROUNDS} on. Clusters stay apart."
            )
    yield WEIGHTS[merge.weights]


def _explain_departures(merge: MergeSettings) -> Iterator[str]:
    if merge.threshold is None:
        yield "The server takes the mean of the clients' parameters; no client departs from a group."
    elif merge.threshold == 0:
        yield "With threshold 0 every client departs from every group and keeps its own values."
    else:
        yield (
            f"A client departs from a group where it is further than {merge.threshold:g} per parameter from the others."
            " It keeps its own values there, and comes back once it is nearer."
        )
        yield "The shared blocks are " + (
            "the mean of the clients that stay."
            if merge.refit
            else "the solution of the group lasso, on which departed clients have a bounded pull."
        )
    yield from _explain_thresholds(merge)


def _explain_persistence(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain what the rule `persistence` compares, from which round on a client may leave, and which groups."""
    groups = shared.groups
    yield (
        "The server takes the mean of the clients' parameters in each group, over the clients that share it; an update"
        f" longer than {CUT:g} times the median is shortened to that."
    )
    yield (
        "It compares the directions of the updates, (theta - s) / ||theta - s||, in each group and over all rounds: rho"
        " is the part of a client's deviation from the others that repeats from round to round, 0 by chance and 1 if it"
        f" is always the same. A client leaves a group if rho > {_fraction(PAYS)} and its updates oppose the others'."
    )
    first = {
        name: rounds_of_evidence(int(size)) for name, size in zip(groups.names, groups.sizes.tolist(), strict=True)
    }
    soonest = min(first.values())
    if scenario.rounds < soonest:
        yield f"No client can leave in {format_count(scenario.rounds, 'round')}: the evidence takes {soonest} rounds."
        return
    later = [f"{name} {rounds}" for name, rounds in first.items() if rounds > soonest]
    small = f"; smaller groups take more: {_list(later)}" if later else ""
    yield (
        f"A client may leave from round {soonest} on, when it has taken part in {soonest} rounds{small}. With each"
        " departure the evidence about it begins again and takes twice as many rounds,"
        f" {2 * MIN_ROUNDS} after the first."
    )
    chains: dict[str, list[str]] = {}
    for block, chain in zip(groups.as_blocks.names, groups.as_blocks.chains, strict=True):
        chains.setdefault(chain, []).append(block)
    ordered = [_list(chain) for chain in chains.values() if len(chain) > 1]
    if ordered:
        yield (
            f"These blocks follow each other: {'; '.join(ordered)}. Of those in which both hold, a client leaves only"
            f" the first whose rho is at least {_fraction(UPSTREAM)} of its greatest, since consequences come later."
        )
    else:
        yield "A client leaves all groups at once in which both hold."
    yield from _explain_playing(scenario.merge)


def _explain_playing(merge: MergeSettings) -> Iterator[str]:
    """Explain when clients play with their own parameters and with the shared ones."""
    episodes = f"{merge.episodes} to {TIMES * merge.episodes} episodes"
    if merge.confirm == "returns":
        yield (
            f"Before it leaves it plays {episodes} with its own parameters and with the shared ones, and stays where"
            f" sharing loses less than {MARGIN:.0%} of what it has learned. That takes one more round."
        )
    if merge.rejoin:
        yield (
            f"{format_count(merge.rejoin, 'round')} after it has left, and so on, it plays {episodes} with each, and"
            " comes back where sharing is no worse."
        )
    else:
        yield "It does not come back."


def _fraction(value: float) -> str:
    """Write a simple fraction as such: `2/3`."""
    return str(Fraction(value).limit_denominator(10))


def _explain_thresholds(merge: MergeSettings) -> Iterator[str]:
    """Name the thresholds of single blocks."""
    for pattern, bound in merge.blocks.items():
        yield f"The threshold of {pattern} is {'inf' if bound is None else format(bound, 'g')}."


def _explain_step(scenario: Scenario, budgets: Mapping[str, float]) -> Iterator[str]:
    proximity = scenario.proximity
    if not budgets:
        yield "There is no shared block, and no step to limit."
        return
    if proximity.mode == "off":
        yield "The shared blocks go all the way to the merge; no KL budget limits the step."
        return
    how = {
        "measured": f"clients measure it on {proximity.states} states that stay with them",
        "quadratic": "it is predicted from Fisher information",
    }[proximity.mode]
    over = "mean over clients" if proximity.over == "mean" else "worst client"
    yield f"The step of each block is shortened until the KL that it causes ({over}) is within a budget; {how}."
    blocks = _list(f"{name} {_budget(limit)}" for name, limit in budgets.items())
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
    yield f"Each client is evaluated on {format_count(scenario.evaluate.episodes, 'episode')} {when}."
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


def _list(names: Iterable[str]) -> str:
    """Write names in a sentence, shortened if they are many."""
    return shorten(", ".join(names), MAX_LETTERS)
