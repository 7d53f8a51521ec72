"""Defaults that follow from other values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from grpo_fed.scenario.settings import (
    RULES_WITH_THRESHOLD,
    MergeSettings,
    ObjectiveSettings,
    RolloutSettings,
    Section,
)
from grpo_fed.scenario.toml import reading as read

ABSURD = 1e12
"""Beyond any learning rate or count; the mistakes say so."""


def default_merge_threshold(model: type[Section], tables: dict[str, Any]) -> dict[str, Any]:
    """The same with a `merge.threshold`, where there is none, that chance alone does not reach, 0.02 at the least.

    Steps of Adam that go either way by chance take a parameter learning_rate sqrt(U) far in U steps, and two clients
    sqrt(2) times that from each other. Of other steps, and of as many batches as there are episodes, there is no
    telling in advance. Steps that a client keeps for private blocks or a policy of its own are counted, too.
    """

    def value(kind: type[Section], section: str, key: str) -> Any:
        table = tables.get(section, {}) if section else tables
        return table.get(key, kind.model_fields[key].default) if isinstance(table, Mapping) else None

    of, merge = partial(value, ObjectiveSettings, "objective"), tables.get("merge", {})
    if not isinstance(merge, Mapping) or "threshold" in merge:
        return tables
    if value(MergeSettings, "merge", "rule") not in RULES_WITH_THRESHOLD or (of("advantage"), of("step")) != (
        "gae",
        "adam",
    ):
        return tables
    counts = [of("epochs"), of("minibatches"), value(model, "", "steps")]
    counts += [value(RolloutSettings, "rollout", key) for key in ("num_envs", "horizon")]
    rates = [of("learning_rate"), *_rates(tables.get("clients"))]
    if not all(type(one) is int and 0 < one < ABSURD for one in counts):
        return tables
    if not all(isinstance(one, int | float) and 0 < one < ABSURD for one in rates):
        return tables
    epochs, minibatches, steps, copies, horizon = counts
    chance = max(rates) * math.sqrt(2 * epochs * minibatches * math.ceil(steps / (copies * horizon)))
    usual = MergeSettings.model_fields["threshold"].default
    return {**tables, "merge": {**merge, "threshold": float(f"{chance:.2g}")}} if chance > usual else tables


def _rates(clients: Any) -> Iterator[Any]:
    """Learning rates of their own."""
    for client in clients if isinstance(clients, list) else ():
        own = client.get("learning_rate") if isinstance(client, Mapping) else getattr(client, "learning_rate", None)
        if own is not None:
            yield own


def is_complete(model: type[Section], tables: Mapping[str, Collection[str]]) -> bool:
    """Whether every key is given, as in a resolved scenario: no row is asked for then, and none has to be at hand."""
    sections = ((path, info) for path, info in read.all_keys(model) if len(path) == 2 and path[0] != "clients")
    return all(
        path[1] in tables.get(str(path[0]), ()) or info.default is None  # for which TOML may have no spelling
        for path, info in sections
    )
