"""The scenario: every knob of a run with its default, its limits and its meaning in one place.

A scenario is frozen data, and complete as soon as it exists: what its preset says is filled in, and what contradicts
itself is refused. `Scenario.load` reads one from TOML (read.py) and lists all that is wrong with it.

Conventions. A limit that is not wanted is `inf` in TOML and None in Python. Where a count can be left out, 0 does it.
What merely rests (the KL's weight where there is no KL) may be set; what contradicts (a hard region without the natural
step) may not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo_fed import methods, presets, read, rows
from grpo_fed.kinds import (
    NAMED_OR_OWN,
    Arguments,
    Bound,
    Count,
    Device,
    Environment,
    Fraction,
    GroupRule,
    ImportPath,
    Indices,
    Limit,
    Many,
    Name,
    Named,
    NotNegative,
    Own,
    Pattern,
    Positive,
    Size,
)
from grpo_fed.locate import Path
from grpo_fed.read import Mistake

DISTANT = ("huber", "clusters")
"""Rules to merge that look at how far clients lie from each other."""


class Section(BaseModel):
    """What all parts of a scenario have in common: frozen, strict, and no key that we do not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PolicySettings(Section):
    """The network of every client, and how its parameters are cut into blocks."""

    hidden: list[Size] = [64, 64]
    """Units of each hidden layer; with `torso = "separate"` the critic has its own layers of the same sizes."""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """The function between the layers."""
    torso: Literal["separate", "shared"] = "separate"
    """Whether actor and critic each have hidden layers of their own, or read the same ones."""
    adapter: Annotated[int, Ge(0)] = 0
    """Features of a private first layer that lets clients with unlike observations share what follows; 0 for none."""
    squash: bool = False
    """Gaussian actions go through tanh and onto the action box, instead of being clipped to it."""
    log_std: Annotated[float, Ge(-20), Le(5)] = 0.0
    """Where the logarithm of a Gaussian policy's standard deviation begins."""
    orthogonal: bool = True
    """Orthogonal initialisation (gain sqrt(2) inside, 0.01 on the actor, 1 on the critic), or torch's own."""
    same_start: bool = True
    """All clients begin from the same parameters wherever the shapes agree; blocks are only comparable then."""
    module: ImportPath | None = None
    """A torch module of your own, `package.module:Class`, called with `(observation_space, action_space, **kwargs)`."""
    kwargs: Arguments = {}
    """Arguments for `module`."""
    blocks: dict[str, Annotated[list[Pattern], MinLen(1)]] = {}
    """Blocks of your own: a name and patterns of the parameters in it; what no pattern takes keeps its own block."""
    groups: dict[Pattern, GroupRule] = {}
    """For a pattern of blocks, what counts as one group there, or index sets with names of their own, such as
    `{ lidar = { "torso.0.weight:columns" = [0, 1] } }`; a block no pattern takes is one group."""
    shared: list[Pattern] = ["torso.*", "actor"]
    """Patterns of the blocks that clients share; the others stay private."""


class RolloutSettings(Section):
    """How experience is collected between two updates."""

    num_envs: Many = 8
    """Copies of its task that a client steps side by side; with `advantage = "group"` the episodes of one update."""
    horizon: Many = 128
    """Steps of each copy between two updates; with `advantage = "group"` one whole episode of each instead."""
    episode_limit: Annotated[int, Ge(0)] = 0
    """Cut an episode after so many steps, as a truncation; 0 leaves it to the task."""


class NormaliseSettings(Section):
    """Running normalisers, private to each client."""

    observations: bool = False
    """Shift and scale every observation entry to mean 0 and variance 1."""
    rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    clip: Positive = 10.0
    """Limit of a normalised entry."""


class ObjectiveSettings(Section):
    """surrogate(A) - value_coefficient * value loss + entropy bonus: what a client climbs."""

    preset: Annotated[
        Annotated[Literal["vpg", "a2c", "npg", "trpo", "ppo", "ppo-kl", "mdpo", "grpo", "dr-grpo", "rloo"], Named]
        | Own,
        NAMED_OR_OWN,
    ] = "ppo"
    """A row of the table in `presets.py`, or `module:NAME` for one of your own: what keys not given here take."""
    advantage: Literal["gae", "group"] = "gae"
    """Judge a step with the critic, or an episode against its group."""
    surrogate: Literal["score", "ratio", "clip"] = "clip"
    """log pi A, ratio A, or min(ratio A, clip(ratio) A)."""
    step: Literal["adam", "natural"] = "adam"
    """Adam over epochs and minibatches, or one natural-gradient step on the whole batch."""
    gamma: Fraction = 0.99
    """Discount of the reward one step later."""
    gae_lambda: Fraction = 0.95
    """0 trusts the critic one step ahead, 1 trusts only the rewards seen."""
    learning_rate: Positive = 3e-4
    """Adam's step size; of the natural step too where no hard region gives its length."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes down to 0 over all rounds."""
    adam_epsilon: Positive = 1e-5
    """Added to Adam's denominator."""
    epochs: Count = 10
    """Adam's passes over a batch."""
    minibatches: Count = 16
    """Parts that a pass is cut into."""
    clip: Positive = 0.2
    """How far the probability ratio may leave 1 before its gradient stops."""
    clip_high: Positive | None = None
    """A limit of its own above 1 (DAPO's asymmetric clip); `clip` if not given."""
    clip_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the clip goes down over all rounds."""
    value_coefficient: NotNegative = 0.5
    """Weight of the value loss."""
    value_clip: Limit = None
    """How far a value may leave the old one before its gradient stops; `inf` for no limit."""
    value_epochs: Count = 10
    """With `step = "natural"`: Adam's passes over the batch for the critic."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    entropy_groups: dict[str, Indices] = {}
    """Names for sets of action components (of a multi-discrete or box action), which must not overlap."""
    entropy_weights: dict[str, float] = {}
    """For a named set of `entropy_groups`, its own weight instead of `entropy`."""
    normalise_advantages: Literal["off", "batch", "minibatch"] = "minibatch"
    """Shift and scale advantages to mean 0 and variance 1, over what."""
    average: Literal["step", "episode", "total"] = "step"
    """The loss is a mean over steps, a mean over episodes of means over steps, or a sum over a constant (Dr. GRPO)."""
    max_grad_norm: Limit = 0.5
    """Longest gradient of a client, a longer one is scaled down; `inf` for no limit."""


class GroupSettings(Section):
    """With `advantage = "group"`: which episodes are judged against each other, and how."""

    size: Annotated[int, Ge(2)] = 8
    """Episodes in a group that is made on purpose (`by = "start"`); `rollout.num_envs` must be a multiple."""
    by: Literal["start", "task", "context", "similarity"] = "start"
    """The same start state; all of the client's episodes; the same value of a key of `info`; alike start states, by the
    policy's own features."""
    key: str = ""
    """The key of the `info` of a reset, for `by = "context"`."""
    clusters: Count = 4
    """How many groups `by = "similarity"` makes."""
    score: Literal["zscore", "centre", "rank", "leave-one-out"] = "zscore"
    """What an episode's return becomes within its group."""


class TrustSettings(Section):
    """How far one update may move the policy."""

    region: Literal["none", "penalty", "adaptive", "hard"] = "none"
    """No limit; with `step = "adam"` a fixed or an adaptive weight on the KL; with `step = "natural"` a hard limit."""
    direction: Literal["old-new", "new-old"] = "old-new"
    """KL(old, new) as in TRPO and PPO, or KL(new, old) as in mirror descent."""
    reference: Literal["old", "shared"] = "old"
    """The policy that collected the batch, or the one that the round began with."""
    coefficient: NotNegative = 1.0
    """Weight of the KL; with `region = "adaptive"` where it begins."""
    target: Positive = 0.01
    """KL of one update that `region = "adaptive"` steers to, and the limit of `region = "hard"`."""
    adaptive_target: bool = False
    """With `region = "hard"`: widen the limit when an update does as well as predicted, tighten it when it does not."""
    stop: Limit = None
    """Leave out the rest of an update once the KL is above this; `inf` for never."""
    blocks: dict[Pattern, Positive] = {}
    """KL budgets by pattern of blocks: after an update each block alone stays within its own."""
    line_search: bool = True
    """With `region = "hard"`: shorten the step until the KL holds and the surrogate rises."""
    cg_iterations: Count = 10
    """Conjugate-gradient iterations of the natural step."""
    cg_damping: NotNegative = 0.1
    """Added to the Fisher matrix's diagonal."""


class PenaltySettings(Section):
    """The group penalty on the client, applied as a proximal step after the optimiser's, so zeros are exact."""

    toward: Literal["zero", "shared"] = "shared"
    """What is drawn to zero: the parameters themselves, or their departure from where the round began."""
    kind: Literal["group", "sparse-group", "nested"] = "group"
    """weight * sum sqrt(n) ||x_g||; plus `l1` * |x|; or with `outer` on whole blocks around the groups."""
    weight: NotNegative = 0.0
    """Weight of the groups' norms; 0 leaves the penalty out."""
    l1: NotNegative = 0.0
    """Weight of the absolute values, for `sparse-group`."""
    outer: NotNegative = 0.0
    """Weight of whole blocks' norms, for `nested`."""
    squared: NotNegative = 0.0
    """Weight of 1/2 ||x - s||^2 over the shared blocks, s where the round began, in the gradient itself (FedProx)."""
    blocks: Annotated[list[Pattern], MinLen(1)] = ["*"]
    """Patterns of the blocks that are penalised by weight, l1 and outer."""


class PersonalSettings(Section):
    """What a client keeps to itself beyond its private blocks."""

    first: Annotated[Fraction, Lt(1)] = 0.0
    """Part of an update's epochs in which only private blocks learn, before only shared ones do (FedRep); 0 for all
    blocks together."""
    model: bool = False
    """A second policy of the client's own, trained beside the shared one and drawn to it; it plays (Ditto)."""
    pull: NotNegative = 0.1
    """Weight of 1/2 ||v - s||^2, how the second policy v is drawn to the shared blocks s."""
    steps: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Part of a round's steps that the second policy gets; both learn from steps of their own."""


class MergeSettings(Section):
    """How the server makes one policy of what the clients send."""

    rule: Annotated[
        Annotated[Literal["mean", "huber", "fisher", "median", "trimmed-mean", "krum", "clusters"], Named] | Own,
        NAMED_OR_OWN,
    ] = "huber"
    """A mean; the group lasso between clients, which lets a group leave where leaving pays; a mean by Fisher
    information; robust ones; learned clusters of clients for each block; or `module:function` for one of your own."""
    kwargs: Arguments = {}
    """Arguments for a rule of your own."""
    weights: Literal["steps", "episodes", "uniform", "progress"] = "steps"
    """What a client counts by: its steps, its finished episodes, all alike, or whether its return rises."""
    threshold: Bound = 0.02
    """With `rule = "huber"`: how far, as the root mean square of a parameter, a client's group may lie from the others
    before it departs; `inf` for never, which is `mean`; 0 for always, which is local learning. With `rule =
    "clusters"`: how far clusters lie from each other at the least, in the same measure. If it is not given, no less
    than two clients come apart by chance: learning_rate x sqrt(2 x Adam's steps in a round)."""
    blocks: dict[Pattern, Bound] = {}
    """With `rule = "huber"` or `rule = "clusters"`: thresholds of their own, by pattern of blocks."""
    refit: bool = True
    """With `rule = "huber"`: once it is known who departs, the shared blocks are the mean of those who stay; `false`
    leaves them where the group lasso has them, to which the departed still pull."""
    fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    """With `rule = "trimmed-mean"`: how much of all weight is cut off at either end."""
    byzantine: Annotated[int, Ge(0)] = 1
    """With `rule = "krum"`: how many clients may be hostile."""
    keep: Count = 1
    """With `rule = "krum"`: how many clients the mean is of."""
    structure: Annotated[float, Ge(-1), Le(1)] = 0.5
    """With `rule = "clusters"`: the silhouette from which clusters are believed."""
    most: Annotated[int, Ge(2)] = 8
    """With `rule = "clusters"`: at most so many for each block."""


class ProximitySettings(Section):
    """How far one round may move the policy, block by block."""

    mode: Literal["measured", "quadratic", "off"] = "measured"
    """Clients measure the KL of candidate steps on states that stay with them; a Fisher diagonal predicts it, which
    saves that trip; or the whole step."""
    kl_block: Bound = 0.02
    """KL budget of each shared block moved alone; 0 moves nothing, `inf` is no limit."""
    kl_joint: Bound = 0.05
    """KL budget of all shared blocks moved together."""
    blocks: dict[Pattern, Bound] = {}
    """Budgets of their own, by pattern of blocks."""
    over: Literal["mean", "worst"] = "mean"
    """The clients' KL that counts: their weighted mean, or the greatest."""
    adaptive: bool = False
    """Budgets of blocks widen where clients gained by the steps and tighten where they lost, within a factor of 10."""
    states: Annotated[int, Ge(2)] = 256
    """On how many of a round's states a client measures."""


class RoundSettings(Section):
    """Who takes part in a round, and how long it may take."""

    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """How many of the clients that can be reached are drawn for a round."""
    quorum: Annotated[float, Gt(0), Le(1)] = 0.5
    """How many of those drawn must answer for a merge; with fewer the shared blocks stay."""
    deadline: Limit = 600.0
    """Seconds that a round's messages may take each; who has not answered by then is left out. `inf` waits for ever."""
    patience: Count = 3
    """Rounds in a row below the quorum after which the run fails."""


class StopSettings(Section):
    """Ending before the last round."""

    target: float | None = None
    """An interquartile mean return of the clients that is enough. Needs `evaluate.every`."""
    patience: Annotated[int, Ge(0)] = 0
    """Evaluations in a row without a better one after which to stop; 0 for never. Needs `evaluate.every`."""


class EvaluateSettings(Section):
    """Episodes played without learning."""

    episodes: Count = 20
    """For each client."""
    every: Annotated[int, Ge(0)] = 0
    """Rounds between two evaluations; 0 for one before and one after all rounds."""
    step_limit: Count = 10_000
    """An evaluation episode that has not ended by then is cut and counted with what it has."""


class CheckpointSettings(Section):
    """What a run with a folder keeps there to go on from, should it be stopped."""

    every: Annotated[int, Ge(0)] = 1
    """Rounds between two checkpoints; 0 for none."""
    keep: Count = 2
    """How many of the latest stay."""


class ClientSettings(Section):
    """One client, or `count` alike."""

    name: Annotated[Name, Field(examples=["cart"])]
    """In metrics, files and errors; with `count` above 1 they are called name-0, name-1, ..."""
    env: Annotated[Environment, Field(examples=["CartPole-v1"])]
    """A gymnasium id, or `module:EnvId` to import the module first."""
    count: Many = 1
    """How many."""
    kwargs: Arguments = {}
    """Arguments for the environment."""
    spread: dict[str, Annotated[list[float], MinLen(2), MaxLen(2)]] = {}
    """Arguments that go evenly from one value to another over the `count` clients: `{ length = [0.1, 0.9] }`."""
    wrappers: list[ImportPath] = []
    """Import paths `module:Wrapper` put around the environment, innermost first."""
    learning_rate: Positive | None = None
    """Instead of `objective.learning_rate`."""
    entropy: float | None = None
    """Instead of `objective.entropy`."""
    penalty: NotNegative | None = None
    """Instead of `penalty.weight`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the clients that this stands for."""
        return (self.name,) if self.count == 1 else tuple(f"{self.name}-{number}" for number in range(self.count))


class Scenario(Section):
    """All of a run."""

    name: Annotated[Name, Field(examples=["poles"])]
    """In folders, metrics and titles."""
    description: str = ""
    """What it shows."""
    method: Annotated[
        Annotated[
            Literal[
                "grpo", "local", "fedavg", "fedprox", "fedper", "fedrep", "lg", "ditto", "fedkl", "fisher", "clusters"
            ],
            Named,
        ]
        | Own,
        NAMED_OR_OWN,
    ] = "grpo"
    """A row of the table in `methods.py`, or `module:NAME` for one of your own: what keys not given here take."""
    rounds: Count = 30
    """How often the clients train."""
    steps: Count = 2048
    """Environment steps for each client and round."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Everything random comes from here; a client's draws depend on it and on the client's name alone."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where there is one."""
    policy: PolicySettings = PolicySettings()
    rollout: RolloutSettings = RolloutSettings()
    normalise: NormaliseSettings = NormaliseSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    group: GroupSettings = GroupSettings()
    trust: TrustSettings = TrustSettings()
    penalty: PenaltySettings = PenaltySettings()
    personal: PersonalSettings = PersonalSettings()
    merge: MergeSettings = MergeSettings()
    proximity: ProximitySettings = ProximitySettings()
    round: RoundSettings = RoundSettings()
    stop: StopSettings = StopSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    clients: Annotated[list[ClientSettings], MinLen(1), Field(examples=[[{"name": "cart", "env": "CartPole-v1"}]])]
    """Who learns."""

    @classmethod
    def load(cls, path: str | FilePath, overrides: Sequence[str] = ()) -> Self:
        """From a TOML file, with `overrides` such as "objective.clip=0.3"; `read.ScenarioError` lists all mistakes."""
        return read.load(cls, path, overrides, methods.make_way)

    @classmethod
    def loads(cls, text: str, name: str = "scenario", overrides: Sequence[str] = ()) -> Self:
        """From a TOML text; `name` stands for the file in errors."""
        return read.loads(cls, text, name, overrides, methods.make_way)

    def dumps(self) -> str:
        """Every value as TOML, the preset's too; `loads` makes an equal scenario of it."""
        return read.dumps(self)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        tables = {key: _as_given(value) for key, value in data.items()}
        if _is_whole({key: value for key, value in tables.items() if isinstance(value, Mapping)}):
            return tables

        def is_sound(values: rows.Values) -> bool:
            return not any(read.faults(cls, values))

        return _with_threshold(presets.apply(methods.apply(tables, is_sound), is_sound))

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        read.refuse(_mistakes(self))
        return self


def _with_threshold(tables: dict[str, Any]) -> dict[str, Any]:
    """The same with a `merge.threshold`, where there is none, that chance alone does not reach.

    Steps of Adam that go either way by chance take a parameter learning_rate sqrt(U) far in U steps, and two clients
    sqrt(2) times that from each other. Of other steps there is no telling in advance.
    """

    def value(model: type[Section], section: str, key: str) -> Any:
        table = tables.get(section, {}) if section else tables
        return table.get(key, model.model_fields[key].default) if isinstance(table, Mapping) else None

    of, merge = partial(value, ObjectiveSettings, "objective"), tables.get("merge", {})
    known = [of("learning_rate"), of("epochs"), of("minibatches"), value(Scenario, "", "steps")]
    known += [value(RolloutSettings, "rollout", key) for key in ("num_envs", "horizon")]
    is_known = all(isinstance(one, int | float) and one > 0 for one in known)
    if not isinstance(merge, Mapping) or "threshold" in merge or not is_known:
        return tables
    if value(MergeSettings, "merge", "rule") not in DISTANT or (of("advantage"), of("step")) != ("gae", "adam"):
        return tables
    rate, epochs, minibatches, steps, copies, horizon = known
    chance = rate * math.sqrt(2 * epochs * minibatches * math.ceil(steps / (copies * horizon)))
    usual = MergeSettings.model_fields["threshold"].default
    return {**tables, "merge": {**merge, "threshold": float(f"{chance:.2g}")}} if chance > usual else tables


def _as_given(value: Any) -> Any:
    """A section built in Python as the table of what was given for it, so that a preset fills in only the rest."""
    return {key: getattr(value, key) for key in value.model_fields_set} if isinstance(value, Section) else value


def _is_whole(tables: Mapping[str, Collection[str]]) -> bool:
    """Whether every key is given, as in a resolved scenario: no row is asked for then, and none has to be at hand."""
    sections = ((path, info) for path, info in read.knobs(Scenario) if len(path) == 2 and path[0] != "clients")
    return all(
        path[1] in tables.get(str(path[0]), ()) or info.default is None  # for which TOML may have no spelling
        for path, info in sections
    )


def _mistakes(scenario: Scenario) -> Iterator[Mistake]:
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


def _mistake(text: str, *keys: str | Path) -> Mistake:
    """Between these keys. Where a preset or a method may have given one of them a value, its name is a key
    concerned as well.
    """
    paths = [tuple(key.split(".")) if isinstance(key, str) else key for key in keys]
    named: list[Path] = [("objective", "preset")] if any(path in presets.KNOBS for path in paths) else []
    named += [("method",)] if any(path in methods.KNOBS for path in paths) else []
    return Mistake((*paths, *named), text)


def _row_mistakes(scenario: Scenario) -> Iterator[Mistake]:
    """Of the user's own preset and method."""
    sections = {name: part for name in Scenario.model_fields if isinstance(part := getattr(scenario, name), Section)}
    if _is_whole({name: part.model_fields_set for name, part in sections.items()}):
        return
    method, preset = scenario.method, scenario.objective.preset
    for path, name, find in (
        (("method",), method, lambda: rows.find(method, methods.METHODS, methods.Method)),
        (("objective", "preset"), preset, lambda: rows.find(preset, presets.PRESETS, presets.Preset)),
    ):
        row: rows.Row | None
        try:
            row = find()
        except ValueError as error:
            yield Mistake((path,), str(error))
        else:
            values = row.values if row and rows.is_own(name) else {}
            for fault in read.faults(Scenario, values):
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
    if scenario.merge.kwargs and not rows.is_own(rule):
        text = f'these are arguments for a rule of your own, merge.rule = "module:function"; it is "{rule}"'
        yield _mistake(text, "merge.kwargs", "merge.rule")
    if rule not in DISTANT and scenario.merge.blocks:
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
        here: Path = ("clients", number)
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
