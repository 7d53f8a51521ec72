"""What the server does with the clients' answers: merge them, choose the step, move the shared blocks.

It knows no rounds and no transport, so rounds that wait for all clients and others that do not can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, final

import numpy as np
import torch

from grpo_fed.aggregation.merge.persistence import Findings
from grpo_fed.aggregation.merge.rules import check_rule
from grpo_fed.aggregation.proximity import StepFractions, adapt_budgets, full_step, interpolate
from grpo_fed.aggregation.server_optimiser import OptimiserState, step_towards
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.private_merge import PrivacyState, PrivateMerge, mechanism_of
from grpo_fed.federation.round_merge import MergeTarget, RoundMerge
from grpo_fed.federation.secure_merge import SecureMerge
from grpo_fed.federation.server_state import SavedServerState, ServerState, deduplicate, first_evidence
from grpo_fed.federation.server_step import Move, ServerStep, block_budgets, choose_step, with_measured_kl
from grpo_fed.federation.steering import first_states, states_of_clients, steer
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.scenario.scenario import Scenario

MeasureCandidates: TypeAlias = Callable[
    [Mapping[str, np.ndarray], Sequence[StepFractions]], Mapping[str, Sequence[float]]
]
"""Asks clients for the KL of a candidate step: each client's candidate [S] and the fractions of it to try ([M], B each)
-> the KL [M] of each client that answered."""


class Merge(Protocol):
    """A round's merge, of one server or of a tree of them."""

    def add(self, client: str, trained: Trained, times: float = 1.0) -> None:
        """Add a client's answer, whose weight is multiplied by `times`."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every client that answered; no answer may be added once this was read."""


@dataclass(frozen=True)
class Aggregation:
    """What a merge came to."""

    step: ServerStep
    findings: Findings
    """With the rule `persistence`, what the merge found out about the clients."""
    notes: tuple[str, ...]
    """Messages for a person."""
    site_findings: Findings = field(default_factory=Findings)
    """The same about sites, by their names; empty without sites."""


@final
class Server:
    """Holds the shared blocks, and moves them as the clients' answers say."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        after: Checkpoint | None = None,
        saved: SavedServerState | None = None,
        prefix: str = "",
    ) -> None:
        """Begin with the scenario's initial shared blocks, or with those of a checkpoint.

        saved, prefix: of a server whose state is another part of the checkpoint, that part, and what the names of its
            arrays begin with.

        ValueError for a merge rule or KL budgets that do not fit the shared blocks, or a checkpoint that does not.
        """
        check_rule(scenario.merge, shared_blocks)
        self.scenario, self.shared_blocks = scenario, shared_blocks
        self.initial_budgets = block_budgets(scenario.proximity, shared_blocks)
        self.mechanism = mechanism_of(scenario, shared_blocks)
        if after is None:
            self.state = ServerState.initial(scenario, shared_blocks, self.initial_budgets)
        else:
            self.state = ServerState.from_checkpoint(after, shared_blocks, saved, prefix)
            if not scenario.proximity.adaptive:  # a run that goes on with changed settings may have other ones
                self.state.budgets = dict(self.initial_budgets)
            if type(self.state.evidence) is not type(first_evidence(scenario.merge.rule, shared_blocks)):
                raise ValueError(f"{after.folder}: its evidence is not that of merge.rule = {scenario.merge.rule}")
            sizes = [
                {name: len(each) for name, each in states.items()}
                for states in (self.state.curricula, first_states(scenario))
            ]
            if sizes[0] != sizes[1]:
                raise ValueError(f"{after.folder}: is of a run whose server steers other curricula")
            first = OptimiserState.first(scenario.merge, shared_blocks.size)
            if type(self.state.optimiser) is not type(first):
                raise ValueError(f"{after.folder}: is not of a run with merge.optimiser = {scenario.merge.optimiser}")
        self.state.privacy = self._privacy_state(after)

    def _privacy_state(self, after: Checkpoint | None) -> PrivacyState | None:
        """Return what is known of privacy before the next round; ValueError if earlier rounds were without it."""
        mechanism, state = self.mechanism, self.state.privacy
        if mechanism is None:
            return None
        if after is None or (state is None and self.state.round == 0):
            return PrivacyState.first(mechanism)
        if state is None:
            raise ValueError(
                f"{after.folder}: its {self.state.round} rounds were without privacy, so no privacy.epsilon holds for"
                " what follows; begin anew, or leave privacy.epsilon out"
            )
        if len(state.bounds) != len(mechanism.bounds):
            raise ValueError(f"{after.folder}: its state does not fit the scenario: it has {len(state.bounds)} bounds")
        if np.isinf(mechanism.of_counts):  # a run that goes on with changed settings may have other ones
            state = replace(state, bounds=tuple(mechanism.bounds.tolist()))
        # the round after the checkpoint may have been merged before, with noise that nobody can draw again
        return state.after_merge(mechanism) if self.scenario.privacy.source == "system" else state

    def state_of(self, client: str) -> ServerState:
        """Return the state by which a client begins: that of the only server."""
        return self.state

    @property
    def asked(self) -> Mapping[str, tuple[int, ...]]:
        """The groups in which clients are to compare their own parameters with the shared ones."""
        return {} if self.state.evidence is None else self.state.evidence.asked

    def parts(self) -> dict[str, Any]:
        """Make the parts of a checkpoint that are JSON."""
        return {"server": self.state.to_json()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Name the arrays of a checkpoint."""
        return self.state.arrays(self.shared_blocks)

    def begin_merge(self) -> RoundMerge | PrivateMerge | SecureMerge:
        """Start a merge that answers are added to as they arrive."""
        if self.scenario.privacy.secure and self.shared_blocks.size:
            return SecureMerge(self.scenario, self.shared_blocks, self.state.shared, self._begin_private_merge())
        return self._begin_private_merge() or self.begin_open_merge()

    def _begin_private_merge(self) -> PrivateMerge | None:
        """Start a merge with a privacy budget; None without one."""
        state, mechanism = self.state, self.mechanism
        if mechanism is None or state.privacy is None:
            return None
        if mechanism.is_local:
            state.privacy = state.privacy.after_merge(mechanism)
        return PrivateMerge(mechanism, state.privacy, state.shared, self.scenario, state.round + 1)

    def begin_open_merge(self) -> RoundMerge:
        """Start a merge without privacy."""
        return RoundMerge(self.scenario, self.shared_blocks, self.state.evidence, self.state.shared_of)

    def aggregate(self, merge: Merge, measure: MeasureCandidates, length: float = 1.0) -> Aggregation:
        """Move the shared blocks towards the merge's target within the KL budgets: s <- s + alpha (s* - s).

        length: the part of the way from the shared blocks to the merge at which the target s* is.
        """
        assert isinstance(merge, RoundMerge | PrivateMerge | SecureMerge), "one server has one merge"
        state, shared = self.state, torch.from_numpy(self.state.shared)
        target = self.decide(merge.target(shared).shortened(state.shared_of, shared, length))
        step = self._choose_step(target, measure)
        self._move(target, step.accepted.alphas)
        state.last_step = step.accepted
        return Aggregation(step, target.findings, (*target.notes, *step.notes))

    def decide(self, target: MergeTarget) -> MergeTarget:
        """Note who has left what, and return the target of the server's optimiser."""
        state, target = self.state, self._optimise(target)
        state.departed |= target.departed
        state.clusters = dict(target.clusters) or state.clusters
        state.evidence = target.evidence if target.evidence is not None else state.evidence
        state.privacy = target.privacy or state.privacy
        return target

    @property
    def privacy(self) -> PrivacyCost | None:
        """What was spent so far of the privacy budget; None without one."""
        state, mechanism = self.state.privacy, self.mechanism
        if state is None or mechanism is None:
            return None
        return PrivacyCost(
            epsilon=mechanism.epsilon(state.spent),
            delta=mechanism.delta,
            budget=mechanism.budget,
            merges=sum(each.merges for each in state.spent),
            noise=self.scenario.privacy.noise,
            price=mechanism.price_of(state.bounds),
            bounds=mechanism.bounds_of_blocks(state.bounds),
            is_spent=not mechanism.allows(state.after_merge(mechanism).spent),
        )

    def skip_merge(self) -> None:
        """Leave the shared blocks as they are, since too few clients answered."""
        self.state.last_step = None

    def observe_last_step(self, replies: Mapping[str, Trained], merge: Merge) -> dict[str, float]:
        """Learn from the answers how the last step turned out, and adapt the budgets if the scenario says so.

        Return its KL as clients measured it afterwards, `joint` and for each block; empty if none did.
        """
        state, settings = self.state, self.scenario.proximity
        if state.last_step is None:
            return {}
        measured = with_measured_kl(state.last_step, replies, merge.weights, settings.over)
        if settings.adaptive:
            gains = [reply.gain / reply.spread for reply in replies.values() if reply.spread > 0]
            state.budgets = adapt_budgets(state.budgets, self.initial_budgets, measured or state.last_step, gains)
        if measured is None:
            return {}
        kl = {"joint": measured.joint, **{block.block: block.kl for block in measured.blocks}}
        return {name: value for name, value in kl.items() if value is not None}

    @property
    def curricula(self) -> Mapping[str, tuple[float, ...]]:
        """The state of the curriculum of each client that the server steers."""
        return states_of_clients(self.scenario, self.state.curricula)

    def steer(self, replies: Mapping[str, Trained]) -> None:
        """Move the levels of the clients that the server steers, by their returns in a round."""
        self.state.curricula = steer(self.scenario, self.state.curricula, replies)

    def _optimise(self, target: MergeTarget) -> MergeTarget:
        """Let the server's optimiser make another target of the merge's; a group that no client shares stays."""
        state, settings, groups = self.state, self.scenario.merge, self.shared_blocks.groups.names
        if (settings.optimiser, settings.rate) == ("sgd", 1.0) or not self.shared_blocks.size:
            return target
        departed = {name: {*target.departed.get(name, ())} for name, weight in target.weights.items() if weight}
        shared = [group for group in range(len(groups)) if any(group not in left for left in departed.values())]
        left = {group for name, now in departed.items() for group in now - {*state.departed.get(name, ())}}
        point, state.optimiser = step_towards(
            settings,
            state.optimiser,
            torch.from_numpy(state.shared),
            target.point,
            moving=self.shared_blocks.columns_of_groups(
                range(len(groups)) if target.privacy is not None else shared if target.departed else ()
            ),
            begins_anew=self.shared_blocks.columns_of_groups(sorted(left)),
        )
        return replace(target, point=point)

    def _choose_step(self, target: MergeTarget, measure: MeasureCandidates) -> ServerStep:
        """Choose how far to go: by the server's own arithmetic, or by asking the clients that answered."""
        if not self.shared_blocks.size:
            return ServerStep(full_step(()))
        common, of_client = target.point.numpy(), deduplicate(target.points)
        moves = [
            Move(self.state.shared_of(client), point, target.weights[client]) for client, point in target.points.items()
        ]

        def measure_clients(
            clients: Sequence[str], fractions: Sequence[StepFractions]
        ) -> Mapping[str, Sequence[float]]:
            return measure({client: of_client.get(client, common) for client in clients}, fractions)

        return choose_step(
            self.scenario.proximity,
            self.state.budgets,
            self.shared_blocks,
            moves or [Move(torch.from_numpy(self.state.shared), target.point, 1.0)],
            target,
            measure_clients,
        )

    def _move(self, target: MergeTarget, alphas: StepFractions) -> None:
        """Move the shared blocks, and for clients in clusters their cluster's."""
        blocks, state = list(self.shared_blocks.slices.values()), self.state
        moved = {
            client: interpolate(state.shared_of(client), point, blocks, alphas)
            for client, point in {**target.points, **target.absent}.items()
        }
        state.cluster_points = deduplicate({client: state.shared_of(client) for client in state.cluster_points} | moved)
        state.shared = interpolate(torch.from_numpy(state.shared), target.point, blocks, alphas).numpy()
