"""The server's state between two rounds: the next round follows from it and from the clients' states alone."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge.clustering import LABELS, ClusterEvidence, no_cluster_evidence
from grpo_fed.aggregation.merge.evidence import Evidence, no_evidence
from grpo_fed.aggregation.merge.rules import RULES_WITH_EVIDENCE
from grpo_fed.aggregation.proximity.records import AcceptedStep
from grpo_fed.aggregation.server_optimiser import OptimiserState
from grpo_fed.federation.messages import Start
from grpo_fed.federation.private_merge import PrivacyState
from grpo_fed.federation.state_store import MOST_ANSWERS
from grpo_fed.federation.steering import first_states
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.scenario.scenario import Scenario

EVIDENCE = "evidence:"
"""In a checkpoint, the prefix of the arrays of a merge rule that remembers rounds."""
OPTIMISER = "optimiser:"
"""In a checkpoint, the prefix of the arrays of the server's optimiser."""
CLIENT = "client:"
"""In a checkpoint, the prefix of the shared blocks of one client's clusters; no parameter's name has a colon."""

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A federation's name, which clients make a folder of."""


@dataclass(frozen=True)
class SavedServerState:
    """Holds the part of the server's state that a checkpoint has as JSON; its arrays are in `shared.safetensors`."""

    name: str
    departed: dict[str, tuple[int, ...]]
    clusters: dict[str, tuple[int, ...]]
    trained: dict[str, int]
    budgets: dict[str, float]
    last_step: AcceptedStep | None
    curricula: dict[str, tuple[float, ...]] = field(default_factory=dict)
    privacy: PrivacyState | None = None


@dataclass(eq=False)
class ServerState:
    """Holds the server's state: S shared parameters in B blocks, as the numpy arrays that messages carry."""

    name: str
    """Names the federation, for clients that remember several."""
    shared: np.ndarray
    """[S] float32: the shared blocks."""
    budgets: dict[str, float]
    """Each block's KL budget for the next step."""
    round: int = 0
    """The last round that was trained."""
    cluster_points: dict[str, np.ndarray] = field(default_factory=dict)
    """[S] float32: with the merge rule `clusters`, the shared blocks of each client that was merged into a cluster."""
    departed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The parameter groups that each client has left."""
    clusters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """[B]: with the merge rule `clusters`, the cluster in every block of each client of the latest merge; 0 is the one
    with the greatest weight."""
    trained: dict[str, int] = field(default_factory=dict)
    """The last round that each client has answered for; its state of that round is the one that is evaluated."""
    last_step: AcceptedStep | None = None
    """The last round's step; None if it had none."""
    curricula: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The state of each curriculum that the server steers, by the name of the clients' entry."""
    privacy: PrivacyState | None = None
    """With a privacy budget, what was spent of it, and the bounds of differences."""
    evidence: Evidence | ClusterEvidence | None = None
    """What the merge rules `persistence` and `clusters` know of the clients' updates; None with other rules."""

    optimiser: OptimiserState | None = None
    """What the server's optimiser remembers; None for one that remembers nothing."""

    @classmethod
    def initial(cls, scenario: Scenario, shared_blocks: SharedBlocks, budgets: Mapping[str, float]) -> ServerState:
        """Make the state before the first round, with a new name."""
        return cls(
            f"{scenario.name}-{uuid.uuid4().hex[:12]}",
            shared_blocks.initial.numpy(),
            dict(budgets),
            evidence=first_evidence(scenario.merge.rule, shared_blocks),
            optimiser=OptimiserState.first(scenario.merge, shared_blocks.size),
            curricula=first_states(scenario),
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        shared_blocks: SharedBlocks,
        saved: SavedServerState | None = None,
        prefix: str = "",
    ) -> ServerState:
        """Read the state from a checkpoint; ValueError if it does not fit the scenario's shared blocks.

        saved: the part of the checkpoint that is JSON, by default that of the federation's server. prefix: what the
        names of its arrays begin with.
        """
        if checkpoint.shared is None:
            raise ValueError(
                f"{checkpoint.folder}: is of a run without federation; `grpo-fed train --resume` goes on with it"
            )
        arrays = {
            name.removeprefix(prefix): array for name, array in checkpoint.shared.items() if name.startswith(prefix)
        }
        saved = checkpoint.part("server", SavedServerState) if saved is None else saved
        flat = {name: array.reshape(-1) for name, array in arrays.items()}
        points = {name.removeprefix(CLIENT): array for name, array in flat.items() if name.startswith(CLIENT)}
        sizes = {slot.name: slot.size for slot in shared_blocks.layout.slots}
        problems = [
            *(f"no {name}" for name in sizes if name not in flat),
            *_vector_problems({name: flat[name] for name in sizes if name in flat}, sizes),
            *_vector_problems(points, dict.fromkeys(points, shared_blocks.size)),
            *_vector_problems(moments := _moments(flat), dict.fromkeys(moments, shared_blocks.size)),
            *_table_problems(saved, checkpoint.round, points, shared_blocks),
        ]
        if problems:
            raise ValueError(f"{checkpoint.folder}: its state does not fit the scenario: {problems[0]}")
        return cls(
            **vars(saved),
            round=checkpoint.round,
            shared=np.concatenate([np.zeros(0, np.float32), *(flat[name] for name in sizes)]),
            evidence=read_evidence(checkpoint, arrays, shared_blocks),
            cluster_points=points,
            optimiser=_read_optimiser(flat, shared_blocks.size),
        )

    def to_json(self) -> SavedServerState:
        """Make the part that a checkpoint holds as JSON."""
        saved = (field.name for field in fields(SavedServerState))
        return SavedServerState(**{name: getattr(self, name) for name in saved})

    def arrays(self, shared_blocks: SharedBlocks) -> dict[str, np.ndarray]:
        """Name the arrays of a checkpoint: every shared tensor, and the shared blocks of each client in a cluster."""
        return {
            **shared_blocks.layout.views(self.shared),
            **{f"{CLIENT}{name}": point for name, point in self.cluster_points.items()},
            **({} if self.evidence is None else evidence_arrays(self.evidence)),
            **({} if self.optimiser is None else _write_optimiser(self.optimiser)),
        }

    def shared_of(self, client: str) -> Tensor:
        """Return the shared blocks [S] of a client."""
        return torch.from_numpy(self.cluster_points.get(client, self.shared))

    def start(self, client: str, round: int) -> Start:
        """Make a client's start of a round; clients with equal shared blocks get the same array, so that it is encoded
        for the wire once.
        """
        return Start(self.name, round, self.cluster_points.get(client, self.shared), self.departed.get(client, ()))

    def latest(self, client: str) -> Start:
        """Make a client's start with the state of the last round that it answered for."""
        return self.start(client, self.trained.get(client, 0))


def _vector_problems(vectors: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Iterator[str]:
    """Explain what is wrong with vectors of these sizes."""
    for name, vector in vectors.items():
        if vector.dtype != np.float32 or vector.size != sizes[name]:
            yield f"{name} is {vector.size} of {vector.dtype}, not {sizes[name]} of float32"
        elif not np.isfinite(vector).all():
            yield f"{name} is not finite"


def _table_problems(
    saved: SavedServerState, round: int, points: Iterable[str], shared_blocks: SharedBlocks
) -> Iterator[str]:
    """Explain what names or numbers things in a saved state that the federation does not have."""
    if not RUN_NAME.fullmatch(saved.name):
        yield f"its name is {saved.name!r:.100}, of which clients cannot make a folder"
    for client in (*saved.departed, *saved.clusters, *saved.trained, *points):
        if client not in shared_blocks.clients:
            yield f"it has a client {client}"
    if list(saved.budgets) != list(shared_blocks.blocks):
        yield f"it has budgets of {', '.join(saved.budgets) or 'no block'}"
    if not all(budget >= 0 for budget in saved.budgets.values()):
        yield "it has a budget below 0"
    if saved.last_step is not None and [step.block for step in saved.last_step.blocks] != list(shared_blocks.blocks):
        yield "it has a last step of other blocks"
    if not all(0 <= last <= MOST_ANSWERS * round for last in saved.trained.values()):
        yield f"clients have trained oftener than {MOST_ANSWERS} times in each of {round} rounds"
    groups, blocks = len(shared_blocks.groups.names), len(shared_blocks.blocks)
    if not all(list(left) == sorted({*left} & {*range(groups)}) for left in saved.departed.values()):
        yield f"clients have left groups other than the {groups} that there are"
    if not all(len(clusters) == blocks and min(clusters, default=0) >= 0 for clusters in saved.clusters.values()):
        yield f"clients are in clusters of other than {blocks} blocks"


def first_evidence(rule: str, shared_blocks: SharedBlocks) -> Evidence | ClusterEvidence | None:
    """Make a merge rule's evidence before the first round; None for a rule that has none."""
    if rule not in RULES_WITH_EVIDENCE or not shared_blocks.size:
        return None
    make = no_cluster_evidence if rule == "clusters" else no_evidence
    return make(shared_blocks.training_clients, shared_blocks.groups)


def evidence_arrays(evidence: Evidence | ClusterEvidence) -> dict[str, np.ndarray]:
    """Name the arrays of a merge rule's evidence in a checkpoint."""
    return {f"{EVIDENCE}{name}": tensor.numpy() for name, tensor in evidence.arrays().items()}


def _moments(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pick the arrays of the server's optimiser from those of a checkpoint."""
    return {name: array for name, array in arrays.items() if name.startswith(OPTIMISER)}


def _read_optimiser(arrays: Mapping[str, np.ndarray], size: int) -> OptimiserState | None:
    """Read the state of the server's optimiser, if the checkpoint has it."""
    moments = {name.removeprefix(OPTIMISER): torch.from_numpy(array.copy()) for name, array in _moments(arrays).items()}
    if not moments:
        return None
    return OptimiserState(**{name: moments.get(name, torch.zeros(size)) for name in ("mean", "square")})


def _write_optimiser(state: OptimiserState) -> dict[str, np.ndarray]:
    return {f"{OPTIMISER}{name}": tensor.numpy() for name, tensor in state.arrays().items()}


def read_evidence(
    checkpoint: Checkpoint, arrays: Mapping[str, np.ndarray], shared_blocks: SharedBlocks
) -> Evidence | ClusterEvidence | None:
    """Read a merge rule's evidence, if the checkpoint has it; ValueError if it does not fit."""
    if not any(name.startswith(EVIDENCE) for name in arrays):
        return None
    tensors = {
        name.removeprefix(EVIDENCE): torch.from_numpy(np.array(array))
        for name, array in arrays.items()
        if name.startswith(EVIDENCE)
    }
    empty = first_evidence("clusters" if LABELS in tensors else "persistence", shared_blocks)
    try:
        return None if empty is None else empty.with_arrays(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint.folder}: its evidence does not fit the scenario: {error}") from None


def deduplicate(points: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Convert points [S] to arrays, equal points to the same array."""
    known: dict[bytes, np.ndarray] = {}
    return {name: known.setdefault((array := point.numpy()).tobytes(), array) for name, point in points.items()}
