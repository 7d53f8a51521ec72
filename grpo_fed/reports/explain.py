"""What a scenario will do, in plain words: from its settled values and the real names of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fed.aggregation.merge.rules import check_rule
from grpo_fed.federation.server_step import block_budgets
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.tables import many
from grpo_fed.scenario.methods import METHODS, Method
from grpo_fed.scenario.presets import PRESETS, Preset
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings, ObjectiveSettings, TrustSettings
from grpo_fed.scenario.tables import TableRow, find_row_or_none, is_import_path
from grpo_fed.scenario.toml.text import short_toml, shorten

SURROGATES = {
    "score": "log pi * A, the plain policy gradient",
    "ratio": "ratio * A, the probability ratio of the new policy to the old",
    "clip": "min(ratio * A, clip(ratio) * A)",
}
WEIGHTS = {
    "steps": "by its steps",
    "episodes": "by its finished episodes",
    "uniform": "as much as any other",
    "progress": "by whether its return rises",
}
GROUPS = {
    "start": "others from the same start",
    "task": "the client's others",
    "context": "others with the same value of info",
    "similarity": "others from alike starts",
}
SCORES = {
    "zscore": "its distance from their mean in deviations",
    "centre": "its distance from their mean",
    "rank": "its rank among them",
    "leave-one-out": "its distance from the mean of the rest",
}


@dataclass(frozen=True)
class Part:
    """What there is to say of one thing."""

    title: str
    sentences: tuple[str, ...]


def explain_scenario(scenario: Scenario) -> list[Part]:
    """ValueError where a run would be refused before its first round."""
    setup = FederationSetup.of(scenario)
    commons = setup.shared_blocks
    check_rule(scenario.merge, commons)
    budgets = block_budgets(scenario.proximity, commons)
    private = _private(setup)
    parts = {
        "Who learns": _who(scenario),
        "What a client climbs": _objective(scenario),
        "Shared and private": _shared(scenario, commons, private),
        "How it is merged": _merge(scenario, commons),
        "How far a round goes": _budgets(scenario, budgets),
        "What is written": _written(scenario),
        "Where the values come from": _sources(scenario),
    }
    return [Part(title, tuple(sentences)) for title, sentences in parts.items()]


def _private(setup: FederationSetup) -> list[str]:
    """List the blocks that at least one client has and that are not shared."""
    policies = {task.signature: task for task in setup.tasks.values()}
    layouts = [make_policy(task, setup.scenario.policy).layout for task in policies.values()]
    names = dict.fromkeys(block.name for layout in layouts for block in layout.blocks)
    return [name for name in names if name not in setup.shared_blocks.blocks]


def _who(scenario: Scenario) -> Iterator[str]:
    count = sum(entry.count for entry in scenario.clients)
    named = [f"{entry.count} x {entry.name} on {entry.env}" for entry in scenario.clients[:6]]
    named += [f"and {len(scenario.clients) - 6} more"] if len(scenario.clients) > 6 else []
    yield f"{many(count, 'client')}: {shorten(', '.join(named), 160)}."
    yield f"{many(scenario.rounds, 'round')}; in each a client learns from {scenario.steps:,} steps of its own."
    part, stop = scenario.round, scenario.stop
    drawn = "All that can be reached" if part.fraction == 1 else f"A random {part.fraction:.0%} of those in reach"
    wait = "for ever" if part.deadline is None else f"{part.deadline:g} seconds"
    yield f"{drawn} take part; a message is waited for {wait}, and who has not answered is left out of the round."
    yield (
        f"With answers from less than {part.quorum:.0%} of them the shared blocks stay;"
        f" {many(part.patience, 'such round')} in a row end the run as failed."
    )
    if stop.target is not None:
        yield f"It ends early at an interquartile mean return of {stop.target:g}."
    if stop.patience:
        yield f"It ends early after {many(stop.patience, 'evaluation')} without a better one."


def _objective(scenario: Scenario) -> Iterator[str]:
    objective, penalty = scenario.objective, scenario.penalty
    clip = ""
    if objective.surrogate == "clip":
        high = objective.clip if objective.clip_high is None else objective.clip_high
        clip = f", the ratio held within 1 - {objective.clip:g} and 1 + {high:g}"
    yield f"{SURROGATES[objective.surrogate]}{clip}."
    yield _advantage(scenario)
    if objective.advantage == "gae":
        yield f"Less {objective.value_coefficient:g} times the critic's squared error."
    weights = {objective.entropy if entry.entropy is None else entry.entropy for entry in scenario.clients}
    if weights != {0.0}:
        yield f"Plus {_several(weights)} times the entropy of its actions."
    for name, weight in objective.entropy_weights.items():
        yield f"For the actions of {name} the entropy weighs {weight:g} instead."
    if scenario.trust.region != "none":
        yield _trust(scenario.trust)
    if scenario.trust.stop is not None:
        yield f"An update ends once the policy's KL is above {scenario.trust.stop:g}."
    for pattern, limit in scenario.trust.blocks.items():
        yield f"After an update {pattern} alone stays within KL {limit:g}."
    weights = {penalty.weight if entry.penalty is None else entry.penalty for entry in scenario.clients}
    if weights != {0.0} or penalty.l1 or penalty.outer:
        drawn = "the parameters" if penalty.toward == "zero" else "their departure from where the round began"
        extra = f", {penalty.l1:g} times |x| with it" if penalty.l1 else ""
        extra += f", {penalty.outer:g} for whole blocks around them" if penalty.outer else ""
        yield (
            f"Less {_several(weights)} times the norms of the groups of {', '.join(penalty.blocks)}{extra}:"
            f" {drawn} can become exactly zero."
        )
    if penalty.squared:
        yield f"Less {penalty.squared:g}/2 ||x - s||^2: shared blocks are held to s, where the round began."
    yield _optimiser(objective)


def _several(weights: set[float]) -> str:
    low, high = min(weights), max(weights)
    return f"{low:g}" if low == high else f"{low:g} to {high:g} (by client)"


def _advantage(scenario: Scenario) -> str:
    objective, group = scenario.objective, scenario.group
    if objective.advantage == "gae":
        return f"A is judged by a critic (gamma {objective.gamma:g}, lambda {objective.gae_lambda:g})."
    return f"A is an episode's return against {GROUPS[group.by]}, without a critic: {SCORES[group.score]}."


def _trust(trust: TrustSettings) -> str:
    order = "KL(old, new)" if trust.direction == "old-new" else "KL(new, old)"
    old = "the policy that collected the batch" if trust.reference == "old" else "the policy that the round began with"
    if trust.region == "hard":
        search = ", by a line search" if trust.line_search else ""
        return f"An update stays within {order} = {trust.target:g}{search}."
    change = f", doubled or halved to hold it near {trust.target:g}" if trust.region == "adaptive" else ""
    return f"Less {trust.coefficient:g} times {order}{change}, where old is {old}."


def _optimiser(objective: ObjectiveSettings) -> str:
    if objective.step == "natural":
        return f"By one natural-gradient step for each batch; {objective.value_epochs} passes for the critic."
    rate = "" if objective.schedule == "constant" else f", going down to 0 ({objective.schedule})"
    passes, parts = many(objective.epochs, "epoch"), f"{objective.minibatches} minibatch"
    parts += "es" if objective.minibatches > 1 else ""
    return f"By Adam, {passes} in {parts}, at {objective.learning_rate:g}{rate}."


def _shared(scenario: Scenario, commons: SharedBlocks, private: list[str]) -> Iterator[str]:
    personal = scenario.personal
    if not commons.size:
        yield f"Nothing is shared; every client has to itself: {_list(private)}."
    else:
        groups = many(len(commons.groups.names), "group")
        yield f"Shared by all clients: {_list(commons.blocks)} ({commons.size:,} parameters in {groups})."
        yield f"Private to each: {_list(private)}." if private else "No block is private."
    yield "Observations, actions, rewards, normalisers and the optimiser's state never leave a client."
    if personal.first:
        yield f"The first {personal.first:.0%} of an update's epochs move private blocks only, the rest shared ones."
    if personal.model:
        yield (
            f"A second policy of each client's own gets {personal.steps:.0%} of its steps, is drawn to the shared"
            f" one by {personal.pull:g}/2 ||v - s||^2, and is what plays."
        )


def _list(names: Any) -> str:
    return shorten(", ".join(names), 160)


def _merge(scenario: Scenario, commons: SharedBlocks) -> Iterator[str]:
    merge = scenario.merge
    if not commons.size:
        yield "There is nothing to merge: every client learns alone."
        return
    if merge.rule == "huber":
        yield from _departures(scenario)
    elif is_import_path(merge.rule):
        given = f" with {short_toml(merge.kwargs)}" if merge.kwargs else ""
        yield f"By a rule of your own, {merge.rule}{given}."
    else:
        yield {
            "mean": "The mean of what the clients send; nobody departs.",
            "persistence": "The mean of what the clients send, each update cut to twice the median norm. A client leaves"
            " a parameter group when its deviation from the others agrees with itself from round to round by more than"
            " its noise (rho > 1/2) and opposes theirs; the earliest is round 4.",
            "fisher": "The mean of what the clients send, each parameter weighed by its Fisher information.",
            "median": "The median of what the clients send, parameter by parameter.",
            "trimmed-mean": f"The mean without {merge.fraction:.0%} of the weight at either end, by parameter.",
            "krum": f"The mean of the {merge.keep} most alike, with up to {merge.byzantine} hostile (Krum).",
            "clusters": f"A mean in each learned cluster of clients, up to {merge.most} clusters for each block.",
        }[merge.rule]
        if merge.rule == "clusters":
            yield (
                "With threshold inf all clients are one cluster."
                if merge.threshold is None
                else f"Clusters lie further than {merge.threshold:g} a parameter from each other, or are one."
            )
            yield from _blocks(merge)
    yield f"A client counts {WEIGHTS[merge.weights]}."


def _departures(scenario: Scenario) -> Iterator[str]:
    merge = scenario.merge
    if merge.threshold is None:
        yield "The mean of what the clients send; no group departs."
    elif merge.threshold == 0:
        yield "Every group departs: with threshold 0 each client keeps its own."
    else:
        yield (
            f"A client leaves a group where it lies further than {merge.threshold:g} a parameter from the others,"
            " keeps its own there, and comes back once it lies nearer."
        )
        yield "The shared blocks are " + (
            "the mean of those who stay." if merge.refit else "what the group lasso says; the departed pull too."
        )
    yield from _blocks(merge)


def _blocks(merge: MergeSettings) -> Iterator[str]:
    """Thresholds of their own."""
    for pattern, bound in merge.blocks.items():
        yield f"For {pattern} the threshold is {'none' if bound is None else format(bound, 'g')}."


def _budgets(scenario: Scenario, budgets: Mapping[str, float]) -> Iterator[str]:
    proximity = scenario.proximity
    if not budgets:
        yield "There is no shared step to limit."
        return
    if proximity.mode == "off":
        yield "The whole step to the merge is made, whatever it does to the policies."
        return
    how = {
        "measured": f"clients measure it on {proximity.states} states that stay with them",
        "quadratic": "a Fisher diagonal predicts it",
    }[proximity.mode]
    over = "the clients' mean" if proximity.over == "mean" else "the worst client's"
    yield f"The step is shortened, block by block, until the KL that it causes ({over}) fits; {how}."
    alone = ", ".join(f"{name} {_limit(limit)}" for name, limit in budgets.items())
    joint = "no limit" if proximity.kl_joint is None else f"{proximity.kl_joint:g}"
    yield f"Budgets: {shorten(alone, 160)}; all together {joint}."
    if proximity.adaptive:
        yield "A budget widens where clients gained by the step, and tightens where they lost."


def _limit(limit: float) -> str:
    return "no limit" if limit == float("inf") else f"{limit:g}"


def _written(scenario: Scenario) -> Iterator[str]:
    every, kept = scenario.evaluate.every, scenario.checkpoint
    when = "before the first and after the last round" + (f", and every {many(every, 'round')}" if every else "")
    yield f"Each client plays {many(scenario.evaluate.episodes, 'episode')} {when}."
    yield "A line for each round, results.json, summary.md, figures and every client's policy, in the run's folder."
    if kept.every:
        often = "each round" if kept.every == 1 else f"every {kept.every} rounds"
        yield f"A checkpoint {often}, of which the latest {kept.keep} stay: --resume goes on from there."
    else:
        yield "No checkpoints: a run that is stopped cannot be resumed."


def _sources(scenario: Scenario) -> Iterator[str]:
    for kind, name, find in (
        ("Method", scenario.method, lambda: find_row_or_none(scenario.method, METHODS, Method)),
        (
            "Preset",
            scenario.objective.preset,
            lambda: find_row_or_none(scenario.objective.preset, PRESETS, Preset),
        ),
    ):
        row: TableRow | None = find()
        if row is None:
            yield f"{kind} {name} cannot be imported here; this scenario has all its values."
            continue
        changed = [
            f"{section}.{key} = {short_toml(now)}"
            for section, keys in row.values.items()
            for key, said in keys.items()
            if (now := getattr(getattr(scenario, section), key)) != said
        ]
        theirs = (
            f"this scenario changes {', '.join(changed)}" if changed else "this scenario changes none of its values"
        )
        yield f"{kind} {name} ({row.name}): {theirs}."
    yield "All else is the scenario's own or a default: grpo-fed config shows those."
