"""Where a federation stands between two rounds: all that the next one follows from, but for what clients keep."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.proximity import AcceptedStep
from grpo_fed.federation.messages import Start
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.records import kept_of

OWN = "client:"
"""In a checkpoint, before the name of a client with shared blocks of its own; no parameter's name has a colon."""
NOTED = ("name", "departed", "clusters", "trained", "budgets", "last_step")
"""What a checkpoint has of it as JSON."""


@dataclass(eq=False)
class ServerState:
    """S parameters of the shared blocks, as numpy's, since they go through the wire as they are."""

    name: str
    """Of this federation, for clients that remember others."""
    shared: np.ndarray
    """[S] float32."""
    budgets: dict[str, float]
    """KL by block, for the next step."""
    round: int = 0
    """The last that was trained."""
    cluster_points: dict[str, np.ndarray] = field(default_factory=dict)
    """[S] float32: by the rule `clusters`, the shared blocks of each client that was merged into a cluster."""
    departed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The groups that each client has left."""
    clusters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] by the rule `clusters`: of each client of the latest merge its cluster in every block, 0 that of most weight.
    Who was not in it shares with nobody what it has from an earlier one.
    """
    trained: dict[str, int] = field(default_factory=dict)
    """The last round that each client has answered for; its state of then is what plays."""
    last_step: AcceptedStep | None = None
    """What became of the last round's step; None if it had none."""

    @classmethod
    def first(cls, scenario: str, commons: SharedBlocks, budgets: Mapping[str, float]) -> ServerState:
        """Before the first round."""
        return cls(f"{scenario}-{uuid.uuid4().hex[:12]}", commons.initial.numpy(), dict(budgets))

    @classmethod
    def after(cls, checkpoint: Checkpoint, commons: SharedBlocks) -> ServerState:
        """Where a checkpoint was written; ValueError if it does not fit."""
        arrays = checkpoint.shared
        if arrays is None:
            raise ValueError(
                f"{checkpoint.folder}: is of a run without federation; `grpo-fed train --resume` goes on with it"
            )
        flat = {name: array.reshape(-1) for name, array in arrays.items()}
        missing = [slot.name for slot in commons.layout.slots if slot.name not in flat]
        if missing:
            raise ValueError(f"{checkpoint.folder}: its shared blocks do not fit the scenario: no {missing[0]}")
        shared = np.concatenate([np.zeros(0, np.float32), *(flat[slot.name] for slot in commons.layout.slots)])
        noted = dict(checkpoint.counters["position"])
        noted |= {key: {name: tuple(own) for name, own in noted[key].items()} for key in ("departed", "clusters")}
        points = {name.removeprefix(OWN): array for name, array in flat.items() if name.startswith(OWN)}
        return cls(
            **{**noted, "last_step": kept_of(noted["last_step"])},
            round=checkpoint.round,
            shared=shared,
            cluster_points=points,
        )

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint has of it as JSON."""
        return {name: getattr(self, name) for name in NOTED}

    def arrays(self, commons: SharedBlocks) -> dict[str, np.ndarray]:
        """What a checkpoint has of it as arrays: every shared tensor by its name."""
        return {
            **commons.layout.views(self.shared),
            **{f"{OWN}{name}": point for name, point in self.cluster_points.items()},
        }

    def shared_of(self, client: str) -> Tensor:
        """[S]: the shared blocks of a client."""
        return torch.from_numpy(self.cluster_points.get(client, self.shared))

    def start(self, client: str, number: int) -> Start:
        """With the same array for all whose blocks are the same, so that it is written for the wire once."""
        return Start(self.name, number, self.cluster_points.get(client, self.shared), self.departed.get(client, ()))

    def latest(self, client: str) -> Start:
        """With the client's state of the last round that it answered for."""
        return self.start(client, self.trained.get(client, 0))


def deduplicate(points: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Points [S] as arrays, equal ones as the same array."""
    known: dict[bytes, np.ndarray] = {}
    return {name: known.setdefault((array := point.numpy()).tobytes(), array) for name, point in points.items()}
