"""Finds contradictions between the keys of a scenario and says how to resolve them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel

from grpo_fed.scenario.constraint_checks import constraint_contradictions
from grpo_fed.scenario.curriculum_checks import curriculum_contradictions
from grpo_fed.scenario.hostile_checks import hostile_contradictions
from grpo_fed.scenario.language_checks import language_contradictions
from grpo_fed.scenario.methods import KEYS_OF_METHODS, METHODS, Method
from grpo_fed.scenario.network_checks import network_contradictions
from grpo_fed.scenario.newcomers import newcomer_contradictions
from grpo_fed.scenario.presets import KEYS_OF_PRESETS, PRESETS, Preset
from grpo_fed.scenario.privacy_checks import privacy_contradictions
from grpo_fed.scenario.score_checks import score_contradictions
from grpo_fed.scenario.settings import (
    RULES_WITH_THRESHOLD,
    ClientSettings,
    ObjectiveSettings,
    PenaltySettings,
    PolicySettings,
    Section,
    TrustSettings,
)
from grpo_fed.scenario.site_checks import site_contradictions
from grpo_fed.scenario.tables import AnyRow, find_row, is_complete, is_import_path
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.mistakes import Mistake, section_errors

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario


MOST_CLIENTS = 100_000
"""Clients that a federation may have: ten times as many as have been tried. More are a typing error."""


def contradictions(scenario: Scenario) -> Iterator[Mistake]:
    """Find all contradictions that can be seen without an environment or a policy."""
    if sum(client.count for client in scenario.clients) > MOST_CLIENTS:
        yield from _count_mistakes(scenario.clients)
        return
    yield from _row_mistakes(scenario)
    yield from _policy_mistakes(scenario.policy)
    yield from _batch_mistakes(scenario)
    yield from _reward_mistakes(scenario)
    yield from _objective_mistakes(scenario.objective)
    yield from _group_mistakes(scenario)
    yield from _trust_mistakes(scenario.trust, scenario.objective)
    yield from _penalty_mistakes(scenario.penalty)
    yield from _merge_mistakes(scenario)
    yield from _optimiser_mistakes(scenario)
    yield from _drift_mistakes(scenario)
    yield from _round_mistakes(scenario)
    yield from _stop_mistakes(scenario)
    yield from _personal_mistakes(scenario)
    yield from _client_mistakes(scenario.clients)
    yield from _name_mistakes(scenario.clients)
    if not any(client.trains for client in scenario.clients):
        places: list[KeyPath] = [("clients", number, "trains") for number in range(len(scenario.clients))]
        yield _mistake("no client takes part in training; leave trains out of one entry", *places)
    checks = (
        hostile_contradictions,
        language_contradictions,
        curriculum_contradictions,
        constraint_contradictions,
        privacy_contradictions,
        network_contradictions,
        newcomer_contradictions,
        score_contradictions,
    )
    for text, keys in (contradiction for check in checks for contradiction in check(scenario)):
        yield _mistake(text, *keys)
    yield from site_contradictions(scenario, contradictions)


def _mistake(text: str, *keys: str | KeyPath) -> Mistake:
    """Make a mistake that concerns these keys, and the preset or method by which one of them may have got its value."""
    paths = [tuple(key.split(".")) if isinstance(key, str) else key for key in keys]
    rows: list[KeyPath] = []
    if not KEYS_OF_PRESETS.isdisjoint(paths):
        rows.append(("objective", "preset"))
    if not KEYS_OF_METHODS.isdisjoint(paths):
        rows.append(("method",))
    return Mistake((*paths, *rows), text)


def _row_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Check a method and a preset of the user's own; a resolved scenario needs neither, so they may be missing."""
    model = type(scenario)
    sections = {name: part for name in model.model_fields if isinstance(part := getattr(scenario, name), Section)}
    if is_complete(model, {name: section.model_fields_set for name, section in sections.items()}):
        return
    yield from _mistakes_of_row(model, ("method",), scenario.method, METHODS, Method)
    yield from _mistakes_of_row(model, ("objective", "preset"), scenario.objective.preset, PRESETS, Preset)


def _mistakes_of_row(
    model: type[BaseModel], key: KeyPath, name: str, table: Mapping[str, AnyRow], kind: type[AnyRow]
) -> Iterator[Mistake]:
    """Check the row that a key names."""
    try:
        row = find_row(name, table, kind)
    except ValueError as error:
        yield Mistake((key,), str(error))
        return
    if row is None or not is_import_path(name):
        return
    for error_text in section_errors(model, row.values):
        yield Mistake((key,), error_text)
    if kind is Preset and "preset" in row.values.get("objective", {}):
        text = "has objective.preset, which names the preset itself; build on the values of PRESETS instead"
        yield Mistake((key,), text)


def _policy_mistakes(policy: PolicySettings) -> Iterator[Mistake]:
    if policy.kwargs and policy.module is None:
        yield _mistake("these are arguments for policy.module, which is not given", "policy.kwargs", "policy.module")
    if policy.adapter and policy.module is not None:
        text = "a module of your own has its own first layer; leave policy.adapter out"
        yield _mistake(text, "policy.adapter", "policy.module")
    for pattern, rule in policy.groups.items():
        sets: dict[str, dict[str, list[int]]] = {}
        for name, parts in rule.items() if isinstance(rule, dict) else ():
            for part, indices in parts.items():
                sets.setdefault(part, {})[name] = indices
        for part, named in sets.items():
            for name, text in _overlaps(named):
                yield _mistake(f"{text}; sets must not overlap", ("policy", "groups", pattern, name, part))


def _overlaps(sets: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """Find sets with an index that occurs twice or in an earlier set: their names, and what is wrong in words."""
    owner: dict[int, str] = {}
    for name, indices in sets.items():
        for index in indices:
            if index in owner:
                yield name, f"{index} is {'listed twice' if owner[index] == name else f'also in {owner[index]}'}"
                break
            owner[index] = name


def _batch_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    rollout, objective = scenario.rollout, scenario.objective
    if objective.advantage != "gae" or all(client.prompts is not None for client in scenario.clients):
        return
    samples = rollout.num_envs * rollout.horizon
    batch = f"rollout.num_envs x horizon = {samples}"
    sizes = ("rollout.num_envs", "rollout.horizon")
    if scenario.steps < samples:
        text = f"steps = {scenario.steps} must be enough for one update: {batch}"
        yield _mistake(text, "steps", *sizes)
    if objective.minibatches > samples:
        text = f"objective.minibatches = {objective.minibatches} must not be more than the steps of an update: {batch}"
        yield _mistake(text, "objective.minibatches", *sizes)
    elif objective.normalise_advantages == "minibatch" and samples // objective.minibatches < 2:
        text = f"advantages normalised by minibatch need 2 steps or more in each: at most {samples // 2} minibatches"
        yield _mistake(text, "objective.minibatches", "objective.normalise_advantages", *sizes)
    elif objective.normalise_advantages == "batch" and samples < 2:
        yield _mistake(f"normalised advantages need 2 steps or more; {batch}", "objective.normalise_advantages", *sizes)


def _reward_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    rollout, text = scenario.rollout, "normalise.rewards divides rewards by their running scale and clips them itself"
    if not scenario.normalise.rewards:
        return
    for key, is_given in (
        ("reward_scale", rollout.reward_scale != 1),
        ("reward_clip", rollout.reward_clip is not None),
    ):
        if is_given:
            yield _mistake(f"{text}; use one of the two", f"rollout.{key}", "normalise.rewards")
    for number, client in enumerate(scenario.clients):
        if client.reward_scale is not None:
            yield _mistake(f"{text}; use one of the two", ("clients", number, "reward_scale"), "normalise.rewards")


def _objective_mistakes(objective: ObjectiveSettings) -> Iterator[Mistake]:
    if objective.surrogate != "clip":
        text = f'needs objective.surrogate = "clip"; it is "{objective.surrogate}"'
        if objective.clip_high is not None:
            yield _mistake(text, "objective.clip_high", "objective.surrogate")
        if objective.clip_schedule != "constant":
            yield _mistake(text, "objective.clip_schedule", "objective.surrogate")
    names = list(objective.entropy_groups)
    for name in objective.entropy_weights:
        if name not in names:
            text = f"objective.entropy_groups has no {name}; it has {' '.join(names) if names else 'none'}"
            yield _mistake(text, ("objective", "entropy_weights", name), "objective.entropy_groups")
    for name, text in _overlaps(objective.entropy_groups):
        yield _mistake(f"component {text}; groups must not overlap", ("objective", "entropy_groups", name))


def _group_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    group, num_envs = scenario.group, scenario.rollout.num_envs
    if group.by == "context" and not group.key:
        yield _mistake('group.by = "context" needs group.key, a key of info', "group.key", "group.by")
    if group.by != "context" and group.key:
        yield _mistake(f'needs group.by = "context"; it is "{group.by}"', "group.key", "group.by")
    if scenario.objective.advantage != "group":
        return
    keys = ("rollout.num_envs", "group.size", "group.by", "objective.advantage")
    if group.by == "start" and num_envs % group.size:
        multiple = max(group.size, num_envs // group.size * group.size)
        text = f"rollout.num_envs = {num_envs} must be a multiple of group.size = {group.size}; use {multiple}"
        yield _mistake(text, *keys)
    if group.by == "similarity" and num_envs > 1 and group.clusters > num_envs // 2:
        text = f"group.clusters = {group.clusters} leaves some of {num_envs} episodes (rollout.num_envs) alone"
        yield _mistake(f"{text} in their group; use at most {num_envs // 2}", "group.clusters", *keys)
    if group.by != "start" and num_envs < 2:
        text = "a single episode has no other to be compared with: rollout.num_envs must be 2 or more"
        yield _mistake(text, *keys)


def _trust_mistakes(trust: TrustSettings, objective: ObjectiveSettings) -> Iterator[Mistake]:
    keys = ("trust.region", "objective.step")
    if trust.region == "hard" and objective.step != "natural":
        text = f'trust.region = "hard" needs objective.step = "natural"; it is "{objective.step}"'
        yield _mistake(text, *keys)
    if trust.region in ("penalty", "adaptive") and objective.step == "natural":
        text = f'trust.region = "{trust.region}" has no effect on a natural step, which starts where the KL is flat'
        yield _mistake(f'{text}; use "hard" or "none"', *keys)
    if trust.region == "hard" and trust.reference != "old":
        text = 'trust.region = "hard" limits the KL from the old policy: use trust.reference = "old"'
        yield _mistake(text, "trust.reference", "trust.region")
    if trust.region == "adaptive" and trust.coefficient == 0:
        text = 'trust.region = "adaptive" doubles and halves trust.coefficient, which must start above 0'
        yield _mistake(text, "trust.coefficient", "trust.region")
    if trust.stop is not None and objective.step == "natural":
        text = 'ends Adam\'s passes early, and a natural step has no such passes; trust.region = "hard" limits it'
        yield _mistake(text, "trust.stop", "objective.step")
    if trust.adaptive_target and trust.region != "hard":
        text = f'needs trust.region = "hard"; it is "{trust.region}"'
        yield _mistake(text, "trust.adaptive_target", "trust.region")


def _penalty_mistakes(penalty: PenaltySettings) -> Iterator[Mistake]:
    if penalty.l1 and penalty.kind != "sparse-group":
        yield _mistake(f'needs penalty.kind = "sparse-group"; it is "{penalty.kind}"', "penalty.l1", "penalty.kind")
    if penalty.outer and penalty.kind != "nested":
        yield _mistake(f'needs penalty.kind = "nested"; it is "{penalty.kind}"', "penalty.outer", "penalty.kind")


def _merge_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    rule = scenario.merge.rule
    if scenario.merge.kwargs and not is_import_path(rule):
        text = f'these are arguments for a rule of your own, merge.rule = "module:function"; it is "{rule}"'
        yield _mistake(text, "merge.kwargs", "merge.rule")
    if rule in RULES_WITH_THRESHOLD and "threshold" not in scenario.merge.model_fields_set:
        text = (
            "huber needs merge.threshold, which has no default: the distance (root mean square) beyond which a client"
        )
        cure = 'leaves a group; merge.rule = "persistence" needs none'
        yield _mistake(f"{text} {cure}", "merge.threshold", "merge.rule")
    if rule not in RULES_WITH_THRESHOLD and scenario.merge.blocks:
        text = f'needs merge.rule = "huber"; it is "{rule}"'
        yield _mistake(text, "merge.blocks", "merge.rule")


def _optimiser_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    merge, penalty = scenario.merge, scenario.penalty
    key = "merge.optimiser" if merge.optimiser != "sgd" else "merge.rate"
    if merge.optimiser == "sgd" and merge.rate == 1:
        return
    if merge.rule == "clusters":
        text = 'steps of one server optimiser do not fit several clusters: use merge.optimiser = "sgd", merge.rate = 1'
        yield _mistake(text, key, "merge.rule")
    weights = [penalty.weight if client.penalty is None else client.penalty for client in scenario.clients]
    if penalty.toward == "zero" and (any(weights) or penalty.l1 or penalty.outer):
        text = 'a step beyond or short of the merge loses the exact zeros of penalty.toward = "zero"'
        yield _mistake(f'{text}: use merge.optimiser = "sgd", merge.rate = 1', key, "penalty.toward")


def _drift_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Check that a client can tell the mean step of all from how the shared blocks have moved."""
    merge, objective = scenario.merge, scenario.objective
    needed = {
        'merge.rule = "mean"': ("merge.rule", merge.rule == "mean"),
        "merge.mix = 0": ("merge.mix", merge.mix == 0),
        'merge.optimiser = "sgd"': ("merge.optimiser", merge.optimiser == "sgd"),
        "merge.rate = 1": ("merge.rate", merge.rate == 1),
        'proximity.mode = "off"': ("proximity.mode", scenario.proximity.mode == "off"),
        'round.mode = "sync"': ("round.mode", scenario.round.mode == "sync"),
        "round.fraction = 1": ("round.fraction", scenario.round.fraction == 1),
        'objective.step = "adam"': ("objective.step", objective.step == "adam"),
        "personal.first = 0": ("personal.first", scenario.personal.first == 0),
    }
    for text, (key, is_met) in needed.items() if merge.correct_drift else ():
        if not is_met:
            yield _mistake(f"needs {text}", "merge.correct_drift", key)


def _round_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    settings, proximity = scenario.round, scenario.proximity
    if settings.mode != "buffered":
        return
    if settings.fraction < 1:
        text = "the server gives work to whoever has none, so nobody is sampled; leave round.fraction out"
        yield _mistake(text, "round.fraction", "round.mode")
    if settings.again == "at-once" and proximity.mode == "measured" and scenario.policy.shared:
        text = 'clients that train on cannot measure the step; set proximity.mode = "quadratic", or round.again'
        yield _mistake(text, "round.again", "proximity.mode")
    if (
        settings.staleness == "kl"
        and scenario.policy.shared
        and (proximity.mode == "off" or proximity.kl_joint is None)
    ):
        text = "needs the KL of the server's steps and its budget: set proximity.mode and proximity.kl_joint"
        yield _mistake(text, "round.staleness", "proximity.mode", "proximity.kl_joint")


def _stop_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    stop = scenario.stop
    for key, is_set in (("target", stop.target is not None), ("patience", stop.patience > 0)):
        if is_set and not scenario.evaluate.every:
            yield _mistake("needs evaluations between rounds: set evaluate.every", f"stop.{key}", "evaluate.every")


def _personal_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    personal, objective = scenario.personal, scenario.objective
    if personal.model and personal.first:
        text = "a client either has a second policy or trains its private blocks first, not both"
        yield _mistake(text, "personal.model", "personal.first")
    if personal.first and (objective.step != "adam" or objective.epochs < 2):
        text = 'divides the epochs of an update; use objective.step = "adam" and 2 epochs or more'
        yield _mistake(text, "personal.first", "objective.step", "objective.epochs")
    yield from _inner_step_mistakes(scenario)
    samples = scenario.rollout.num_envs * scenario.rollout.horizon
    smaller_part = min(personal.steps, 1 - personal.steps)
    if personal.model and objective.advantage == "gae" and smaller_part * scenario.steps < samples:
        text = (
            f"each policy's part of steps = {scenario.steps} must be enough for one update: rollout.num_envs x horizon"
        )
        keys = ("personal.steps", "personal.model", "steps", "rollout.num_envs", "rollout.horizon")
        yield _mistake(f"{text} = {samples}", *keys)


def _inner_step_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Check that minibatches come in pairs, one for the inner step and one for the gradient after it."""
    personal, objective, trust = scenario.personal, scenario.objective, scenario.trust
    if not personal.inner_rate:
        return
    if objective.step != "adam":
        yield _mistake('needs objective.step = "adam"', "personal.inner_rate", "objective.step")
    elif objective.epochs * objective.minibatches % 2:
        text = "takes minibatches in pairs: objective.epochs x minibatches must be even"
        yield _mistake(text, "personal.inner_rate", "objective.epochs", "objective.minibatches")
    if trust.stop is not None:
        text = "moves the policy to and fro, and trust.stop would measure either place; leave one of them out"
        yield _mistake(text, "personal.inner_rate", "trust.stop")
    if personal.first:
        text = "an update either trains private blocks first or looks ahead with all, not both"
        yield _mistake(text, "personal.inner_rate", "personal.first")


def _count_mistakes(clients: Sequence[ClientSettings]) -> Iterator[Mistake]:
    """Point at the entry with the most clients, where there are too many to name and check each."""
    total = sum(client.count for client in clients)
    number = max(range(len(clients)), key=lambda index: clients[index].count)
    text = f"{total:,} clients in all; a federation has {MOST_CLIENTS:,} at most"
    yield _mistake(text, ("clients", number, "count"), ("clients", number))


def _client_mistakes(clients: Sequence[ClientSettings]) -> Iterator[Mistake]:
    for number, client in enumerate(clients):
        path: KeyPath = ("clients", number)
        if client.spread and client.count < 2:
            text = "gives each of several clients another value, so count must be 2 or more"
            yield _mistake(text, (*path, "spread"), (*path, "count"))
        for key in client.spread.keys() & client.kwargs.keys():
            text = "is in both spread and kwargs; use one of them"
            yield _mistake(text, (*path, "spread", key), (*path, "kwargs", key))
        tables = [(*path, "kwargs"), *((*path, "changes", index, "kwargs") for index in range(len(client.changes)))]
        for table, kwargs in zip(tables, (client.kwargs, *(change.kwargs for change in client.changes)), strict=True):
            if "render_mode" in kwargs:
                text = "slows training down; `grpo-fed play` shows episodes"
                yield _mistake(text, (*table, "render_mode"))
        for index, (change, following) in enumerate(pairwise(client.changes), 1):
            if following.round <= change.round:
                text = (
                    f"must be after round {change.round}, that of the change before; put changes of one round together"
                )
                yield _mistake(text, (*path, "changes", index, "round"), (*path, "changes", index - 1, "round"))


def _name_mistakes(clients: Sequence[ClientSettings]) -> Iterator[Mistake]:
    """Names become file names, which must differ in more than case."""
    owner: dict[str, int] = {}
    for number, client in enumerate(clients):
        for name in client.names:
            first = owner.setdefault(name.lower(), number)
            if first != number:
                text = f"another client is called {name}, by its name or count; names must differ"
                yield _mistake(text, ("clients", number, "name"), ("clients", number, "count"), ("clients", first))
                break
