"""The knobs of a run, section by section, each with its default, its limits and its meaning.

`inf` in TOML and None in Python mean that there is no limit. 0 turns a count off where its doc says so.

Over 400 lines: it is one list, in which a knob is found by its section, and every knob has its doc under it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, Tag

from grpo_fed.scenario.field_types import (
    NAMED_OR_OWN,
    PATH_OR_TABLE,
    Arguments,
    BoundedCount,
    Count,
    Environment,
    FilePath,
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

RULES_WITH_THRESHOLD = ("huber",)
"""The merge rules that compare the distance between clients with a threshold."""
ATTACKS_WITH_STRENGTH = ("sign-flip", "scaled", "random", "weight", "kl", "fisher", "returns", "alie", "ipm")
"""The attacks that read `strength`."""
COLLUDING_ATTACKS = ("alie", "ipm", "mimic", "min-max", "normalised", "stealth")
"""The attacks that need what all honest clients of a round sent."""


class Section(BaseModel):
    """The base of all sections: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PolicySettings(Section):
    """The network of every client, and how its parameters are divided into blocks and groups."""

    kind: Literal["mlp", "cnn"] = "mlp"
    """`"mlp"`: hidden layers on flat observations. `"cnn"`: an encoder of pictures before them, which are boxes of
    uint8 with two or three axes."""
    encoder: Literal["nature", "impala"] = "nature"
    """The convolutions of `kind = "cnn"`: `"nature"`, three with large steps (Mnih et al. 2015), or `"impala"`, fifteen
    in residual blocks (1802.01561)."""
    memory: Literal["none", "gru", "lstm"] = "none"
    """A cell behind the hidden layers that remembers what was seen in an episode, with `kind = "mlp"`; the critic has
    one of its own with `torso = "separate"`. Minibatches are whole sequences then, one of each copy of the task."""
    units: Size = 64
    """Units of the cell of `memory`."""
    hidden: list[Size] = [64, 64]
    """Units of each hidden layer, behind the encoder if there is one; with `torso = "separate"` the critic has its own
    layers of the same sizes, and an encoder of its own."""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """Activation function of the hidden layers."""
    torso: Literal["separate", "shared"] = "separate"
    """Whether actor and critic have separate hidden layers or shared ones."""
    adapter: Annotated[int, Ge(0)] = 0
    """Features of a private first layer, with which clients whose observations differ in size can share the layers
    after it; 0 for no such layer."""
    squash: bool = False
    """Whether Gaussian actions are mapped into the action box by tanh, or clipped to it."""
    log_std: Annotated[float, Ge(-20), Le(5)] = 0.0
    """Initial logarithm of a Gaussian policy's standard deviation."""
    orthogonal: bool = True
    """Whether weights are initialised orthogonally (gain sqrt(2) for hidden layers, 0.01 for the actor, 1 for the
    critic) or by torch's default."""
    same_start: bool = True
    """Whether all clients start from the same parameters wherever their shapes agree. Blocks are comparable only
    then."""
    module: ImportPath | None = None
    """A torch module of your own, `package.module:Class`, to which the observation space, the action space and `kwargs`
    are passed."""
    kwargs: Arguments = {}
    """Keyword arguments for `module`."""
    blocks: dict[str, Annotated[list[Pattern], MinLen(1)]] = {}
    """Blocks of your own: for each name, patterns of the parameters in the block. A parameter that matches no pattern
    stays in its default block."""
    groups: dict[Pattern, GroupRule] = {}
    """For each pattern of blocks, what forms a group there, or named index sets such as
    `{ lidar = { "torso.0.weight:columns" = [0, 1] } }`. A block that matches no pattern is one group. With `"learned"`
    the rule `persistence` makes groups of rows or columns by how clients differ on them; for all else, each of these is
    a group."""
    shared: list[Pattern] = ["torso.*", "actor", "layers.*"]
    """Patterns of the blocks that clients share; all others stay private. The adapters of a language model lie in
    `layers.*`."""
    start: FilePath | None = None
    """What policies begin with instead of new parameters: the folder of a run, whose clients of the same names give
    private blocks and whose server gives the shared ones; the folder of one of its checkpoints, for the shared blocks
    alone; or a `.safetensors` file with parameters by name."""
    freeze: list[Pattern] = []
    """Patterns of the blocks that do not learn: they stay as they begin, are not sent and not merged, whatever `shared`
    says."""


class LanguageSettings(Section):
    """The language model of clients with `prompts`: one frozen base, and the adapters of each client that learn."""

    model: Annotated[str, MinLen(1)] = "tiny"
    """The base: `"tiny"`, which ships with grpo_fed; a folder in Hugging Face's layout; a `.gguf` file; or a hub's
    name, `"owner/name"`. It must be the same on all machines."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base's numbers; adapters are always float32."""
    rank: Annotated[int, Ge(1), Le(1024)] = 8
    """Rank of the adapters (LoRA)."""
    alpha: Positive | None = None
    """An adapter adds alpha / rank * B A to the map it adapts; `rank` if not given."""
    maps: Annotated[list[Pattern], MinLen(1)] = ["*"]
    """Patterns of the linear maps that are adapted in every layer: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj
    and down_proj."""
    learn: Literal["B", "AB"] = "B"
    """`"B"`: A is drawn once, with orthonormal rows, and stays (FFA-LoRA, 2403.12313), so that the mean of the adapters
    is the adapter of the mean. `"AB"`: both learn; a layer is then two blocks, `layers.0.A` and `layers.0.B`."""
    chat: bool = False
    """Whether a prompt that is a text is put into the model's chat template as a message of a user. Prompts that are
    lists of messages always are."""
    length: BoundedCount = 64
    """The most tokens of a completion."""
    temperature: Positive = 1.0
    """What the logits are divided by, in training everywhere; evaluations take the likeliest tokens."""
    mask_cut: bool = False
    """Whether completions that were cut off at `length` are left out of the loss (DAPO, 2503.14476)."""
    tokens: BoundedCount = 16_384
    """Tokens of all clients that are computed at a time; fewer need less memory."""
    recompute: bool = False
    """Whether the activations of a layer are computed again in the backward pass instead of kept: slower, and far less
    memory (activation checkpointing)."""
    show: Annotated[int, Ge(0)] = 4
    """Prompts of each client whose completions before and after training are kept in the run's folder. None are kept
    in a deployment."""


class RolloutSettings(Section):
    """How a client collects experience between two updates."""

    num_envs: BoundedCount = 8
    """Copies of its task that a client steps in parallel; with `advantage = "group"`, the number of episodes in an
    update."""
    horizon: BoundedCount = 128
    """Steps of each copy between two updates; with `advantage = "group"` each copy runs one whole episode instead."""
    episode_limit: Annotated[int, Ge(0)] = 0
    """Truncate episodes after this many steps; 0 for no limit but the task's."""
    reward_scale: Positive = 1.0
    """What rewards are multiplied by before clients learn from them; returns are reported as they were."""
    reward_clip: Limit = None
    """Largest absolute value of a reward to learn from, after `reward_scale`; `inf` for no limit."""


class NormaliseSettings(Section):
    """Running normalisation of observations and rewards; its statistics are private to each client."""

    observations: bool = False
    """Whether each entry of the observations is normalised to mean 0 and variance 1."""
    rewards: bool = False
    """Whether rewards are divided by the running standard deviation of the discounted return."""
    clip: Positive = 10.0
    """Largest absolute value of a normalised observation or reward."""


class CostSettings(Section):
    """A limit on what a client's episodes cost, kept by a Lagrange multiplier; the environment reports the costs."""

    limit: LimitOrZero = None
    """Largest mean cost of an episode, the sum of its steps' costs; `inf` for no limit. While episodes cost more the
    multiplier rises, and while they cost less it falls, not below 0."""
    rate: Positive = 0.05
    """Rate of dual ascent: in each update the multiplier, a price of cost in units of the rewards that clients learn
    from, changes by so many times mean cost - limit."""
    key: Annotated[str, MinLen(1)] = "cost"
    """Key of a step's info that has its cost."""


class ObjectiveSettings(Section):
    """What a client maximises: surrogate(A) - value_coefficient * value loss + entropy bonus."""

    preset: Annotated[
        Annotated[
            Literal["vpg", "a2c", "npg", "trpo", "ppo", "ppo-kl", "mdpo", "grpo", "dr-grpo", "rloo", "dapo", "gspo"],
            Named,
        ]
        | OwnPath,
        NAMED_OR_OWN,
    ] = "ppo"
    """The algorithm: a row of the table of presets, or `module:NAME` for a row of your own. It gives the values of keys
    that the scenario leaves out."""
    advantage: Literal["gae", "group"] = "gae"
    """`"gae"`: generalised advantage estimation with a critic. `"group"`: an episode's return compared with the returns
    in its group, without a critic."""
    surrogate: Literal["score", "ratio", "clip"] = "clip"
    """What is maximised for the policy, with advantage A and probability ratio r of new to old policy: `"score"` log pi
    A, `"ratio"` r A, `"clip"` min(r A, clip(r) A)."""
    step: Literal["adam", "natural"] = "adam"
    """`"adam"`: several epochs of minibatches with Adam. `"natural"`: one natural-gradient step on the whole batch."""
    gamma: Fraction = 0.99
    """Discount factor per step."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation: 0 relies on the critic after one step, 1 on the observed rewards
    alone."""
    learning_rate: Positive = 3e-4
    """Learning rate of Adam, and of the natural gradient unless `trust.region = "hard"` sets the length of its step."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate decreases to 0 over the rounds."""
    adam_epsilon: Positive = 1e-5
    """Epsilon in Adam's denominator."""
    epochs: Count = 10
    """Adam's passes over a batch."""
    minibatches: Count = 16
    """Minibatches in an epoch; with `step = "natural"` of the critic alone."""
    ratio: Literal["step", "episode"] = "step"
    """The probability ratio: `"step"` of each step, or token, by itself; `"episode"` the geometric mean over a
    completion, the same for all its tokens (GSPO, 2507.18071)."""
    clip: Positive = 0.2
    """How far the probability ratio may differ from 1 before its gradient is cut off, with `surrogate = "clip"`."""
    clip_high: Positive | None = None
    """A separate limit for ratios above 1 (DAPO's asymmetric clip); `clip` if not given."""
    clip_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the clip limits decrease to 0 over the rounds."""
    value_coefficient: NotNegative = 0.5
    """Weight of the value loss, with `step = "adam"`; after a natural step the critic learns by itself."""
    value_clip: Limit = None
    """How far a predicted value may differ from the old one before its gradient is cut off; `inf` for no limit."""
    value_epochs: Count = 10
    """Adam's passes over the batch to train the critic, with `step = "natural"`."""
    entropy: float = 0.0
    """Weight of the entropy bonus; with `entropy_target` the weight that it begins with."""
    entropy_groups: dict[str, Indices] = {}
    """Named sets of components of an action, by their indices, to which `entropy_weights` gives weights: choices first,
    then real numbers. Sets must not overlap."""
    entropy_weights: dict[str, float] = {}
    """For single sets of `entropy_groups`, a weight instead of `entropy`."""
    entropy_target: float | dict[str, float] | None = None
    """An entropy, in nats, that the policy keeps: the weight of the entropy bonus rises while the entropy is below it
    and falls while it is above. A number is for the whole action; a table gives single sets of `entropy_groups` targets
    and weights of their own. The weights begin at `entropy` and `entropy_weights`, or at 0.01 where these are 0. If not
    given, weights stay as they are."""
    entropy_rate: Positive = 0.5
    """Rate of dual ascent with `entropy_target`: in each update the logarithm of the weight changes by so many times
    target - entropy."""
    normalise_advantages: Literal["off", "batch", "minibatch"] = "minibatch"
    """Whether advantages are normalised to mean 0 and variance 1, over each batch or each minibatch."""
    average: Literal["step", "episode", "total"] = "step"
    """How the loss is averaged: `"step"` over steps; `"episode"` over the steps of each episode, then over episodes;
    `"total"` as a sum divided by a constant (Dr. GRPO)."""
    max_grad_norm: Limit = 0.5
    """Largest norm of a client's gradient in a step of Adam; longer gradients are scaled down. `inf` for no limit."""
    cost: CostSettings = CostSettings()


class GroupSettings(Section):
    """With `advantage = "group"`: which episodes are compared with each other, and how."""

    size: Annotated[int, Ge(2)] = 8
    """Episodes that start in the same state, with `by = "start"`; `rollout.num_envs` must be a multiple of it."""
    by: Literal["start", "task", "context", "similarity"] = "start"
    """What episodes of a group have in common: `"start"` the start state, `"task"` the client, `"context"` the value of
    a key of `info`, `"similarity"` similar start states by the policy's features."""
    key: str = ""
    """Key of the `info` that the environment's reset returns, for `by = "context"`."""
    clusters: Count = 4
    """Number of groups, for `by = "similarity"`."""
    score: Literal["zscore", "centre", "rank", "leave-one-out"] = "zscore"
    """Advantage of an episode with return R: `"zscore"` (R - mean) / standard deviation of its group, `"centre"` R -
    mean, `"rank"` its rank from -1 to 1, `"leave-one-out"` R - mean of the others."""
    equal: Literal["keep", "skip", "redraw"] = "keep"
    """What becomes of completions whose group has equal rewards, so that their advantage is 0: `"keep"` counts them in
    the averages of the loss, `"skip"` leaves them out, `"redraw"` draws other prompts in their place (DAPO,
    2503.14476) and leaves out what is equal then."""
    redraws: Annotated[int, Gt(0), Le(100)] = 3
    """How often prompts are drawn again for one batch, with `equal = "redraw"`. `steps` counts the completions that are
    learned from; all that were written are the metric `charts/completions_written`."""


class TrustSettings(Section):
    """How far one update may change the policy."""

    region: Literal["none", "penalty", "adaptive", "hard"] = "none"
    """`"none"`: no limit. `"penalty"`, `"adaptive"`: a KL penalty with a fixed or an adaptive weight, with `step =
    "adam"`. `"hard"`: a limit on the KL, with `step = "natural"`."""
    direction: Literal["old-new", "new-old"] = "old-new"
    """`"old-new"`: KL(old, new) as in TRPO and PPO. `"new-old"`: KL(new, old) as in mirror descent."""
    reference: Literal["old", "shared", "start"] = "old"
    """The policy to which a penalised KL is measured: `"old"`, which collected the batch; `"shared"`, with which the
    round began; or `"start"`, with which the run began, for a language model the base without adapters."""
    estimate: Literal["exact", "sampled", "weighted"] = "exact"
    """How the KL of a language model is computed: `"exact"` over the vocabulary, `"sampled"` on the sampled tokens
    alone (k3: r - 1 - log r, with r the reference's probability by the policy's), or `"weighted"`, which multiplies
    that by the probability ratio of new to old policy."""
    coefficient: NotNegative = 1.0
    """Weight of the KL penalty; the initial weight with `region = "adaptive"`."""
    target: Positive = 0.01
    """Target for the KL of an update with `region = "adaptive"`, and limit with `region = "hard"`."""
    adaptive_target: bool = False
    """Whether the limit of `region = "hard"` increases when an update improves the surrogate as predicted, and
    decreases when it does not."""
    stop: Limit = None
    """End an update early once the KL exceeds this value; `inf` for never."""
    blocks: dict[Pattern, Positive] = {}
    """For patterns of blocks, KL budgets of an update: the change of each block by itself stays within its budget."""
    line_search: bool = True
    """Whether the step of `region = "hard"` is shortened until the KL is within the limit and the surrogate
    improves."""
    cg_iterations: Count = 10
    """Conjugate-gradient iterations of a natural-gradient step."""
    cg_damping: NotNegative = 0.1
    """Damping that is added to the diagonal of the Fisher matrix."""
    rollback: LimitOrZero = None
    """Take an update back, with the optimiser's state, if the mean return falls by more than this: the policies before
    and after it play the same `rollback_episodes` episodes, with the same start states and random numbers. `inf` for
    never."""
    rollback_episodes: Count = 16
    """Episodes that each of the two policies plays for `rollback`; they are not learned from, and do not count as
    steps."""


class PenaltySettings(Section):
    """The client's group penalty, applied as a proximal step after the optimiser's step, so that zeros are exact."""

    step: Literal["preconditioned", "decoupled"] = "preconditioned"
    """The length of the proximal step. `"preconditioned"`: Adam's own, parameter by parameter; learning ends at a
    minimum of loss + penalty, so what a weight does depends on the scale of the loss. `"decoupled"`: the learning rate
    for all parameters, as with AdamW's weight decay. Adam moves a parameter by about the learning rate or less at any
    scale of the loss, so useful weights are between 0 and 1 and do not depend on it; but no stated objective is
    minimised. A step with `objective.step = "natural"` is always decoupled."""
    toward: Literal["zero", "shared"] = "shared"
    """What is penalised, x: `"zero"` the parameters, `"shared"` their difference from the parameters with which the
    round began."""
    kind: Literal["group", "sparse-group", "nested"] = "group"
    """`"group"`: weight * sum_g sqrt(n_g) ||x_g|| over groups g of n_g parameters. `"sparse-group"` adds `l1` *
    ||x||_1, `"nested"` adds `outer` * sum_b sqrt(n_b) ||x_b|| over blocks b."""
    weight: NotNegative = 0.0
    """Weight of the groups' norms; 0 for no penalty. It is a weight beside that of the loss with `step =
    "preconditioned"`, and a fraction of the learning rate with `step = "decoupled"`."""
    l1: NotNegative = 0.0
    """Weight of the absolute values, with `kind = "sparse-group"`."""
    outer: NotNegative = 0.0
    """Weight of the norms of whole blocks, with `kind = "nested"`."""
    squared: NotNegative = 0.0
    """Weight of 1/2 ||x - s||^2 over the shared blocks x, where s are their values at the start of the round (FedProx);
    part of the gradient."""
    blocks: Annotated[list[Pattern], MinLen(1)] = ["*"]
    """Patterns of the blocks to which `weight`, `l1` and `outer` apply."""


class PersonalSettings(Section):
    """What is personal to a client besides its private blocks."""

    first: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of an update's epochs in which only private blocks learn, before only shared blocks do (FedRep); 0 for
    all blocks together."""
    inner_rate: NotNegative = 0.0
    """With a value above 0 every second minibatch gives a step of this length along its gradient, and the one after it
    the gradient there, by which the parameters move from where they were (first-order Per-FedAvg, 2002.07948)."""
    model: bool = False
    """Whether a client trains a second, personal policy, which is pulled towards the shared one and is evaluated in its
    place (Ditto)."""
    pull: NotNegative = 0.1
    """Weight of 1/2 ||v - s||^2, which pulls the second policy v towards the shared blocks s."""
    steps: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Fraction of a round's steps with which the second policy learns; the first policy learns from the rest."""


class MergeSettings(Section):
    """How the server merges the clients' shared blocks."""

    rule: Annotated[
        Annotated[
            Literal[
                "mean",
                "persistence",
                "huber",
                "fisher",
                "median",
                "trimmed-mean",
                "krum",
                "multi-krum",
                "geometric-median",
                "centred-clipping",
                "clusters",
            ],
            Named,
        ]
        | OwnPath,
        NAMED_OR_OWN,
    ] = "persistence"
    """How the server merges: `"mean"`, weighted; `"persistence"`, which lets a client leave a parameter group when its
    deviation from the others persists over rounds; `"huber"`, the group lasso between clients, which lets it leave
    where it lies further away than a threshold; `"fisher"`, a mean by Fisher information; `"median"`,
    `"trimmed-mean"`, `"krum"`, `"multi-krum"`, `"geometric-median"` and `"centred-clipping"`, which tolerate hostile
    clients; `"clusters"`, means within learned clusters of clients, which part by the same evidence as
    `"persistence"`; or `module:function` for a rule of your own."""
    kwargs: Arguments = {}
    """Keyword arguments for a rule of your own."""
    confirm: Literal["evidence", "returns"] = "returns"
    """What decides that a client leaves, with `rule = "persistence"`: the evidence of its updates alone, or also its
    returns: it plays with its own parameters and with the shared ones, and stays if these are no worse."""
    rejoin: Annotated[int, Ge(0)] = 5
    """Rounds of a client after which it tries to come back to what it has left, and again after each try, by playing
    as with `confirm = "returns"`; 0 for never. With `rule = "persistence"`."""
    episodes: Annotated[int, Ge(2)] = 16
    """Episodes that a client plays with its own parameters, and again with the shared ones, for `confirm` and
    `rejoin`. With `rule = "persistence"`."""
    weights: Literal["steps", "episodes", "uniform", "progress"] = "steps"
    """Weight of a client in the merge: its environment steps, its finished episodes, the same for all, or more the more
    its return increased."""
    threshold: LimitOrZero = 0.02
    """With `rule = "huber"`, which needs it: a client leaves a group where its parameters differ from the others' by
    more than this (root mean square); `inf` for never, which is `mean`; 0 for always, which is local learning."""
    blocks: dict[Pattern, LimitOrZero] = {}
    """For patterns of blocks, other thresholds, with `rule = "huber"`."""
    refit: bool = True
    """Whether a group becomes the mean of the clients that stay in it, with `rule = "huber"`; `false` keeps the
    solution of the group lasso, which clients that leave still influence."""
    fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    """Fraction of the total weight that is cut off at each end, with `rule = "trimmed-mean"`."""
    byzantine: Annotated[int, Ge(0)] = 1
    """Number of clients that may be hostile, with `rule = "krum"` or `rule = "multi-krum"`."""
    keep: Count = 1
    """Number of clients that are averaged, with `rule = "krum"`."""
    radius: Positive = 1.0
    """Length to which a client's update is cut, with `rule = "centred-clipping"`: so many times the median length of
    the round's updates."""
    mix: Annotated[int, Ge(0)] = 0
    """Number of clients that may be hostile, for a step before the rule: each client's parameters are replaced by the
    mean of those of its nearest clients, itself included, all but so many (nearest-neighbour mixing, 2302.01772); 0 for
    no such step. It needs a rule with which no client departs, and more than twice as many clients in a round."""
    most: Annotated[int, Ge(2)] = 8
    """Largest number of clusters of a block, with `rule = "clusters"`."""
    optimiser: Literal["sgd", "momentum", "adam"] = "sgd"
    """How the server steps towards what the merge asks for, before KL budgets limit the step (FedOpt, 2003.00295):
    `"sgd"` by `rate` times the difference, `"momentum"` by a decaying sum of the differences, `"adam"` by Adam."""
    rate: Positive = 1.0
    """The server's learning rate: with `optimiser = "sgd"` the fraction of the way to the merge, 1 for all of it; with
    `"adam"` about the length of a parameter's step."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """What is left of the momentum in the next round, with `optimiser` `"momentum"` or `"adam"`."""
    epsilon: Positive = 1e-3
    """What is added to Adam's denominator, with `optimiser = "adam"`; a larger one adapts less."""
    correct_drift: bool = False
    """Whether a client adds to each of its steps the difference between all clients' mean step in the last round and
    its own (SCAFFOLD, 1910.06378). Every client must take part, and the server go all the way to their mean."""


class ProximitySettings(Section):
    """How far a round may change the shared policy, block by block."""

    mode: Literal["measured", "quadratic", "off"] = "measured"
    """`"measured"`: clients measure the KL of candidate steps on states that stay with them. `"quadratic"`: a Fisher
    diagonal predicts the KL, which saves these messages. `"off"`: no limit."""
    kl_block: LimitOrZero = 0.02
    """KL budget for the step of each shared block by itself; 0 for no step, `inf` for no limit."""
    kl_joint: LimitOrZero = 0.05
    """KL budget for the steps of all shared blocks together; 0 for no step, `inf` for no limit."""
    blocks: dict[Pattern, LimitOrZero] = {}
    """For patterns of blocks, KL budgets instead of `kl_block`."""
    over: Literal["mean", "median", "worst"] = "mean"
    """The KL that must stay within the budgets: the clients' weighted mean; `"median"`, which clients with half of the
    weight stay within, so that no few of them can stop the steps of all; or the largest of all clients. With
    a robust `merge.rule` or with `merge.mix` it is `"median"` unless it is given. With `mode = "quadratic"` the mean is
    predicted, and `over` concerns only the KL that clients measure afterwards."""
    adaptive: bool = False
    """Whether the budget of a block increases after steps by which clients gained return and decreases after steps by
    which they lost, within a factor of 10."""
    states: Annotated[int, Ge(2)] = 256
    """Number of states of its last batch that a client keeps, to measure the KL or Fisher information on."""


class SiteSettings(Section):
    """A site: a server that merges its own clients, before the federation's server merges the sites as if each were a
    client with the weight of all of its clients. Every client is in one site. A site may leave a parameter group as a
    client may; its clients then share the site's own.
    """

    name: Annotated[Name, Field(examples=["north"])]
    """Name of the site in metrics, tables and errors."""
    clients: Annotated[list[Pattern], MinLen(1), Field(examples=[["north-*"]])]
    """Names of its clients, or patterns of them."""
    merge: Arguments = {}
    """Keys of `[merge]` that have other values for the site's merge of its clients, such as `{ rule = "mean" }`."""
    proximity: Arguments = {}
    """Keys of `[proximity]` that have other values for the step of the site, such as `{ kl_joint = 0.1 }`."""


class RoundSettings(Section):
    """How a round samples clients, how long it may take, and for which answers the server waits."""

    mode: Literal["sync", "buffered"] = "sync"
    """`sync`: a round waits for all of its clients. `buffered`: the server merges as soon as `buffer` of them have
    answered, and a round is such a merge; the others train on, and what they have learned is merged when it comes."""
    buffer: Annotated[float, Gt(0), Le(1)] = 0.5
    """With `buffered`, fraction of all clients whose answers make a merge, rounded up."""
    staleness: Literal["none", "age", "kl"] = "age"
    """With `buffered`, what an answer that is late weighs. `age`: (1 + merges since the client began)^(-1/2), as in
    FedBuff (2106.06639); `kl`: sqrt(kl_joint / D) where D, the KL of the steps since the client began, is more than
    `proximity.kl_joint`, so that nothing is discounted while the policy rests; `none`: as much as others."""
    max_staleness: Annotated[int, Gt(0), Le(10_000)] = 32
    """With `buffered`, merges since a client began after which its answer is refused."""
    rate_fair: bool = True
    """With `buffered`, weigh each answer by one over how often its client was in the last `max_staleness` merges, so
    that fast clients move the shared blocks no further than slow ones (2509.24305); with false they do, as in
    FedBuff."""
    again: Literal["after-merge", "at-once"] = "after-merge"
    """With `buffered`, when a client that has answered is given work again: after the merge, from the blocks that come
    of it, or at once, until it has answered twice. Its answers are averaged then, so that it still has one say. Clients
    that train on cannot measure, so `proximity.mode` has to be `quadratic` or `off`."""
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Fraction of the connected clients that is sampled for a round."""
    quorum: Annotated[float, Gt(0), Le(1)] = 0.5
    """Fraction of the sampled clients that must answer; with fewer the shared blocks stay as they are in this round."""
    deadline: Limit = 600.0
    """Seconds to wait for the answers to each message of a round; later clients are left out. `inf` for no limit."""
    patience: Count = 3
    """Consecutive rounds below the quorum after which the run fails."""


class WireSettings(Section):
    """How parameters travel between the server and its clients."""

    dtype: Literal["float32", "float16"] = "float32"
    """Numbers of the difference that a client has learned. `float16` halves what clients send; what rounding leaves out
    is added to the client's next difference, so that over the rounds nothing is lost (1901.09847)."""


class PrivacySettings(Section):
    """What leaves a client, and differential privacy of what it contributes to the shared blocks: docs/privacy.md.

    With `epsilon` each parameter group of a client's difference from the shared blocks is cut to a bound of its own,
    and Gaussian noise is added that is as long as these bounds ask for. All clients have the same weight. With
    `round.fraction` below 1 each client takes part in a round with this probability, independently of the others.
    """

    epsilon: Limit = None
    """The budget, for one client more or less: the run ends before a merge that would exceed it. `inf` for no
    privacy."""
    delta: Annotated[float, Gt(0), Lt(1)] | None = None
    """Probability with which epsilon may be exceeded. If not given, the largest power of ten that is a tenth of one
    over the number of clients at most: 1e-4 for 1,000 clients."""
    noise: Literal["central", "local"] = "central"
    """Who adds the noise: `"central"` the server, once to the sum, which needs less of it and trust in the server;
    `"local"` each client to what it sends, so that epsilon holds against the server too."""
    multiplier: Annotated[float, Ge(0.2)] | None = None
    """Standard deviation of the noise, by what one client can change. If not given, as much as makes the budget last
    for all rounds."""
    clip: Positive = 0.1
    """Length to which each parameter group of a difference is cut; with adaptive bounds that which they begin with."""
    blocks: dict[Pattern, Positive] = {}
    """For patterns of blocks, lengths instead of `clip`."""
    rate: Annotated[float, Ge(0), Le(2)] = 0.2
    """How fast bounds follow the clients' lengths, with central noise: after a merge in which a fraction b of the
    clients was within its bound, that is multiplied by exp(-rate (b - quantile)) (1905.03871); 0 for bounds that
    stay."""
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.5
    """The fraction of clients that is to be within its bound."""
    share: Annotated[float, Gt(0), Lt(1)] = 0.05
    """The part of a merge's budget, as 1 / multiplier^2, that the noised numbers of clients within bounds spend."""
    source: Literal["seed", "system"] = "seed"
    """Where noise and sampling come from: `"seed"` the run's own streams, for research, since who knows the seed can
    take the noise away; `"system"` the operating system's random numbers, for deployments. Then no run ends with the
    same bits as another."""
    secure: bool = False
    """Whether clients mask what they send, so that the server learns their sum alone: secure aggregation, in rounds of
    three clients and more. Needs `merge.rule = "mean"`; all clients have the same weight."""
    reach: Positive = 1.0
    """With `secure`, the largest change of a parameter in a round that a client sends; larger ones are cut, and a note
    says so. Its rounding is this times the number of clients, by 2^32."""
    metrics: Literal["all", "withheld"] = "all"
    """Whether clients report returns, lengths, losses and other numbers about themselves; with `"withheld"` the run has
    no scores, and nothing may depend on them."""
    errors: Literal["place", "text"] = "place"
    """What a client's exception tells a server on another machine: `"place"`, its type and the line of grpo_fed that it
    came from, while its text stays in a file of the client's own; or `"text"`, 300 letters of it."""


class StopSettings(Section):
    """When a run ends before its last round."""

    target: float | None = None
    """Stop once the median of the clients' returns reaches this value. Needs `evaluate.every`."""
    patience: Annotated[int, Ge(0)] = 0
    """Stop after this many consecutive evaluations without a higher median return; 0 for never. Needs
    `evaluate.every`."""


class EvaluateSettings(Section):
    """How policies are evaluated, in episodes without learning."""

    episodes: Count = 20
    """Episodes of each client in an evaluation."""
    every: Annotated[int, Ge(0)] = 0
    """Rounds between two evaluations; 0 for evaluations only before the first and after the last round."""
    step_limit: Count = 10_000
    """Truncate evaluation episodes after this many steps; the return up to then counts."""
    adapt: Annotated[int, Ge(0), Le(1000)] = 0
    """Local updates, each on a new batch of the client's own task, after each of which the evaluation's episodes are
    played again; 0 for none. They are made on a copy, and nothing else depends on them."""
    twins: bool = False
    """Whether each client also trains a twin, which begins as it does and learns the same task alone, so that the run
    says for which clients sharing pays. It makes as many steps again, and nothing else depends on it."""


class CheckpointSettings(Section):
    """What is saved in the run's folder, so that a run that was stopped can be resumed."""

    every: Annotated[int, Ge(0)] = 1
    """Rounds between two checkpoints; 0 for none."""
    keep: Count = 2
    """Number of latest checkpoints that are kept."""


class TaskChange(Section):
    """A change of a client's task during a run, also written `changes = [{ round = 20, kwargs = { length = 0.9 } }]`.

    The sizes and kinds of observations and actions must stay.
    """

    round: Annotated[int, Ge(2), Field(examples=[20])]
    """The first round in which the client trains in the changed environment; evaluations after it use it too."""
    kwargs: Annotated[Arguments, MinLen(1), Field(examples=[{"swap_actions": True}])]
    """Keyword arguments of the environment that change; all others stay as they were in the round before."""


Range = Annotated[list[float], MinLen(2), MaxLen(2)]
"""The lowest and the highest value of a number."""


class SteeringSettings(Section):
    """Whether the server or each client chooses the levels of clients with a `curriculum`."""

    by: Literal["client", "server"] = "client"
    """`client`: each client by its own returns. `server`: the clients of an entry together, by the returns that all of
    them report; needs `kind = "return"`, `"expanding"` or `"learnability"`, and rounds that wait."""


class CurriculumSettings(Section):
    """Levels of a client's task: values of its environment's arguments that change from episode to episode.

    Evaluations play levels that are spread evenly over all `ranges`, whatever the kind; see docs/curriculum.md.
    """

    kind: Literal["uniform", "schedule", "return", "expanding", "learnability", "replay"] = "uniform"
    """How the levels of training are chosen. `uniform`: from all `ranges`. `schedule`: from a box that grows from
    `start` to `ranges` by progress; `return`: by the mean return. `expanding`: each edge of the box by the returns at
    this edge (1910.07113). `learnability`: by p (1 - p), where p is how often a level succeeds (2408.15099). `replay`:
    seeds, those again where the critic errs most (2010.03934)."""
    ranges: Annotated[dict[str, Range], MaxLen(11)] = {}
    """Arguments of the environment, each with the lowest and the highest value of a level. Only `replay` can do without
    any: then a level is the seed with which an episode begins."""
    start: dict[str, Range] = {}
    """The box of levels that `schedule`, `return` and `expanding` begin with; an argument that it does not have varies
    over all of its range from the beginning."""
    until: Annotated[float, Gt(0), Le(1)] = 0.5
    """With `schedule`, progress of the run at which the box has grown to `ranges`."""
    target: float | None = None
    """The return from which the box grows, and from which an episode is a success for `learnability`."""
    floor: float | None = None
    """With `return` and `expanding`, the mean return below which the box shrinks again; never without it."""
    step: Annotated[float, Gt(0), Le(1)] = 0.1
    """With `return` and `expanding`, part of the way from `start` to `ranges` by which the box, or an edge, moves."""
    episodes: Count = 10
    """With `return` and `expanding`, episodes that have to end before the mean of their returns moves the box, or an
    edge; of all of the entry's clients if the server steers."""
    edges: Annotated[float, Gt(0), Le(1)] = 0.5
    """With `expanding`, fraction of the copies of the environment that play at an edge of the box."""
    levels: Annotated[int, Ge(2), Le(10_000)] = 64
    """With `learnability`, number of levels, spread evenly over `ranges`; with `replay`, most levels that may come
    again."""
    explore: Fraction = 0.25
    """With `learnability`, fraction of the copies whose levels are chosen with equal probabilities; with `replay`, of
    those that play new levels."""
    fade: Fraction = 0.9
    """With `learnability`, what the successes and failures of a level still count after a round."""
    temperature: Positive = 0.1
    """With `replay`, how little the rank of a level's score matters: chances go by (1 / rank)^(1 / temperature)."""
    staleness: Fraction = 0.1
    """With `replay`, part of a level's chance that goes by the rounds since it was played."""


class RewardSettings(Section):
    """A reward of a completion, also written `rewards = [{ function = "exact" }]`."""

    function: Annotated[
        Annotated[Literal["exact", "numeric", "pattern", "format", "length"], Named] | OwnPath,
        NAMED_OR_OWN,
        Field(examples=["exact"]),
    ]
    """A reward that ships with grpo_fed, or `module:function` for one of your own, which is called as TRL calls it:
    `function(prompts=..., completions=..., **columns)` returns a number or None for each completion."""
    weight: float = 1.0
    """What the reward is multiplied by in the sum of all rewards."""
    kwargs: Arguments = {}
    """More keyword arguments of the function."""


class WrapperSettings(Section):
    """A wrapper of an environment with arguments, `{ path = "module:Wrapper", kwargs = { width = 3 } }`."""

    path: ImportPath
    """The wrapper's import path; it is called with the environment and the arguments."""
    kwargs: Arguments = {}
    """Keyword arguments of the wrapper."""


class NewcomerSettings(Section):
    """Clients that may join a running deployment although the scenario does not name them."""

    like: Annotated[Name | None, Field(examples=["cart"])] = None
    """The entry of `[[clients]]` whose task and settings such a client has. Without it a client that the scenario does
    not name takes no part. It needs checkpoints, since a run goes on from one when somebody joins."""
    most: Count = 8
    """How many clients may join."""


class ScoreSettings(Section):
    """The returns between which a client's returns are normalised, `{ random = 20.0, reference = 475.0 }`."""

    random: Annotated[float, Field(examples=[20.0])]
    """Mean return of random actions; its normalised score is 0."""
    reference: Annotated[float, Field(examples=[475.0])]
    """Mean return of the reference; its normalised score is 1."""


class ClientSettings(Section):
    """A client, or `count` clients of the same kind."""

    name: Annotated[Name, Field(examples=["cart"])]
    """Name in metrics, files and errors; with `count` above 1 the clients are called name-0, name-1, ..."""
    env: Annotated[Environment | None, Field(examples=["CartPole-v1"])] = None
    """The environment: a gymnasium id, `module:EnvId` to import a module first, or `module:function` that makes one. A
    client has this or `prompts`."""
    prompts: Annotated[str, MinLen(1)] | None = None
    """Prompts of a language model: `module:function`, called with a numpy generator, a count and `kwargs`, which
    returns rows with a key `prompt`; a file `.jsonl` or `.parquet` with a column `prompt`; or `reasoning_gym:NAME`."""
    eval_prompts: Annotated[str, MinLen(1)] | None = None
    """Prompts for evaluation; if not given the same function, with draws of its own, or `held_out` of the file."""
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Fraction of a file's rows, its last, that is never trained on but for evaluation, without `eval_prompts`."""
    rewards: list[RewardSettings] = []
    """What completions are rewarded for, with `prompts`; a reasoning-gym task has its own if none is given."""
    count: BoundedCount = 1
    """Number of clients."""
    kwargs: Arguments = {}
    """Keyword arguments for the environment, or for the function that makes prompts."""
    spread: dict[str, Range] = {}
    """Arguments of the environment that vary evenly over the `count` clients, from a first to a last value, such as `{
    length = [0.1, 0.9] }`."""
    changes: list[TaskChange] = []
    """Changes of the task during the run, in the order of their rounds."""
    curriculum: CurriculumSettings | None = None
    """Levels of the task."""
    wrappers: list[
        Annotated[Annotated[ImportPath, Tag("path")] | Annotated[WrapperSettings, Tag("table")], PATH_OR_TABLE]
    ] = []
    """Wrappers of the environment, the innermost first: import paths `module:Wrapper`, or with arguments, such as `{
    path = "gymnasium.wrappers:RescaleAction", kwargs = { min_action = -1.0, max_action = 1.0 } }`."""
    score: ScoreSettings | None = None
    """What its returns are normalised by where clients have unlike environments, whose returns have no common mean: the
    returns of random actions and of a reference. grpo_fed knows both for gymnasium's classic tasks and its own."""
    attack: Literal[
        "none",
        "sign-flip",
        "scaled",
        "random",
        "negated-reward",
        "random-action",
        "weight",
        "kl",
        "fisher",
        "returns",
        "alie",
        "ipm",
        "mimic",
        "min-max",
        "normalised",
        "stealth",
    ] = "none"
    """What a hostile client does, to try out how much a merge bears; docs/trust.md describes each. From `alie` on
    clients collude: they know what all honest clients sent, so these need the local engine and rounds that wait."""
    strength: Positive | None = None
    """How strong the attack is, in place of the value in brackets: the multiple of the honest update for `sign-flip`
    (1), `scaled` (100), `random` (10) and `ipm` (0.5), of the standard deviation for `alie` (by the number of clients),
    and of the truth for `weight`, `fisher` and `returns` (1000); the KL that `kl` reports (1000)."""
    learning_rate: Positive | None = None
    """Learning rate instead of `objective.learning_rate`."""
    entropy: float | None = None
    """Weight of the entropy bonus instead of `objective.entropy`."""
    penalty: NotNegative | None = None
    """Weight of the group penalty instead of `penalty.weight`."""
    trains: bool = True
    """Whether the clients take part in training; otherwise they are evaluated with the shared blocks alone, and adapted
    to their tasks with `evaluate.adapt`."""
    reward_scale: Positive | None = None
    """What its rewards are multiplied by instead of `rollout.reward_scale`."""
    start: FilePath | None = None
    """What its policy begins with instead of `policy.start`. Its shared blocks are nevertheless the server's."""
    pace: Positive = 1.0
    """Virtual seconds that 1,000 steps take on the local engine, which computes without waiting for them. With
    `round.mode = "buffered"` they decide whose answers come first."""
    jitter: NotNegative = 0.0
    """How much the virtual time of a round varies around its mean: the standard deviation of its logarithm."""

    @property
    def task(self) -> str:
        """What the client learns, in a word: its environment's id, or its source of prompts."""
        return self.env or self.prompts or ""

    @property
    def scale(self) -> tuple[str, ScoreSettings | None]:
        """What its returns are of, and what they are normalised by: equal for clients whose returns have a mean."""
        if self.prompts is None:
            return self.env or "", self.score
        rewards = sorted(f"{reward.weight:g} {reward.function}" for reward in self.rewards)
        return f"rewards {', '.join(rewards) or self.prompts.partition(':')[0]}", self.score

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the clients that this entry describes."""
        return (self.name,) if self.count == 1 else tuple(f"{self.name}-{number}" for number in range(self.count))
