"""The table of metrics: each one's key and meaning, whether a client may report it, and whether MLflow gets it.

A round's line in `rounds.jsonl` has these keys for the whole, and under `clients` for each client; a key has the same
meaning in the line, in MLflow and in figures. A key that ends in `/` stands for one metric of each block, task or name.
To add a loss, write it as a property of `LossTerms` with its name in `REPORTED_TERMS`, both in
`grpo_fed/rl/objective.py`, and give it a row here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

TRAINING_RETURN, TRAINING_LENGTH = "charts/episodic_return", "charts/episodic_length"
TRAINING_COST, COST_LIMIT, COST_MULTIPLIER = "charts/episodic_cost", "charts/cost_limit", "charts/cost_multiplier"
TRAINING_EPISODES, TRAINING_SECONDS, STEPS_PER_SECOND = "charts/episodes", "charts/seconds", "charts/SPS"
EVALUATION_RETURN, SCORE_IQM, SCORE_MIN = "eval/episodic_return", "eval/score_iqm", "eval/score_min"
NORMALISED_IQM, NORMALISED_MIN = "eval/normalised_iqm", "eval/normalised_min"
NORMALISED_TRAINING, OF_ENVIRONMENT = "charts/normalised_return", "env/"
EVALUATION_COST = "eval/episodic_cost"
ROUND_SECONDS, ENV_STEPS = "time/round_s", "global_step"
CLIENTS_OK, CLIENTS_FAILED, DEPARTED_GROUPS = "fed/clients_ok", "fed/clients_failed", "fed/personal_groups"
PENALTY_VALUE, PENALTY_ZEROS, PENALTY_NORM = "penalty/value", "penalty/zeros", "penalty_norm/"
EQUAL_GROUPS, CUT, TOKENS_PER_SECOND = "charts/equal_groups", "charts/cut", "charts/tokens_per_second"
REWARD_OF, KL_REFERENCE = "reward/", "losses/kl_reference"
MB_UP, MB_DOWN, MB_TOTAL = "comm/MB_up", "comm/MB_down", "comm/MB_total"
RHO_LIMIT = "fed/rho_limit"
PRIVACY_EPSILON, PRIVACY_BOUND = "privacy/epsilon", "privacy_bound/"
STALENESS, MERGE_LENGTH, VIRTUAL_SECONDS = "fed/staleness", "fed/merge_length", "time/virtual_s"
ENTROPY, ENTROPY_MULTIPLIER = "entropy/", "entropy_multiplier/"
ROLLBACKS, ROLLBACK_EPISODES = "trust/rollbacks", "trust/rollback_episodes"
COMPARISON_EPISODES = "fed/comparison_episodes"
RHO_BY_GROUP, LEFT, RETURNED, STAYED = "rho_by_group", "left", "returned", "stayed"
COMPARISON = "comparison"
SITE, SITES = "site/", "sites"
CALLBACK = "callback/"
CURRICULUM_SIZE, CURRICULUM_SOLVED, CURRICULUM_VISITED = "curriculum/size", "curriculum/solved", "curriculum/visited"
CURRICULUM_SCORE = "curriculum/score"
CURRICULUM_LOW, CURRICULUM_HIGH = "curriculum_low/", "curriculum_high/"
ADAPTED_RETURN, ADAPTATION = "eval/adapted_return", "adaptation/"
TWIN_RETURN, TWIN_VERDICT, TWIN_SINCE = "twin/episodic_return", "twin/verdict", "twin/since"
TWIN_GAIN, TWIN_GAIN_LOW, TWIN_GAIN_HIGH = "twin/gain", "twin/gain_low", "twin/gain_high"


@dataclass(frozen=True)
class Metric:
    """Describes a metric: a number in each round, of the whole federation, of each client, or of both."""

    key: str
    """The key in a line of `rounds.jsonl`; one that ends in `/` is the prefix of a family."""
    meaning: str
    """The meaning in words."""
    reported: bool = False
    """Whether a client may report it in its answer; the server computes all others."""
    tracked: bool = True
    """Whether it goes to MLflow."""
    timed: bool = False
    """Whether it depends on the machine's speed, so that it differs when the same round is trained again."""


TABLE = (
    Metric("round", "The round's number, from 1.", tracked=False),
    Metric(ENV_STEPS, "Environment steps of all clients since the run began."),
    Metric(ROUND_SECONDS, "Seconds of the round's training and of the server's step.", timed=True),
    Metric(STEPS_PER_SECOND, "Environment steps a second.", timed=True),
    Metric(VIRTUAL_SECONDS, "Virtual seconds since the run began, by the clients' `pace`."),
    Metric(EVALUATION_RETURN, "Mean return of a client's episodes with deterministic actions, after the round."),
    Metric(EVALUATION_COST, "Mean cost of these episodes, where `objective.cost.limit` limits it."),
    Metric(ADAPTED_RETURN, "Mean return of these episodes after `evaluate.adapt` local updates."),
    Metric(ADAPTATION, "Mean return of these episodes after so many local updates, from 0."),
    Metric(SCORE_IQM, "Interquartile mean of the clients' evaluation returns (2108.13264)."),
    Metric(SCORE_MIN, "The lowest of the clients' evaluation returns."),
    Metric(
        NORMALISED_IQM,
        "The same of the normalised scores, 0 for random actions and 1 for a reference, where environments are unlike.",
    ),
    Metric(NORMALISED_MIN, "The lowest of the clients' normalised scores."),
    Metric(NORMALISED_TRAINING, "Mean normalised score of the training episodes that ended in the round."),
    Metric(OF_ENVIRONMENT, "A mean return of the clients of one environment, where environments are unlike."),
    Metric("task/", "Mean evaluation return of the clients of one entry of the scenario."),
    Metric(TRAINING_RETURN, "Mean return of the training episodes that ended in the round.", reported=True),
    Metric(TRAINING_COST, "Mean cost of these episodes, where `objective.cost.limit` limits it.", reported=True),
    Metric(COST_LIMIT, "The limit.", reported=True),
    Metric(COST_MULTIPLIER, "Price of costs in the objective, by which the limit is kept.", reported=True),
    Metric(TRAINING_LENGTH, "Mean length of these episodes in steps.", reported=True),
    Metric(TRAINING_EPISODES, "How many training episodes ended in the round."),
    Metric(TRAINING_SECONDS, "Seconds that the client trained.", reported=True, timed=True),
    Metric("losses/policy_loss", "The surrogate, negated.", reported=True),
    Metric("losses/value_loss", "Mean squared error of the critic.", reported=True),
    Metric("losses/entropy", "Entropy of the policy.", reported=True),
    Metric("losses/approx_kl", "Estimate of the KL from the policy before the update to the one after.", reported=True),
    Metric("losses/clipfrac", "Share of steps whose probability ratio is beyond the clip.", reported=True),
    Metric("losses/explained_variance", "Share of the returns' variance that the critic explains.", reported=True),
    Metric(
        "losses/kl", "KL from the policy before the update to the one after, where something needs it.", reported=True
    ),
    Metric(
        ENTROPY,
        "Mean entropy of a set of action components that has a target, `action` for the whole action.",
        reported=True,
    ),
    Metric(ENTROPY_MULTIPLIER, "Weight of its entropy bonus, by which the target is reached.", reported=True),
    Metric(KL_REFERENCE, "KL from or to the reference, as `trust.region` penalises it.", reported=True),
    Metric(REWARD_OF, "Mean reward that the function gave to the round's completions.", reported=True),
    Metric(
        EQUAL_GROUPS, "Share of groups of completions that were rewarded equally; they teach nothing.", reported=True
    ),
    Metric(
        "charts/completions_written",
        "Completions written where groups were drawn again, with those that were replaced.",
        reported=True,
    ),
    Metric(CUT, "Share of completions that were cut off at `language.length`.", reported=True),
    Metric(TOKENS_PER_SECOND, "Tokens that the client wrote in a second of training.", reported=True, timed=True),
    Metric(ROLLBACKS, "Updates of the round that were taken back, by `trust.rollback`.", reported=True),
    Metric(
        ROLLBACK_EPISODES,
        "Episodes that were played to compare policies before and after updates; not learned from.",
        reported=True,
    ),
    Metric(PENALTY_VALUE, "The client's group penalty, with its weights, at the end of its training.", reported=True),
    Metric(
        PENALTY_ZEROS,
        "Share of the penalised parameter groups that are exactly at zero, or at the shared values"
        ' with `penalty.toward = "shared"`.',
        reported=True,
    ),
    Metric(
        PENALTY_NORM,
        "Norm of what is penalised in the block: its parameters, or their difference from the shared ones.",
        reported=True,
    ),
    Metric(
        TWIN_RETURN, "Mean return of the training episodes of the client's twin, which learns alone.", reported=True
    ),
    Metric(
        TWIN_GAIN,
        "Mean over the rounds so far of what sharing brings a client: its training return less its twin's, as a part of"
        " what the better of the two has learned.",
        reported=True,
    ),
    Metric(TWIN_GAIN_LOW, "Lower end of this mean's interval, which holds at 95 % at any time.", reported=True),
    Metric(TWIN_GAIN_HIGH, "Upper end of this interval.", reported=True),
    Metric(TWIN_VERDICT, "1 where sharing pays, -1 where it costs, 0 where that is open.", reported=True),
    Metric(TWIN_SINCE, "The round since which the verdict has held; 0 while it is open.", reported=True),
    Metric(
        CURRICULUM_SIZE, "Part of the range of levels that training was in, a mean over the arguments.", reported=True
    ),
    Metric(CURRICULUM_LOW, "The lowest value of the argument that a level could have in training.", reported=True),
    Metric(CURRICULUM_HIGH, "The highest value of the argument that a level could have in training.", reported=True),
    Metric(CURRICULUM_SOLVED, "Part of the levels that succeed more often than not, by the estimate.", reported=True),
    Metric(CURRICULUM_SCORE, "Mean |advantage| of the levels that may be replayed.", reported=True),
    Metric(CURRICULUM_VISITED, "Part of the levels of which an episode has ended in training.", reported=True),
    Metric(CLIENTS_OK, "Clients that trained in the round."),
    Metric(CLIENTS_FAILED, "Clients that were asked and gave no valid answer."),
    Metric(STALENESS, "Merges between a client's beginning and the one that its answer is in."),
    Metric(MERGE_LENGTH, "Part of the way to the merge that a buffer's clients may move the shared blocks."),
    Metric(DEPARTED_GROUPS, "Shared parameter groups that clients have left."),
    Metric(MB_UP, "Megabytes from clients to the server in the round."),
    Metric(MB_DOWN, "Megabytes from the server to clients in the round."),
    Metric(MB_TOTAL, "Megabytes both ways since the run began."),
    Metric(PRIVACY_EPSILON, "What the merges so far have spent of `privacy.epsilon`."),
    Metric(PRIVACY_BOUND, "Length to which a client's difference in the block is cut in the next round."),
    Metric("kl/", "KL of the server's step: `kl/joint` with all blocks moved, else with this block moved alone."),
    Metric("last_kl/", "KL of the last round's step, as clients measured it afterwards."),
    Metric("alpha/", "Fraction of the distance to the merge that the block moves."),
    Metric("budget/", "The block's KL budget; `budget/joint` for all blocks together."),
    Metric("wanted/", "KL that the step would have if it went all the way to the merge."),
    Metric(
        "rho/",
        "How much a client's deviation from the others agrees with itself over rounds: the greatest of the block's"
        " groups, and for the whole the greatest of the clients that are compared.",
    ),
    Metric(RHO_LIMIT, "The rho above which a client leaves a group if its deviation opposes the others."),
    Metric(
        COMPARISON_EPISODES,
        "Episodes that clients played to compare their own parameters with the shared ones; not learned from.",
    ),
    Metric(
        SITE,
        "A metric of one site: mean returns of its clients, the KL, budgets and fractions of its own step, rho against"
        " the other sites, and the shared parameter groups that it has left.",
    ),
    Metric(CALLBACK, "A metric that a callback logs, under this prefix and its name."),
    Metric("clusters/", "How many clusters of clients the block is merged in."),
    Metric("cluster/", "The cluster that the client's block is merged in; 0 is the one with the greatest weight."),
)

METRICS: Mapping[str, Metric] = {metric.key: metric for metric in TABLE}
"""The table by key."""

REPORTED = frozenset(metric.key for metric in TABLE if metric.reported)
"""Keys that a client may report about itself, and prefixes of families of such keys."""

TEXTS = frozenset(
    {"clients", "notes", "personal_groups", "failure", RHO_BY_GROUP, LEFT, RETURNED, STAYED, COMPARISON, SITES}
)
"""Keys of a line whose values are not numbers. Four are tables of a client by group: rho; the groups that it left or
returned to in the round, with the rho or the gain that decided; and those in which it was in conflict and stayed. The
last is what the client saw when it played with its own parameters and with the shared ones."""

_VALID = re.compile(r"[\w./ -]{1,250}", re.ASCII)


def find_metric(key: str) -> Metric | None:
    """Find a key's row in the table, or that of its family; None for an unknown key."""
    return METRICS.get(key) or METRICS.get(key[: key.find("/") + 1])


def is_reported(key: str) -> bool:
    """Return whether a client may report a metric: the table says so, and it has a name that MLflow accepts."""
    metric = find_metric(key)
    return metric is not None and metric.reported and not key.endswith("/") and _VALID.fullmatch(key) is not None


def is_tracked(key: str) -> bool:
    """Return whether MLflow gets a metric: it is tracked by the table, and MLflow accepts such a name."""
    metric = find_metric(key)
    return metric is not None and metric.tracked and _VALID.fullmatch(key) is not None


def is_timed(key: str) -> bool:
    """Return whether a metric depends on the machine's speed."""
    metric = find_metric(key)
    return metric is not None and metric.timed
