"""Federated methods as data: a method is a row of values for keys that a scenario does not give, without any code.

A value in the file or from `--set` has precedence over the method's row; then comes the preset's row, then the default.
`--set method=fedavg` is meant to run FedAvg, so the file's values for keys in the row of the old or the new method are
then ignored. A scenario may name a row of the user's own instead, by `module:NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fed.scenario.tables import Values, fill_missing, find_row, find_row_or_none

DEFAULT_METHOD = "grpo"


@dataclass(frozen=True)
class Method:
    """A way for clients to share what they learn, as a row of the table of methods."""

    name: str
    """The full name, in words."""
    paper: str
    """The source: a paper, and what differs from it here."""
    values: Values
    """The values for keys that a scenario does not give."""
    when: str = ""
    """When to use it."""


AVERAGE: Values = {
    "policy": {"shared": ["*"]},
    "merge": {"rule": "mean"},
    "proximity": {"mode": "off"},
}
"""All blocks are shared and averaged, and the server makes the whole step."""

METHODS: Mapping[str, Method] = {
    "grpo": Method(
        "grouped regularised policy optimisation",
        "Ours: torso and actor are shared, a client leaves a group where leaving pays, and the server's steps stay "
        "within measured KL budgets.",
        {
            "policy": {"shared": ["torso.*", "actor", "layers.*"]},
            "merge": {"rule": "persistence"},
            "proximity": {"mode": "measured"},
        },
        "First, and where you do not know which clients fit together. The default.",
    ),
    "local": Method(
        "no federation",
        "The control: nothing is shared.",
        {"policy": {"shared": []}},
        "Always, beside the method of your choice: does sharing help at all?",
    ),
    "fedavg": Method(
        "federated averaging",
        "McMahan et al. 2017, 1602.05629: every block is averaged, the critic included.",
        AVERAGE,
        "Where all tasks are alike. A client whose task contradicts the others' cannot learn it.",
    ),
    "fedprox": Method(
        "averaging with a proximal term",
        "Li et al. 2020, 1812.06127: mu/2 ||theta - s||^2 is added to the client's loss, mu from the paper's grid.",
        {**AVERAGE, "penalty": {"squared": 0.01}},
        "Like `fedavg`, where clients train long between two merges and drift apart.",
    ),
    "fedadam": Method(
        "averaging with Adam on the server",
        "Reddi et al. 2021, 2003.00295: the clients' mean difference is the gradient of a step of Adam on the server, "
        "beta 0.9 and 0.99, without bias correction; rate and epsilon from the paper's grid.",
        {**AVERAGE, "merge": {"rule": "mean", "optimiser": "adam", "rate": 0.01, "epsilon": 0.001}},
        "Like `fedavg`, where the mean moves slowly in some parameters, or to and fro from round to round.",
    ),
    "scaffold": Method(
        "averaging with corrected drift",
        "Karimireddy et al. 2020, 1910.06378, option II: each client adds to its steps the difference between the mean "
        "step of all and its own; here by steps of Adam, and without sending control variates.",
        {**AVERAGE, "merge": {"rule": "mean", "weights": "uniform", "correct_drift": True}},
        "Where clients train long between two merges and drift apart, and all of them take part in every round.",
    ),
    "reptile": Method(
        "an initialisation that is near to all clients' policies",
        "Nichol et al. 2018, 1803.02999: the shared blocks go a fraction of the way to the mean of what clients have "
        "learned from there; here at a constant rate, and clients keep their Adam's state.",
        {**AVERAGE, "merge": {"rule": "mean", "weights": "uniform", "rate": 0.5}},
        "Where what counts is how fast a client learns from the shared policy, see `evaluate.adapt`.",
    ),
    "perfedavg": Method(
        "an initialisation that one step adapts",
        "Fallah et al. 2020, 2002.07948, first-order: the gradient is taken after an inner step on another minibatch; "
        "both are collected by the policy before that step.",
        {**AVERAGE, "personal": {"inner_rate": 0.01}},
        "Where few steps have to adapt a policy. On poles of lengths that it had not seen, in `newcomers`, `fedavg` "
        "was no worse.",
    ),
    "fedper": Method(
        "personal heads on averaged base layers",
        "Arivazhagan et al. 2019, 1912.00818: the torso is averaged, the actor and the critic stay private.",
        {**AVERAGE, "policy": {"shared": ["torso.*"]}},
        "Where you know in advance that observations mean the same for all clients and actions do not.",
    ),
    "fedrep": Method(
        "personal heads first, then the averaged representation",
        "Collins et al. 2021, 2102.07078: in each update the heads learn while the torso is fixed, then the torso "
        "while the heads are.",
        {**AVERAGE, "policy": {"shared": ["torso.*"]}, "personal": {"first": 0.5}},
        "Like `fedper`, where the heads should adapt to the merged torso before it changes again.",
    ),
    "lg": Method(
        "local representations under an averaged head",
        "Liang et al. 2020, 2001.01523: the torso and the critic stay private, the actor is averaged.",
        {**AVERAGE, "policy": {"shared": ["actor"]}},
        "Where observations differ between clients, even in size, and actions mean the same.",
    ),
    "ditto": Method(
        "a personal policy beside the averaged one",
        "Li et al. 2021, 2012.04221: each client also trains a policy of its own, which is pulled towards the averaged "
        "one by lambda/2 ||v - w||^2 and is the one that is evaluated. Of the lambdas 1, 0.3, 0.1, 0.03 and 0.01, this "
        "did best on `contrary`.",
        {**AVERAGE, "personal": {"model": True, "pull": 0.1}},
        "Where every client needs a policy of its own and has enough steps to train two.",
    ),
    "fedkl": Method(
        "averaging under a KL penalty to the shared policy",
        "Xie & Song 2023, 2204.08125: a KL penalty with an adaptive weight keeps each client near the policy with "
        "which the round began.",
        {**AVERAGE, "trust": {"region": "adaptive", "reference": "shared", "direction": "old-new"}},
        "Like `fedavg`, where clients drift apart: penalises a change of the policy's actions, not of its parameters.",
    ),
    "fisher": Method(
        "averaging by Fisher information",
        "Matena & Raffel 2022, 2111.09832: each parameter of a client is weighted by its diagonal Fisher information.",
        {**AVERAGE, "merge": {"rule": "fisher"}},
        "Where clients have learned different parts of one task well.",
    ),
    "clusters": Method(
        "averaging within learned clusters of clients",
        "Sattler et al. 2019, 1910.01991, and IFCA, 2006.04088; here for each block, by the evidence of all rounds.",
        {**AVERAGE, "merge": {"rule": "clusters"}},
        "Where there are a few kinds of clients, with several clients of each.",
    ),
    "fedit": Method(
        "averaging both factors of adapters apart",
        "Zhang et al. 2023, 2305.05644: A and B of each adapter learn and are averaged, each by itself, which is not "
        "the average of their products.",
        {**AVERAGE, "language": {"learn": "AB"}},
        "For language models, as the baseline that other federated ones compare with.",
    ),
    "fedsa": Method(
        "averaging the first factor of adapters",
        "Guo et al. 2024, 2410.01463: both factors learn, A is averaged and B stays private.",
        {**AVERAGE, "policy": {"shared": ["layers.*.A"]}, "language": {"learn": "AB"}},
        "For language models whose clients need answers of their own.",
    ),
}


@dataclass(frozen=True)
class MergeRule:
    """A way to merge, as `merge.rule` names it; `grpo_fed.aggregation.merge.RULES` has the functions."""

    name: str
    """The full name, in words."""
    paper: str
    """The source."""
    keys: tuple[str, ...]
    """The keys of `[merge]` that this rule reads."""
    when: str
    """When to use it, and what it costs."""


MERGE_RULES: Mapping[str, MergeRule] = {
    "mean": MergeRule(
        "weighted mean",
        "McMahan et al. 2017, 1602.05629.",
        (),
        "Where all clients are alike. The server holds one model in memory.",
    ),
    "persistence": MergeRule(
        "mean of the clients that are not in lasting conflict",
        "Ours.",
        ("confirm", "rejoin", "episodes"),
        "Where some clients may not fit, whatever the learning rate: a client leaves a parameter group when its "
        "deviation from the others agrees with itself from round to round by more than its noise and opposes theirs, "
        "and comes back where sharing is no worse. Four rounds of a shared merge come first, so runs of a few rounds "
        "cannot profit. The default.",
    ),
    "huber": MergeRule(
        "group lasso between clients",
        "Ours, after Yuan & Lin 2006 and Huber 1964.",
        ("threshold", "blocks", "refit"),
        "Where some clients may not fit, and you know how far apart is too far: one that lies further away than the "
        "threshold leaves a group.",
    ),
    "fisher": MergeRule(
        "mean weighted by Fisher information",
        "Matena & Raffel 2022, 2111.09832.",
        (),
        "Where clients have learned different parts well. They also send their Fisher diagonal, which doubles the "
        "bytes. The server holds a few models in memory.",
    ),
    "median": MergeRule(
        "median of each parameter",
        "Yin et al. 2018, 1803.01498; here with weights.",
        (),
        "Where clients with less than half of the weight may be hostile.",
    ),
    "trimmed-mean": MergeRule(
        "mean of each parameter without its extremes",
        "Yin et al. 2018, 1803.01498; here with weights.",
        ("fraction",),
        "Where clients with up to that fraction of the weight may be hostile.",
    ),
    "krum": MergeRule(
        "mean of the clients nearest to their neighbours",
        "Blanchard et al. 2017, 1703.02757.",
        ("byzantine", "keep"),
        "Where f clients may be hostile in all their parameters; there must be 2 f + 3 clients or more.",
    ),
    "multi-krum": MergeRule(
        "mean of all clients but the f furthest from their neighbours",
        "Blanchard et al. 2017, 1703.02757.",
        ("byzantine",),
        "As `krum`, with the mean of more clients, so that less is lost where nobody is hostile.",
    ),
    "geometric-median": MergeRule(
        "point with the least sum of distances from the clients",
        "Pillutla et al. 2019, 1912.13445.",
        (),
        "Where clients with less than half of the weight may be hostile in all their parameters together.",
    ),
    "centred-clipping": MergeRule(
        "mean of the clients' updates, none longer than the median",
        "Karimireddy et al. 2021, 2012.10333.",
        ("radius",),
        "Where hostile clients may send anything: none pulls further than the others. It differs little from the mean "
        "where nobody is hostile.",
    ),
    "clusters": MergeRule(
        "mean within learned clusters, for each block",
        "Sattler et al. 2019, 1910.01991.",
        ("most",),
        "Where there are a few kinds of clients, with several clients of each.",
    ),
}

KEYS_OF_METHODS = frozenset(
    (section, key) for method in METHODS.values() for section, values in method.values.items() for key in values
)
"""The keys to which some method gives a value."""


def fill_from_method(
    data: Mapping[str, Any], is_valid: Callable[[Values], bool] = lambda values: True
) -> dict[str, Any]:
    """Add the values of a scenario's method to its tables, for the keys that they do not have.

    The tables stay as they are if the method is unknown, cannot be imported or has invalid values; validating the
    scenario reports that.
    """
    row = find_row_or_none(data.get("method", DEFAULT_METHOD), METHODS, Method)
    return dict(data) if row is None or not is_valid(row.values) else fill_missing(data, row.values)


ROBUST_RULES = ("median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "centred-clipping")
"""Merge rules that tolerate hostile clients."""


def fill_from_rule(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add `proximity.over = "median"` to a scenario's tables with a robust merge rule or mixing, unless they have it,
    and `merge.weights = "uniform"` with a privacy budget or secure aggregation.

    A robust merge would be of no use if one client's KL could hold back every step towards it, and a private one would
    need more noise for clients of more weight. A secure sum holds no weights.
    """
    merge, privacy = data.get("merge"), data.get("privacy")
    is_robust = isinstance(merge, Mapping) and (merge.get("rule") in ROBUST_RULES or bool(merge.get("mix")))
    filled = fill_missing(data, {"proximity": {"over": "median"}}) if is_robust else dict(data)
    is_private = isinstance(privacy, Mapping) and (
        privacy.get("epsilon") not in (None, math.inf) or bool(privacy.get("secure"))
    )
    return fill_missing(filled, {"merge": {"weights": "uniform"}}) if is_private else filled


def clear_replaced_method(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Remove values from a file's tables if an override names a method: those of the old and of the new method's keys.

    ValueError if the file's method cannot be imported, since its keys are then unknown.
    """
    assignments = [text.partition("=") for text in overrides]
    names = [value.strip().strip("'\"") for key, _, value in assignments if key == "method"]
    if not names:
        return
    new_name, old_name = names[-1], data.get("method", DEFAULT_METHOD)
    try:
        old = find_row(old_name, METHODS, Method)
    except ValueError as error:
        raise ValueError(f"method = {old_name}: {error}; without it, {new_name} cannot replace its values") from None
    for row in (old, find_row_or_none(new_name, METHODS, Method)):
        for section, values in row.values.items() if row else ():
            if isinstance(data.get(section), dict):
                data[section] = {key: value for key, value in data[section].items() if key not in values}
            for site in data["sites"] if isinstance(data.get("sites"), list) else ():
                if isinstance(site, dict) and isinstance(site.get(section), dict):
                    site[section] = {key: value for key, value in site[section].items() if key not in values}
