"""The table of keys that have no effect beside other values: keys, a condition, and the reason in words.

A test changes every key of the table in a run that meets its condition, and expects the same bits. Another lists the
keys that the table need not have, so whoever adds a key decides when it is used.

Over 400 lines: it is one table, in which the first row that holds gives the reason, so its order is read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from grpo_fed.scenario.methods import MERGE_RULES
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ATTACKS_WITH_STRENGTH, RULES_WITH_THRESHOLD, MergeSettings, ProximitySettings
from grpo_fed.scenario.tables import is_import_path
from grpo_fed.scenario.unused_rows import Unused

RULES_BY_GROUP = ("huber", "persistence")
"""The merge rules by which a client may leave single parameter groups."""


# Conditions ----------------------------------------------------------------------------------------------------------


def _shares_nothing(scenario: Scenario) -> bool:
    return not scenario.policy.shared


def _has_own_network(scenario: Scenario) -> bool:
    return scenario.policy.module is not None


def _has_no_layers(scenario: Scenario) -> bool:
    policy = scenario.policy
    return policy.module is None and not policy.hidden and not policy.adapter


def _has_no_torso(scenario: Scenario) -> bool:
    policy = scenario.policy
    return _has_no_layers(scenario) and policy.kind == "mlp" and policy.memory == "none"


def _has_no_critic(scenario: Scenario) -> bool:
    return scenario.objective.advantage == "group"


def _is_natural(scenario: Scenario) -> bool:
    return scenario.objective.step == "natural"


def _uses_no_adam(scenario: Scenario) -> bool:
    """With the natural step, Adam trains the critic alone."""
    return _is_natural(scenario) and _has_no_critic(scenario)


def _has_fixed_step(scenario: Scenario) -> bool:
    """Whether a limit on the KL sets the length of the only step; a penalty's is as long as the learning rate."""
    return _uses_no_adam(scenario) and scenario.trust.region == "hard" and not _penalises_groups(scenario)


def _is_natural_without_search(scenario: Scenario) -> bool:
    """Whether nothing looks at the surrogate beyond the old policy, where the ratio is 1."""
    trust = scenario.trust
    looks = trust.region == "hard" and (trust.line_search or trust.adaptive_target)
    return _is_natural(scenario) and not looks


def _makes_one_step(scenario: Scenario) -> bool:
    """Whether a batch gives a single step of Adam, which starts at the policy and the values of the batch."""
    objective = scenario.objective
    return objective.step == "adam" and objective.epochs * objective.minibatches == 1


def _starts_where_the_kl_is_flat(scenario: Scenario) -> bool:
    trust = scenario.trust
    return trust.region in ("penalty", "adaptive") and trust.reference == "old" and _makes_one_step(scenario)


def _fits_critic_in_one_step(scenario: Scenario) -> bool:
    objective = scenario.objective
    return _is_natural(scenario) and objective.value_epochs * objective.minibatches == 1


def _penalises_groups(scenario: Scenario) -> bool:
    penalty = scenario.penalty
    weights = [penalty.weight if entry.penalty is None else entry.penalty for entry in scenario.clients]
    return bool(any(weights) or penalty.l1 or penalty.outer)


def _ignores_groups(scenario: Scenario) -> bool:
    rule = scenario.merge.rule
    merges_by_group = not _shares_nothing(scenario) and (rule in RULES_BY_GROUP or is_import_path(rule))
    return not merges_by_group and not _penalises_groups(scenario) and scenario.privacy.epsilon is None


def _all_clients_have(key: str) -> Callable[[Scenario], bool]:
    return lambda scenario: all(getattr(entry, key) is not None for entry in scenario.clients)


def _count(scenario: Scenario) -> int:
    """Return the number of clients that take part in training."""
    return sum(entry.count for entry in scenario.clients if entry.trains)


def _is_one_client(scenario: Scenario) -> bool:
    return _count(scenario) == 1


def _nobody_departs(scenario: Scenario) -> bool:
    merge = scenario.merge
    return merge.rule == "huber" and merge.threshold is None and not any(x is not None for x in merge.blocks.values())


def _has_no_block_budget(scenario: Scenario) -> bool:
    proximity = scenario.proximity
    return proximity.kl_block is None and not any(x is not None for x in proximity.blocks.values())


def _evaluates_at_the_ends(scenario: Scenario) -> bool:
    """Whether no evaluation comes before that after the last round, although `evaluate.every` is given."""
    return scenario.evaluate.every >= scenario.rounds


def _runs_out_of_rounds(scenario: Scenario) -> bool:
    """Whether the evaluations before the last round are too few for `stop.patience`; the first sets the best return."""
    every, patience = scenario.evaluate.every, scenario.stop.patience
    return bool(every and patience) and (scenario.rounds - 1) // every - 1 < patience


# The table -----------------------------------------------------------------------------------------------------------


def _keys_of(section: str, keys: Collection[str]) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for key in keys)


def _rule_rows() -> Iterator[Unused]:
    """Make a row for each key of `[merge]` that some rules read, after the table of rules."""
    keys = dict.fromkeys(key for rule in MERGE_RULES.values() for key in rule.keys)
    for key in keys:
        if key in ("threshold", "blocks"):  # RULES_WITH_THRESHOLD, and a contradiction with other rules
            continue
        rules = [name for name, rule in MERGE_RULES.items() if key in rule.keys]
        text = " and ".join(f'"{name}"' for name in rules)
        yield Unused(
            (f"merge.{key}",),
            lambda scenario, rules=rules: scenario.merge.rule not in rules,  # type: ignore[misc]
            f'merge.rule is "{{0.merge.rule}}", and the key is for {text}',
        )


UNUSED: tuple[Unused, ...] = (
    # policy
    Unused(
        _keys_of(
            "policy",
            ("kind", "encoder", "memory", "units", "hidden", "activation", "torso", "adapter", "log_std", "orthogonal"),
        ),
        _has_own_network,
        "policy.module is a network of your own, with its own layers and first parameters",
    ),
    Unused(("policy.encoder",), lambda scenario: scenario.policy.kind != "cnn", 'policy.kind is "{0.policy.kind}"'),
    Unused(("policy.units",), lambda scenario: scenario.policy.memory == "none", 'policy.memory is "none"'),
    Unused(("policy.activation",), _has_no_layers, "policy.hidden = [] leaves no hidden layer"),
    Unused(
        ("policy.torso",),
        lambda scenario: _has_no_torso(scenario) and scenario.merge.rule not in ("persistence", "clusters"),
        "policy.hidden = [] leaves no hidden layer",
    ),
    Unused(
        ("policy.squash", "policy.log_std"),
        lambda scenario: True,
        "no client has a box of actions",
        lambda tasks: not tasks.box_actions,
    ),
    Unused(
        ("policy.same_start",),
        lambda scenario: True,
        "all blocks are shared, and the shared ones always start alike",
        lambda tasks: not tasks.private_blocks,
    ),
    Unused(
        ("policy.groups",), _ignores_groups, 'merge.rule is "{0.merge.rule}", and no penalty or merge goes by groups'
    ),
    # rollout and normalise
    Unused(
        ("rollout.horizon",), _has_no_critic, 'objective.advantage is "group", with which each copy runs whole episodes'
    ),
    Unused(
        ("normalise.clip",),
        lambda scenario: not (scenario.normalise.observations or scenario.normalise.rewards),
        "neither normalise.observations nor normalise.rewards is true",
    ),
    # objective
    Unused(
        _keys_of("objective", ("gae_lambda", "value_coefficient", "value_clip", "value_epochs")),
        _has_no_critic,
        'objective.advantage is "group", which has no critic',
    ),
    Unused(
        ("objective.value_epochs",),
        lambda scenario: not _is_natural(scenario),
        'objective.step is "adam", with which the critic learns in objective.epochs too',
    ),
    Unused(("objective.value_coefficient",), _is_natural, 'objective.step is "natural": the critic learns by itself'),
    Unused(
        ("objective.epochs",),
        _is_natural,
        'objective.step is "natural", one step for each batch; the critic has objective.value_epochs',
    ),
    Unused(
        _keys_of("objective", ("adam_epsilon", "minibatches", "max_grad_norm")),
        _uses_no_adam,
        'objective.step is "natural", and with objective.advantage = "group" there is no critic to train with Adam',
    ),
    Unused(
        ("objective.learning_rate", "objective.schedule", "clients.learning_rate"),
        _has_fixed_step,
        'trust.region is "hard": trust.target sets the length of the step, and there is no critic',
    ),
    Unused(("objective.learning_rate",), _all_clients_have("learning_rate"), "every client has its own learning_rate"),
    Unused(("objective.entropy",), _all_clients_have("entropy"), "every client has its own entropy"),
    Unused(
        ("objective.entropy_groups",),
        lambda scenario: (
            not scenario.objective.entropy_weights and not isinstance(scenario.objective.entropy_target, dict)
        ),
        "objective.entropy_weights gives none of them a weight",
    ),
    Unused(
        ("objective.ratio",),
        lambda scenario: scenario.objective.surrogate == "score",
        'objective.surrogate is "score", which has no ratio',
    ),
    Unused(
        ("objective.clip", "objective.clip_schedule"),
        lambda scenario: scenario.objective.surrogate != "clip",
        'objective.surrogate is "{0.objective.surrogate}", which clips nothing',
    ),
    Unused(
        _keys_of("objective", ("clip", "clip_high", "clip_schedule")),
        _is_natural_without_search,
        'objective.step is "natural" and starts where the ratio is 1; only trust.line_search looks further',
    ),
    Unused(
        (*_keys_of("objective", ("clip", "clip_high", "clip_schedule", "value_clip")), "trust.stop"),
        _makes_one_step,
        "with one epoch of one minibatch a batch gives one step, which starts at the old policy",
    ),
    Unused(
        ("objective.value_clip",),
        _fits_critic_in_one_step,
        "with one of value_epochs and one minibatch the critic makes one step, which starts at the old values",
    ),
    # group
    Unused(
        _keys_of("group", ("size", "by", "key", "clusters", "score", "equal")),
        lambda scenario: scenario.objective.advantage == "gae",
        'objective.advantage is "gae", which compares no episodes',
    ),
    Unused(("group.size",), lambda scenario: scenario.group.by != "start", 'group.by is "{0.group.by}", not "start"'),
    Unused(
        ("group.clusters",),
        lambda scenario: scenario.group.by != "similarity",
        'group.by is "{0.group.by}", not "similarity"',
    ),
    # trust
    Unused(
        ("trust.direction",),
        lambda scenario: not (_is_natural(scenario) or scenario.trust.region != "none" or scenario.trust.blocks),
        'trust.region is "none", and no KL is computed',
    ),
    Unused(
        ("trust.reference",),
        lambda scenario: scenario.trust.region == "none",
        'trust.region is "none", and no KL is penalised',
    ),
    Unused(
        ("trust.region", "trust.coefficient", "trust.target"),
        _starts_where_the_kl_is_flat,
        "with one epoch of one minibatch a batch gives one step, which starts at the old policy, where the KL is flat",
    ),
    Unused(
        ("trust.coefficient",),
        lambda scenario: scenario.trust.region not in ("penalty", "adaptive"),
        'trust.region is "{0.trust.region}", and no KL is penalised',
    ),
    Unused(
        ("trust.target",),
        lambda scenario: scenario.trust.region not in ("adaptive", "hard"),
        'trust.region is "{0.trust.region}", which has no target',
    ),
    Unused(
        ("trust.line_search",),
        lambda scenario: scenario.trust.region != "hard",
        'trust.region is "{0.trust.region}", not "hard"',
    ),
    Unused(
        ("trust.cg_iterations", "trust.cg_damping"),
        lambda scenario: not _is_natural(scenario),
        'objective.step is "adam", not "natural"',
    ),
    # penalty and personal
    Unused(("penalty.weight",), _all_clients_have("penalty"), "every client has its own penalty"),
    Unused(
        _keys_of("penalty", ("step", "toward", "kind", "blocks")),
        lambda scenario: not _penalises_groups(scenario),
        "penalty.weight is 0 for all clients, and so are penalty.l1 and penalty.outer",
    ),
    Unused(("penalty.step",), _is_natural, 'objective.step is "natural", after which a penalty is always decoupled'),
    Unused(
        ("penalty.kind",),
        lambda scenario: scenario.penalty.kind != "group" and not (scenario.penalty.l1 or scenario.penalty.outer),
        'penalty.kind is "{0.penalty.kind}" without penalty.l1 or penalty.outer, which is "group"',
    ),
    Unused(
        ("personal.pull", "personal.steps"),
        lambda scenario: not scenario.personal.model,
        "personal.model is false, and there is no second policy",
    ),
    Unused(("penalty.squared", "personal.pull"), _shares_nothing, "policy.shared = [] shares no block to be pulled to"),
    # merge and proximity
    Unused(
        (*_keys_of("merge", MergeSettings.model_fields), *_keys_of("proximity", ProximitySettings.model_fields)),
        _shares_nothing,
        "policy.shared = [] leaves nothing to merge",
    ),
    Unused(
        ("merge.threshold",),
        lambda scenario: scenario.merge.rule not in RULES_WITH_THRESHOLD,
        'merge.rule is "{0.merge.rule}", which compares no distance with a threshold',
    ),
    *_rule_rows(),
    Unused(("merge.refit",), _nobody_departs, "merge.threshold = inf lets no client leave a group"),
    Unused(
        ("merge.episodes",),
        lambda scenario: scenario.merge.confirm == "evidence" and not scenario.merge.rejoin,
        'merge.confirm is "evidence" and merge.rejoin is 0, so no client plays to compare',
    ),
    Unused(
        ("merge.most",),
        lambda scenario: scenario.merge.rule == "clusters" and _count(scenario) < 3,
        "fewer than three clients are two clusters at most",
    ),
    Unused(
        _keys_of("proximity", ("kl_block", "kl_joint", "blocks", "over", "adaptive")),
        lambda scenario: scenario.proximity.mode == "off",
        'proximity.mode is "off"',
    ),
    Unused(
        ("proximity.states",),
        lambda scenario: scenario.proximity.mode == "off" and scenario.merge.rule != "fisher",
        'proximity.mode is "off", and no client measures anything',
    ),
    Unused(
        ("proximity.over",),
        lambda scenario: scenario.proximity.mode == "quadratic" and not scenario.proximity.adaptive,
        'proximity.mode is "quadratic", which predicts the mean; only the KL in the records changes',
    ),
    Unused(("proximity.over", "proximity.adaptive"), _is_one_client, "one client alone takes part in training"),
    Unused(("proximity.adaptive",), _has_no_block_budget, "proximity.kl_block = inf leaves no budget to adapt"),
    # hostile clients
    Unused(
        ("clients.strength",),
        lambda scenario: all(entry.attack not in ATTACKS_WITH_STRENGTH for entry in scenario.clients),
        "no client has an attack whose strength can be chosen",
    ),
    # run
    Unused(("round.fraction", "round.quorum"), _is_one_client, "one client alone takes part in training"),
    Unused(
        ("clients.pace", "clients.jitter"),
        lambda scenario: scenario.round.mode == "sync",
        'round.mode is "sync": only the virtual times in the records change',
    ),
    Unused(
        ("round.staleness", "round.rate_fair", "wire.dtype"),
        _shares_nothing,
        "policy.shared = [] leaves nothing to merge",
    ),
    Unused(
        ("evaluate.every", "stop.target", "stop.patience"),
        _evaluates_at_the_ends,
        "evaluate.every = {0.evaluate.every} is not reached before the last of {0.rounds} rounds",
    ),
    Unused(
        ("stop.patience",),
        _runs_out_of_rounds,
        "the last of {0.rounds} rounds comes first, with evaluate.every = {0.evaluate.every}",
    ),
    Unused(
        ("checkpoint.keep",),
        lambda scenario: not 0 < scenario.checkpoint.every <= scenario.rounds,
        "checkpoint.every = {0.checkpoint.every} gives no checkpoint in {0.rounds} rounds",
    ),
)
"""Where several rows name a key, the first whose condition holds gives the reason."""
