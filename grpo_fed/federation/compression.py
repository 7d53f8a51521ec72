"""What a client sends of its difference: with local privacy noised, and in half precision with error feedback (1-bit
SGD, 2014; 1901.09847).

With `wire.dtype = "float16"` a client sends the difference that it has learned as float16. What rounding leaves out it
remembers, and adds to its next difference: so over the rounds nothing is lost, and updates too small for float16 come
through once they add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from grpo_fed.federation.loaded_client import LoadedClient
from grpo_fed.federation.private_merge import add_local_noise
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.rng import client_seed
from grpo_fed.scenario.scenario import Scenario

RESIDUAL = "round.residual"
"""The array of a client's state with what was not sent of its differences, [S]."""
MOST = float(np.finfo(np.float16).max)


def round_difference(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a difference [S] float32 to float16; return it and what it leaves out, which is 0 where that is not finite.

    Numbers beyond float16's are cut, and the rest left for later.
    """
    sent = np.clip(difference, -MOST, MOST).astype(np.float16)
    residual = difference - sent.astype(np.float32)
    return sent, np.where(np.isfinite(residual), residual, np.float32(0.0))


def add_difference(shared: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """Return the point [S] at which a client arrived, of its shared blocks and the difference that it sent."""
    point: np.ndarray = shared + sent.astype(np.float32)
    return point


@dataclass(frozen=True, eq=False)
class Sent:
    """What a client sends of a round, and remembers of it."""

    point: np.ndarray
    """[S] float32: where the server has it arrive."""
    difference: np.ndarray | None = None
    """[S] float16: how far that is from where it began; None where the point itself is sent."""
    owed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The array of its state with what it did not send."""


def prepare_point(scenario: Scenario, shared_blocks: SharedBlocks, client: LoadedClient, point: np.ndarray) -> Sent:
    """Noise what a client has learned, and round it with what it owes from before, if the scenario says so.

    point: [S], where its training ended. About groups that it has left it owes nothing.
    """
    seed = client_seed(scenario.seed, client.name)
    point = add_local_noise(scenario, shared_blocks, seed, client.start, point)
    if scenario.wire.dtype == "float32":
        return Sent(point)
    shared, none = client.start.shared, np.zeros_like(point)
    is_shared = ~shared_blocks.columns_of_groups(client.start.departed).numpy()
    owed = (client.state or {}).get(RESIDUAL, none)
    difference, residual = round_difference(point - shared + np.where(is_shared, owed, none))
    left_out = {RESIDUAL: np.where(is_shared, residual, none)}
    return Sent(add_difference(shared, difference), difference, left_out)
