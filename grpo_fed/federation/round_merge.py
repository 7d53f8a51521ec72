"""A round's merge: answers are added as they arrive, and the target of the shared blocks comes out.

A mean keeps one model in memory however many clients there are. The other rules compare clients, so they keep all
answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import (
    ClientWork,
    Merged,
    Replies,
    Reply,
    StreamingFisher,
    StreamingMean,
    client_weight,
)
from grpo_fed.aggregation.merge.averages import normalise_fisher
from grpo_fed.aggregation.merge.clustering import ClusterEvidence, clusters
from grpo_fed.aggregation.merge.evidence import Evidence
from grpo_fed.aggregation.merge.persistence import Asking, Findings, Heard, persistence
from grpo_fed.aggregation.merge.rules import RULES_WITH_EVIDENCE, bind_rule
from grpo_fed.aggregation.merge.zeros import StreamingZeros, keep_zeros, set_to_zero
from grpo_fed.aggregation.outliers import medians_of_others, weighted_median
from grpo_fed.federation.messages import Trained
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario

if TYPE_CHECKING:
    from grpo_fed.federation.private_merge import PrivacyState

MOST_EPISODES = 10.0
"""How many times the others' median number of episodes a client has weight for."""
MOST_FISHER = 100.0
"""How many times the others' median scale a Fisher diagonal may have in the mean that predicts KL."""


@dataclass(frozen=True, eq=False)
class MergeTarget:
    """Holds the point that a merge wants the shared blocks to move to."""

    point: Tensor
    """[S] float32."""
    weights: Mapping[str, float]
    """The weight of every client that answered."""
    departed: Mapping[str, tuple[int, ...]]
    """For every client that answered, the parameter groups that it has left; it shares all others."""
    fisher: Tensor | None = None
    """[S]: the mean Fisher diagonal; None if no client sent one or all weights are 0."""
    points: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each, with the rule `clusters`: the target of every client that answered, instead of `point` for all."""
    absent: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each, with the rule `clusters`: the targets of clients that did not answer, where their clusters did."""
    clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] each: these clients' cluster in every block; 0 is the one with the greatest weight."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""
    evidence: Evidence | ClusterEvidence | None = None
    """With the rules `persistence` and `clusters`, the evidence up to this round."""
    findings: Findings = field(default_factory=Findings)
    """With the rule `persistence`, what this merge found out about the clients."""
    privacy: PrivacyState | None = None
    """With a privacy budget, the state after this merge, whose noise moves every group, even if no client answered."""

    def shortened(self, shared_of: Callable[[str], Tensor], shared: Tensor, length: float) -> MergeTarget:
        """Return the target at a part of the way from the present shared blocks; all of it is the same target."""
        if length >= 1.0:
            return self
        part = partial(torch.lerp, weight=length)
        return replace(
            self,
            point=part(shared, self.point),
            points={client: part(shared_of(client), point) for client, point in self.points.items()},
            absent={client: part(shared_of(client), point) for client, point in self.absent.items()},
        )


@final
class RoundMerge:
    """Collects the answers of a round and merges them."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        evidence: Evidence | ClusterEvidence | None = None,
        start_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Begin a merge.

        evidence: of the rounds before, for the rules `persistence` and `clusters`. start_of: returns the shared blocks
        [S] that a client began with; by default all begin with those that `target` is given.
        """
        self._settings = scenario.merge
        self._groups = shared_blocks.groups
        self._rule = None if scenario.merge.rule in RULES_WITH_EVIDENCE else bind_rule(scenario.merge)
        self._evidence = evidence
        self._start_of = start_of if isinstance(evidence, ClusterEvidence) else None
        """Clients begin with different blocks where they are in clusters."""
        self._streams = scenario.merge.rule in ("mean", "fisher") and not scenario.merge.mix
        """Whether replies are added up as they come, and none is kept."""
        self._shares: dict[str, bool] = {}
        self._low: set[str] = set()
        self._weights: dict[str, float] = {}
        self._held: dict[str, Trained] = {}
        """Answers whose weights depend on those that are still to come."""
        self._times: dict[str, float] = {}
        """What their weights are multiplied by."""
        self._asked = scenario.steps if scenario.objective.advantage == "group" else math.inf
        """The steps that a client has weight for: with whole episodes it may do more, by the length of its episodes."""
        self._predicts = scenario.proximity.mode == "quadratic"
        self._mean = StreamingMean()
        self._by_fisher = StreamingFisher()
        self._fisher = StreamingMean()
        self._even_fisher = StreamingMean()
        """The mean of normalised Fisher diagonals, for rounds in which one is of another scale than the others."""
        self._scales: dict[str, float] = {}
        """The mean of each client's Fisher diagonal."""
        self._replies: list[Reply] = []
        self._penalised = penalised_groups(scenario, shared_blocks)
        self._zeros = StreamingZeros(self._groups)

    def add(self, client: str, trained: Trained, times: float = 1.0) -> None:
        """Add a client's answer, whose weight is multiplied by `times`.

        Answers come in the order of the clients' names, so that sums do not depend on which client is fastest. What
        they claim of their work is bounded: steps by what they were asked for, and with `merge.weights = "episodes"`,
        for which all answers are kept in memory, episodes by those of the others.
        """
        if self._settings.weights == "episodes":
            self._held[client], self._times[client] = trained, times
            return
        steps = int(min(trained.steps, self._asked))
        work = ClientWork(steps, trained.episodes, trained.gain, trained.spread)
        self.add_with_weight(client, trained, times * client_weight(work, self._settings.weights))

    @property
    def weights(self) -> Mapping[str, float]:
        """Each client's weight, in the order of their names; no answer may be added once this was read."""
        held, self._held = self._held, {}
        medians = medians_of_others({client: float(trained.episodes) for client, trained in held.items()})
        for client, trained in held.items():
            episodes = min(float(trained.episodes), MOST_EPISODES * medians[client])
            self.add_with_weight(client, trained, self._times[client] * episodes)
        return self._weights

    def add_with_weight(self, client: str, trained: Trained, share: float) -> None:
        """Add an answer whose weight is known."""
        self._weights[client] = share
        if trained.comparison is not None:
            self._shares[client] = trained.comparison.shares
        if trained.low:
            self._low.add(client)
        if not trained.point.size:
            return
        point = _tensor(trained.point)
        fisher = None if trained.fisher is None else _tensor(trained.fisher)
        if fisher is not None:
            self._fisher.add(fisher, share)
        if fisher is not None and self._predicts and share:
            self._scales[client] = float(fisher.double().mean())
            self._even_fisher.add(normalise_fisher(fisher).float(), share)
        if self._penalised.any() and self._streams:
            self._zeros.add(point, share)
        if self._streams and self._settings.rule == "mean":
            self._mean.add(point, share)
        elif self._streams:
            assert fisher is not None, f"{client} sent no Fisher diagonal"
            self._by_fisher.add(point, share, fisher)
        else:
            start = self._start_of(client) if self._start_of is not None else None
            self._replies.append(Reply(client, point, share, fisher, start))

    def target(self, shared: Tensor) -> MergeTarget:
        """Merge the answers. shared: [S], this round's shared blocks; they are the target if all weights are 0."""
        if not shared.numel() or not any(self.weights.values()):
            return MergeTarget(shared, self.weights, {})
        mean_fisher, fisher_notes = self._mean_fisher()
        no_departures: dict[str, tuple[int, ...]] = dict.fromkeys(self.weights, ())
        if self._streams:
            point = self._mean.result() if self._settings.rule == "mean" else self._by_fisher.result()
            if point is not None and self._penalised.any():
                point = set_to_zero(point, self._zeros.result() & self._penalised, self._groups)
            target = shared if point is None else point
            return MergeTarget(target, self.weights, no_departures, mean_fisher, notes=fisher_notes)
        replies, evidence, findings = Replies.of(self._replies), self._evidence, Findings()
        if self._rule is not None:
            merged = self._rule(replies, shared, self._groups)
        elif isinstance(evidence, ClusterEvidence):
            merged, evidence = clusters(replies, shared, self._groups, evidence, self._settings.most)
        else:
            assert evidence is not None, "rules with evidence are given it"
            asking = Asking(self._settings.confirm == "returns", self._settings.rejoin)
            heard = Heard(self._shares, self._low)
            merged, evidence, findings = persistence(replies, shared, self._groups, evidence, asking, heard)
        if self._penalised.any():
            merged = keep_zeros(merged, replies, self._penalised, self._groups)
        return MergeTarget(
            merged.point,
            self.weights,
            {name: _indices(departed) for name, departed in zip(merged.clients, merged.departed, strict=True)},
            mean_fisher,
            points=_targets(merged),
            absent=merged.absent,
            clusters=_clusters(merged),
            notes=(*merged.notes, *fisher_notes),
            evidence=evidence,
            findings=findings,
        )

    def _mean_fisher(self) -> tuple[Tensor | None, tuple[str, ...]]:
        """Compute the mean Fisher diagonal [S], and name the clients whose diagonals are of another scale.

        With such a client, the mean of the normalised diagonals takes the place of the mean, at the median scale.
        """
        mean = self._fisher.result()
        medians = medians_of_others(self._scales)
        apart = [client for client, scale in self._scales.items() if scale > MOST_FISHER * medians[client]]
        even = self._even_fisher.result()
        if not apart or even is None or 2 * len(apart) >= len(self._scales):
            return mean, ()
        scale = weighted_median([*self._scales.values()], [self._weights[client] for client in self._scales])
        times = {name: self._scales[name] / medians[name] for name in apart}
        return even * scale, tuple(
            f"the Fisher matrix of {name} is {times[name]:.3g} times the others'" for name in times
        )


def penalised_groups(scenario: Scenario, shared_blocks: SharedBlocks) -> Tensor:
    """The shared parameter groups that a penalty moves towards zero, [G] bool."""
    penalty, groups = scenario.penalty, shared_blocks.groups
    weights = [penalty.weight if entry.penalty is None else entry.penalty for entry in scenario.clients]
    if penalty.toward != "zero" or not (any(weights) or penalty.l1 or penalty.outer):
        return torch.zeros(len(groups.names), dtype=torch.bool)
    chosen = {block for block in shared_blocks.blocks if any(fnmatchcase(block, pattern) for pattern in penalty.blocks)}
    return torch.tensor([block in chosen for block in groups.blocks], dtype=torch.bool)


def _tensor(array: np.ndarray) -> Tensor:
    """Make a tensor of an array, in the same memory unless that is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _indices(chosen: Tensor) -> tuple[int, ...]:
    """Return the indices of the true entries of [G] bool."""
    return tuple(chosen.nonzero().squeeze(1).tolist())


def _targets(merged: Merged) -> dict[str, Tensor]:
    """Return each client's target; empty if it is the same for all."""
    if merged.clusters is None:
        return {}
    return {name: merged.clusters.point(index) for index, name in enumerate(merged.clients)}


def _clusters(merged: Merged) -> dict[str, tuple[int, ...]]:
    """Return each client's cluster in every block; empty without clusters."""
    if merged.clusters is None:
        return {}
    return {
        name: tuple(clusters) for name, clusters in zip(merged.clients, merged.clusters.members.tolist(), strict=True)
    }
