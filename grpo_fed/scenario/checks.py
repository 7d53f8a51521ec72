"""What contradicts itself in a scenario, listed with its cure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from grpo_fed.scenario import methods, presets
from grpo_fed.scenario import tables as rows
from grpo_fed.scenario.defaults import is_complete
from grpo_fed.scenario.settings import (
    RULES_WITH_THRESHOLD,
    ClientSettings,
    ObjectiveSettings,
    PenaltySettings,
    PolicySettings,
    Section,
    TrustSettings,
)
from grpo_fed.scenario.toml import reading as read
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.reading import Mistake

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario


def contradictions(scenario: Scenario) -> Iterator[Mistake]:
    """What contradicts itself; what needs an environment or a policy to be known is found when they are built."""
    yield from _row_mistakes(scenario)
    yield from _policy_mistakes(scenario.policy)
    yield from _batch_mistakes(scenario)
    yield from _objective_mistakes(scenario.objective)
    yield from _group_mistakes(scenario)
    yield from _trust_mistakes(scenario.trust, scenario.objective)
    yield from _penalty_mistakes(scenario.penalty)
    yield from _federation_mistakes(scenario)
    yield from _client_mistakes(scenario.clients)
    yield from _name_mistakes(scenario.clients)


def _mistake(text: str, *keys: str | KeyPath) -> Mistake:
    """Between these keys. Where a preset or a method may have given one of them a value, its name is a key
    concerned as well.
    """
    paths = [tuple(key.split(".")) if isinstance(key, str) else key for key in keys]
    named: list[KeyPath] = [("objective", "preset")] if any(path in presets.KEYS_OF_PRESETS for path in paths) else []
    named += [("method",)] if any(path in methods.KEYS_OF_METHODS for path in paths) else []
    return Mistake((*paths, *named), text)


def _row_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Of the user's own preset and method."""
    model = type(scenario)
    sections = {name: part for name in model.model_fields if isinstance(part := getattr(scenario, name), Section)}
    if is_complete(model, {name: part.model_fields_set for name, part in sections.items()}):
        return
    method, preset = scenario.method, scenario.objective.preset
    for path, name, find in (
        (("method",), method, lambda: rows.find_row(method, methods.METHODS, methods.Method)),
        (("objective", "preset"), preset, lambda: rows.find_row(preset, presets.PRESETS, presets.Preset)),
    ):
        row: rows.TableRow | None
        try:
            row = find()
        except ValueError as error:
            yield Mistake((path,), str(error))
        else:
            values = row.values if row and rows.is_import_path(name) else {}
            for fault in read.section_errors(model, values):
                yield Mistake((path,), fault)
            if "preset" in values.get("objective", {}) and path != ("method",):
                text = "has objective.preset, its own name; build on the values of PRESETS instead"
                yield Mistake((path,), text)


def _policy_mistakes(policy: PolicySettings) -> Iterator[Mistake]:
    if policy.kwargs and policy.module is None:
        yield _mistake("these are arguments for policy.module, which is not given", "policy.kwargs", "policy.module")
    if policy.adapter and policy.module is not None:
        text = "a module of your own has its first layer itself; leave policy.adapter out"
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
    """Names of sets with something that stands in them twice or in an earlier one too, and that said in words."""
    owner: dict[int, str] = {}
    for name, indices in sets.items():
        for index in indices:
            if index in owner:
                yield name, f"{index} stands {'here twice' if owner[index] == name else f'in {owner[index]} too'}"
                break
            owner[index] = name


def _batch_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    rollout, objective = scenario.rollout, scenario.objective
    if objective.advantage != "gae":
        return
    samples = rollout.num_envs * rollout.horizon
    batch = f"rollout.num_envs x horizon = {samples}"
    sizes = ("rollout.num_envs", "rollout.horizon")
    if scenario.steps < samples:
        yield _mistake(f"steps = {scenario.steps} must hold an update, {batch} steps or more", "steps", *sizes)
    if objective.minibatches > samples:
        text = f"objective.minibatches = {objective.minibatches} must not be more than the steps of an update: {batch}"
        yield _mistake(text, "objective.minibatches", *sizes)
    elif objective.normalise_advantages == "minibatch" and samples // objective.minibatches < 2:
        text = f"advantages normalised by minibatch need 2 steps or more in each: at most {samples // 2} minibatches"
        yield _mistake(text, "objective.minibatches", "objective.normalise_advantages", *sizes)
    elif objective.normalise_advantages == "batch" and samples < 2:
        yield _mistake(f"normalised advantages need 2 steps or more; {batch}", "objective.normalise_advantages", *sizes)


def _objective_mistakes(objective: ObjectiveSettings) -> Iterator[Mistake]:
    if objective.surrogate != "clip":
        needs = f'needs objective.surrogate = "clip"; it is "{objective.surrogate}"'
        if objective.clip_high is not None:
            yield _mistake(needs, "objective.clip_high", "objective.surrogate")
        if objective.clip_schedule != "constant":
            yield _mistake(needs, "objective.clip_schedule", "objective.surrogate")
    known = list(objective.entropy_groups)
    for name in objective.entropy_weights:
        if name not in known:
            text = f"objective.entropy_groups has no {name}; it has {' '.join(known) if known else 'none'}"
            yield _mistake(text, ("objective", "entropy_weights", name), "objective.entropy_groups")
    for name, text in _overlaps(objective.entropy_groups):
        yield _mistake(f"component {text}; groups must not overlap", ("objective", "entropy_groups", name))


def _group_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    group, copies = scenario.group, scenario.rollout.num_envs
    if group.by == "context" and not group.key:
        yield _mistake('group.by = "context" needs group.key, a key of info', "group.key", "group.by")
    if group.by != "context" and group.key:
        yield _mistake(f'needs group.by = "context"; it is "{group.by}"', "group.key", "group.by")
    if scenario.objective.advantage != "group":
        return
    keys = ("rollout.num_envs", "group.size", "group.by", "objective.advantage")
    if group.by == "start" and copies % group.size:
        right = max(group.size, copies // group.size * group.size)
        text = f"rollout.num_envs = {copies} must be a multiple of group.size = {group.size}: {right} is"
        yield _mistake(text, *keys)
    if group.by == "similarity" and copies > 1 and group.clusters > copies // 2:
        text = f"group.clusters = {group.clusters} must leave each of {copies} episodes (rollout.num_envs) another one"
        yield _mistake(f"{text}: at most {copies // 2}", "group.clusters", *keys)
    if group.by != "start" and copies < 2:
        yield _mistake("an episode alone has nothing to be judged against: rollout.num_envs must be 2 or more", *keys)


def _trust_mistakes(trust: TrustSettings, objective: ObjectiveSettings) -> Iterator[Mistake]:
    keys = ("trust.region", "objective.step")
    if trust.region == "hard" and objective.step != "natural":
        text = f'trust.region = "hard" needs objective.step = "natural"; it is "{objective.step}"'
        yield _mistake(text, *keys)
    if trust.region in ("penalty", "adaptive") and objective.step == "natural":
        text = f'trust.region = "{trust.region}" does nothing to a natural step, which begins where the KL is flat'
        yield _mistake(f'{text}; "hard" or "none" would be right', *keys)
    if trust.region == "hard" and trust.reference != "old":
        text = 'trust.region = "hard" measures from the old policy: trust.reference = "old" would be right'
        yield _mistake(text, "trust.reference", "trust.region")
    if trust.region == "adaptive" and trust.coefficient == 0:
        text = 'trust.region = "adaptive" doubles and halves trust.coefficient, which must begin above 0'
        yield _mistake(text, "trust.coefficient", "trust.region")
    if trust.stop is not None and objective.step == "natural":
        text = (
            'leaves out the rest of Adam\'s passes, of which a natural step has none; trust.region = "hard" limits it'
        )
        yield _mistake(text, "trust.stop", "objective.step")
    if trust.adaptive_target and trust.region != "hard":
        text = f'needs trust.region = "hard"; it is "{trust.region}"'
        yield _mistake(text, "trust.adaptive_target", "trust.region")


def _penalty_mistakes(penalty: PenaltySettings) -> Iterator[Mistake]:
    if penalty.l1 and penalty.kind != "sparse-group":
        yield _mistake(f'needs penalty.kind = "sparse-group"; it is "{penalty.kind}"', "penalty.l1", "penalty.kind")
    if penalty.outer and penalty.kind != "nested":
        yield _mistake(f'needs penalty.kind = "nested"; it is "{penalty.kind}"', "penalty.outer", "penalty.kind")


def _federation_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    rule, personal, stop = scenario.merge.rule, scenario.personal, scenario.stop
    if scenario.merge.kwargs and not rows.is_import_path(rule):
        text = f'these are arguments for a rule of your own, merge.rule = "module:function"; it is "{rule}"'
        yield _mistake(text, "merge.kwargs", "merge.rule")
    if rule not in RULES_WITH_THRESHOLD and scenario.merge.blocks:
        text = f'needs merge.rule = "huber" or "clusters"; it is "{rule}"'
        yield _mistake(text, "merge.blocks", "merge.rule")
    if personal.model and personal.first:
        text = "a client either has a policy of its own or trains its private blocks first, not both"
        yield _mistake(text, "personal.model", "personal.first")
    for key, wanted in (("target", stop.target is not None), ("patience", stop.patience > 0)):
        if wanted and not scenario.evaluate.every:
            yield _mistake("is judged by evaluations: set evaluate.every", f"stop.{key}", "evaluate.every")
    objective, samples = scenario.objective, scenario.rollout.num_envs * scenario.rollout.horizon
    if personal.first and (objective.step != "adam" or objective.epochs < 2):
        text = 'divides the epochs of an update: objective.step = "adam" and 2 epochs or more would be right'
        yield _mistake(text, "personal.first", "objective.step", "objective.epochs")
    part = min(personal.steps, 1 - personal.steps)
    if personal.model and objective.advantage == "gae" and part * scenario.steps < samples:
        text = f"each policy's part of steps = {scenario.steps} must hold an update, rollout.num_envs x horizon ="
        keys = ("personal.steps", "personal.model", "steps", "rollout.num_envs", "rollout.horizon")
        yield _mistake(f"{text} {samples} steps or more", *keys)


def _client_mistakes(clients: Sequence[ClientSettings]) -> Iterator[Mistake]:
    for number, client in enumerate(clients):
        here: KeyPath = ("clients", number)
        if client.spread and client.count < 2:
            text = "goes over the clients of count, which must be 2 or more"
            yield _mistake(text, (*here, "spread"), (*here, "count"))
        for key in client.spread.keys() & client.kwargs.keys():
            text = "stands in spread and in kwargs; one of them would be right"
            yield _mistake(text, (*here, "spread", key), (*here, "kwargs", key))
        if "render_mode" in client.kwargs:
            text = "only slows training down; `grpo-fed play` draws"
            yield _mistake(text, (*here, "kwargs", "render_mode"))


def _name_mistakes(clients: Sequence[ClientSettings]) -> Iterator[Mistake]:
    """Names become file names, which differ in more than case."""
    owner: dict[str, int] = {}
    for number, client in enumerate(clients):
        for name in client.names:
            other = owner.setdefault(name.lower(), number)
            if other != number:
                text = f"{name} is there already; names must differ, with those that count makes"
                yield _mistake(text, ("clients", number, "name"), ("clients", number, "count"), ("clients", other))
                break
