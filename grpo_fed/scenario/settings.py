"""The knobs of a run, section by section: each with its default, its limits and its meaning.

A limit that is not wanted is `inf` in TOML and None in Python. Where a count can be left out, 0 does it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field

from grpo_fed.scenario.field_types import (
    NAMED_OR_OWN,
    Arguments,
    BoundedCount,
    Count,
    Environment,
    Fraction,
    GroupRule,
    ImportPath,
    Indices,
    Limit,
    LimitOrZero,
    Name,
    Named,
    NotNegative,
    OwnPath,
    Pattern,
    Positive,
    Size,
)

RULES_WITH_THRESHOLD = ("huber", "clusters")
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

    num_envs: BoundedCount = 8
    """Copies of its task that a client steps side by side; with `advantage = "group"` the episodes of one update."""
    horizon: BoundedCount = 128
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
        | OwnPath,
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
        Annotated[Literal["mean", "huber", "fisher", "median", "trimmed-mean", "krum", "clusters"], Named] | OwnPath,
        NAMED_OR_OWN,
    ] = "huber"
    """A mean; the group lasso between clients, which lets a group leave where leaving pays; a mean by Fisher
    information; robust ones; learned clusters of clients for each block; or `module:function` for one of your own."""
    kwargs: Arguments = {}
    """Arguments for a rule of your own."""
    weights: Literal["steps", "episodes", "uniform", "progress"] = "steps"
    """What a client counts by: its steps, its finished episodes, all alike, or whether its return rises."""
    threshold: LimitOrZero = 0.02
    """With `rule = "huber"`: how far, as the root mean square of a parameter, a client's group may lie from the others
    before it departs; `inf` for never, which is `mean`; 0 for always, which is local learning. With `rule =
    "clusters"`: how far clusters lie from each other at the least, in the same measure. If it is not given, no less
    than two clients come apart by chance: learning_rate x sqrt(2 x Adam's steps in a round)."""
    blocks: dict[Pattern, LimitOrZero] = {}
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
    kl_block: LimitOrZero = 0.02
    """KL budget of each shared block moved alone; 0 moves nothing, `inf` is no limit."""
    kl_joint: LimitOrZero = 0.05
    """KL budget of all shared blocks moved together."""
    blocks: dict[Pattern, LimitOrZero] = {}
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
    count: BoundedCount = 1
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
