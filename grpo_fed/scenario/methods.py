"""Federated methods as data: a method gives values to the keys that a scenario leaves open, and has no code of its own.

A key that a file or `--set` gives wins, then the method's row, then the preset's, then the default. But who types
`--set method=fedavg` wants FedAvg: then the file's own values for what either method's row speaks of make way. A
scenario may name a row of the user's own instead, by `module:NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fed.scenario import tables as rows
from grpo_fed.scenario.tables import Values

DEFAULT = "grpo"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    """In words."""
    paper: str
    """Where it comes from, and what is ours."""
    values: Values
    when: str = ""
    """When to take it."""


AVERAGE: Values = {
    "policy": {"shared": ["*"]},
    "merge": {"rule": "mean"},
    "proximity": {"mode": "off"},
}
"""Everything shared, averaged by steps, the whole step made."""

METHODS: Mapping[str, Method] = {
    "grpo": Method(
        "grouped regularised policy optimisation",
        "Ours: torso and actor are shared, a group leaves where leaving pays, steps stay within measured KL budgets.",
        {
            "policy": {"shared": ["torso.*", "actor"]},
            "merge": {"rule": "huber"},
            "proximity": {"mode": "measured"},
        },
        "First, and where it is not known who fits whom. The default.",
    ),
    "local": Method(
        "no federation",
        "The control: nothing is shared.",
        {"policy": {"shared": []}},
        "Always, beside whatever else is taken: does sharing help at all?",
    ),
    "fedavg": Method(
        "federated averaging",
        "McMahan et al. 2017, 1602.05629: every block, critic and all.",
        AVERAGE,
        "Where all tasks are alike. One that contradicts the rest is lost.",
    ),
    "fedprox": Method(
        "averaging with a proximal term",
        "Li et al. 2020, 1812.06127: mu/2 ||theta - s||^2 on the client, mu from the paper's grid.",
        {**AVERAGE, "penalty": {"squared": 0.01}},
        "As `fedavg`, where clients learn long between two merges and drift apart.",
    ),
    "fedper": Method(
        "personal heads on averaged base layers",
        "Arivazhagan et al. 2019, 1912.00818: the torso is averaged, the actor and the critic stay private.",
        {**AVERAGE, "policy": {"shared": ["torso.*"]}},
        "Where it is known in advance that all see alike and act unlike.",
    ),
    "fedrep": Method(
        "personal heads first, then the averaged representation",
        "Collins et al. 2021, 2102.07078: in each round the heads learn on a torso that rests, then it under them.",
        {**AVERAGE, "policy": {"shared": ["torso.*"]}, "personal": {"first": 0.5}},
        "As `fedper`, where heads should follow the torso before it moves again.",
    ),
    "lg": Method(
        "local representations under an averaged head",
        "Liang et al. 2020, 2001.01523: the torso and the critic stay private, the actor is averaged.",
        {**AVERAGE, "policy": {"shared": ["actor"]}},
        "Where clients see unlike things and act alike; observations may differ in size.",
    ),
    "ditto": Method(
        "a policy of one's own beside the averaged one",
        "Li et al. 2021, 2012.04221: it is drawn to the averaged one by lambda/2 ||v - w||^2 and is what plays. Of the "
        "lambdas 1, 0.3, 0.1, 0.03 and 0.01 the one that did best on the carts of `contrary`.",
        {**AVERAGE, "personal": {"model": True, "pull": 0.1}},
        "Where every client wants a policy of its own and has steps to spare for it.",
    ),
    "fedkl": Method(
        "averaging under a KL penalty to the shared policy",
        "Xie & Song 2023, 2204.08125: the client is held to the policy that the round began with; its weight adapts.",
        {**AVERAGE, "trust": {"region": "adaptive", "reference": "shared", "direction": "old-new"}},
        "As `fedavg`, where clients drift: held by what the policy does, not by its parameters.",
    ),
    "fisher": Method(
        "averaging by Fisher information",
        "Matena & Raffel 2022, 2111.09832: each parameter weighs what its diagonal Fisher matrix says.",
        {**AVERAGE, "merge": {"rule": "fisher"}},
        "Where clients know unlike parts of one task well.",
    ),
    "clusters": Method(
        "averaging within learned clusters of clients",
        "Sattler et al. 2019, 1910.01991, and IFCA, 2006.04088; here block by block, by linkage and silhouette.",
        {**AVERAGE, "merge": {"rule": "clusters"}},
        "Where clients are of a few kinds, each with several of them.",
    ),
}


@dataclass(frozen=True)
class MergeRule:
    """A way to merge, as a scenario's `merge.rule` names it; `grpo_fed.aggregation.merge.RULES` has the functions."""

    name: str
    """In words."""
    paper: str
    """Where it comes from."""
    keys: tuple[str, ...]
    """Of the section `merge`, those that it reads."""
    when: str
    """When to take it, and what it costs."""


MERGE_RULES: Mapping[str, MergeRule] = {
    "mean": MergeRule(
        "weighted mean", "McMahan et al. 2017, 1602.05629.", (), "Where all are alike. The memory of one model."
    ),
    "huber": MergeRule(
        "group lasso between clients",
        "Ours, after Yuan & Lin 2006 and Huber 1964.",
        ("threshold", "blocks", "refit"),
        "Where some may not fit: who lies further than the threshold leaves a group. The default.",
    ),
    "fisher": MergeRule(
        "mean weighted by Fisher information",
        "Matena & Raffel 2022, 2111.09832.",
        (),
        "Where clients know unlike parts well. They send a diagonal too, twice the bytes. The memory of a few models.",
    ),
    "median": MergeRule(
        "median of each parameter",
        "Yin et al. 2018, 1803.01498; here with weights.",
        (),
        "Where fewer than half of the weight may be hostile.",
    ),
    "trimmed-mean": MergeRule(
        "mean of each parameter without its ends",
        "Yin et al. 2018, 1803.01498; here with weights.",
        ("fraction",),
        "Where up to that fraction of the weight may be hostile.",
    ),
    "krum": MergeRule(
        "mean of the clients nearest to their neighbours",
        "Blanchard et al. 2017, 1703.02757.",
        ("byzantine", "keep"),
        "Where whole clients are hostile, and there are at least two for each of them and three more.",
    ),
    "clusters": MergeRule(
        "mean within learned clusters, for each block",
        "Sattler et al. 2019, 1910.01991; Rousseeuw 1987 for the silhouette.",
        ("structure", "most", "threshold", "blocks"),
        "Where clients are of a few kinds, each with several of them.",
    ),
}

KEYS_OF_METHODS = frozenset(
    (section, key) for method in METHODS.values() for section, values in method.values.items() for key in values
)
"""The keys that some method gives a value to."""


def fill_from_method(
    data: Mapping[str, Any], is_sound: Callable[[Values], bool] = lambda values: True
) -> dict[str, Any]:
    """A scenario's tables with what its method says for the keys that they leave open; the rest as it is.

    What is not a table, or no method, is left for the models to complain about, and so is a method that is not sound.
    """
    row = rows.find_row_or_none(data.get("method", DEFAULT), METHODS, Method)
    return dict(data) if row is None or not is_sound(row.values) else rows.fill_missing(data, row.values)


def clear_replaced_method(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Take out of a file's tables what its own method's row or that of a method in the overrides speaks of.

    ValueError if the file's method cannot be imported: nobody knows then what it had to say.
    """
    given = [
        value.strip().strip("'\"") for key, _, value in (text.partition("=") for text in overrides) if key == "method"
    ]
    if not given:
        return
    before = data.get("method", DEFAULT)
    try:
        row = rows.find_row(before, METHODS, Method)
    except ValueError as error:
        raise ValueError(f"method = {before}: {error}; its row says what makes way for {given[-1]}") from None
    for one in (row, rows.find_row_or_none(given[-1], METHODS, Method)):
        for section, values in one.values.items() if one else ():
            if isinstance(data.get(section), dict):
                data[section] = {key: value for key, value in data[section].items() if key not in values}
