"""Merges the arrays of an app's clients, block by block, and remembers which client keeps what. It needs no Flower."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Merged, Replies, Reply
from grpo_fed.aggregation.merge.evidence import Evidence, with_clients
from grpo_fed.aggregation.merge.persistence import Findings, persistence
from grpo_fed.aggregation.merge.rules import bind_rule, check_rule
from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep, StepFractions, interpolate
from grpo_fed.federation.round_merge import MergeTarget
from grpo_fed.federation.server_step import Move, block_budgets, choose_step
from grpo_fed.flower.array_blocks import Arrays, fill_arrays, join_arrays
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.settings import MergeSettings, ProximitySettings
from grpo_fed.scenario.tables import is_import_path
from grpo_fed.scenario.toml.text import short_toml

RULE_KEYS = {
    "persistence": (),
    "huber": ("threshold", "blocks", "refit"),
    "trimmed-mean": ("fraction", "mix"),
    "krum": ("byzantine", "keep", "mix"),
    "multi-krum": ("byzantine", "mix"),
    "centred-clipping": ("radius", "mix"),
}
"""The keys of `MergeSettings` that each rule reads; other rules of ours read `mix` alone."""
REFUSED_RULES = {
    "fisher": "the clients of an app send no Fisher information",
    "clusters": "the model of an app is one, and clusters have several",
}


@dataclass(frozen=True, eq=False)
class ArraysReply:
    """What a client sent back."""

    arrays: Arrays
    """All arrays of its model."""
    point: Tensor
    """[S]: the shared ones among them."""
    weight: float
    """Its weight in a mean, 0 or more."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """The whole of a step that a client is to measure: its model before, and after it."""

    before: Arrays
    after: Arrays


MeasureArrays: TypeAlias = Callable[[Mapping[str, Candidate], Sequence[StepFractions]], Mapping[str, Sequence[float]]]
"""Asks clients for the KL [M] of M fractions of their steps, [B] each; returns those of the clients that answer."""


@dataclass(frozen=True, eq=False)
class ArraysMerge:
    """What a merge came to."""

    step: AcceptedStep
    """How far each block went."""
    kl: Mapping[str, float] = field(default_factory=dict)
    """The KL of the step as each client measured it."""
    findings: Findings = field(default_factory=Findings)
    """With the rule `persistence`, the evidence, and what clients left."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""


@final
class BlockServer:
    """Holds the shared model of an app, and every client's own copy of what it does not share.

    A client's own copy is what it sent last: the arrays that are in no block, and the groups that it has left.
    """

    def __init__(
        self, shared_blocks: SharedBlocks, arrays: Arrays, merge: MergeSettings, proximity: ProximitySettings
    ) -> None:
        """Begin with an app's initial arrays; ValueError for settings that do not fit them."""
        check_merge_settings(merge)
        check_rule(merge, shared_blocks)
        self.shared_blocks = shared_blocks
        self.arrays: Arrays = dict(arrays)
        """The shared model; arrays that are in no block stay as they began."""
        self.departed: dict[str, tuple[int, ...]] = {}
        """The parameter groups that each client has left."""
        self._own: dict[str, ArraysReply] = {}
        """What each client sent last."""
        self._proximity, self._budgets = proximity, block_budgets(proximity, shared_blocks)
        self._evidence = Evidence(())
        self._rule = None if merge.rule == "persistence" else bind_rule(merge)

    def read_reply(self, arrays: Arrays, weight: float) -> ArraysReply:
        """Check what a client sent; ValueError saying what does not fit."""
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"its weight is {weight:g}; a weight is 0 or more")
        if set(arrays) != set(self.arrays):
            other = sorted(set(arrays) ^ set(self.arrays))
            raise ValueError(f"its model has other arrays than the server's: {short_toml(other)}")
        return ArraysReply(dict(arrays), join_arrays(self.shared_blocks.layout, arrays), weight)

    def arrays_of(self, client: str) -> Arrays:
        """Return the model that a client begins with: the shared blocks, and its own copy of the rest."""
        return self._arrays_with(client, self._point)

    def merge(self, replies: Mapping[str, ArraysReply], measure: MeasureArrays) -> ArraysMerge:
        """Move the shared blocks towards the merge of the replies, as far as the budgets allow.

        measure: is called with `proximity.mode = "measured"` alone.
        """
        self._own |= replies
        shared, groups = self._point, self.shared_blocks.groups
        given = Replies.of(Reply(client, reply.point, reply.weight) for client, reply in replies.items())
        findings = Findings()
        if not given.weighted:
            return ArraysMerge(self._no_step())
        if self._rule is None:
            evidence = with_clients(self._evidence, given.clients, groups)
            merged, self._evidence, findings = persistence(given, shared, groups, evidence)
        else:
            merged = self._rule(given, shared, groups)
        self.departed |= _departed(merged)
        weights = {reply.client: reply.weight for reply in given.all}
        target = MergeTarget(merged.point, weights, {}, fisher=torch.ones_like(shared))
        accepted = choose_step(
            self._proximity,
            self._budgets,
            self.shared_blocks,
            [Move(shared, target.point, 1.0)],
            target,
            lambda clients, fractions: measure(self._candidates(clients, target.point), fractions),
        )
        blocks = list(self.shared_blocks.slices.values())
        point = interpolate(shared, target.point, blocks, accepted.accepted.alphas)
        self.arrays = fill_arrays(self.shared_blocks.layout, self.arrays, point)
        return ArraysMerge(accepted.accepted, accepted.kl, findings, (*merged.notes, *accepted.notes))

    @property
    def _point(self) -> Tensor:
        """The shared blocks, [S]."""
        return join_arrays(self.shared_blocks.layout, self.arrays)

    def _candidates(self, clients: Collection[str], point: Tensor) -> dict[str, Candidate]:
        """Make the step of each client to a point [S] of the shared blocks."""
        before = self._point
        return {name: Candidate(self._arrays_with(name, before), self._arrays_with(name, point)) for name in clients}

    def _arrays_with(self, client: str, point: Tensor) -> Arrays:
        """Return a client's model with some point [S] in the place of what it shares."""
        layout, own = self.shared_blocks.layout, self._own.get(client)
        if own is None:
            return fill_arrays(layout, self.arrays, point)
        left = self.shared_blocks.columns_of_groups(self.departed.get(client, ()))
        filled = fill_arrays(layout, own.arrays, torch.where(left, own.point, point))
        return {name: filled[name] for name in self.arrays}

    def _no_step(self) -> AcceptedStep:
        """Make the step of length 0, for a round in which nothing can be merged."""
        rows = (AcceptedBlock(block, 0.0, budget, 1.0, 0.0) for block, budget in self._budgets.items())
        joint = self._proximity.kl_joint
        return AcceptedStep(tuple(rows), 0.0, math.inf if joint is None else joint, 0.0)


def check_merge_settings(settings: MergeSettings) -> None:
    """Refuse a rule, or a key of it, that has no effect on the clients of an app; ValueError with the cure."""
    if settings.rule in REFUSED_RULES:
        raise ValueError(f"rule = {short_toml(settings.rule)}: {REFUSED_RULES[settings.rule]}; use persistence or mean")
    keys = ("kwargs", "mix") if is_import_path(settings.rule) else RULE_KEYS.get(settings.rule, ("mix",))
    if settings.rule == "huber" and "threshold" not in settings.model_fields_set:
        raise ValueError('rule = "huber" needs a threshold: MergeSettings(rule="huber", threshold=...)')
    if idle := sorted(settings.model_fields_set - {"rule", *keys}):
        known = f"; it reads {short_toml(list(keys))}" if keys else ""
        raise ValueError(
            f"rule = {short_toml(settings.rule)}: {short_toml(idle)} has no effect here; leave it out{known}"
        )


def _departed(merged: Merged) -> dict[str, tuple[int, ...]]:
    """Return the groups that each client of a merge is out of."""
    rows = zip(merged.clients, merged.departed, strict=True)
    return {client: tuple(row.nonzero().squeeze(1).tolist()) for client, row in rows}
