"""The policies with which clients begin a run.

K clients, P parameters of one policy, S columns that clients share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.policy.start_values import StartValues, read_client_start, read_server_start
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.rng import client_seed
from grpo_fed.scenario.scenario import Scenario


def first_parameters(policy: Policy, scenario: Scenario, seeds: Sequence[int]) -> Tensor:
    """The parameters that clients with these seeds begin with, [K, P]; all the same with `policy.same_start`."""
    starts = [scenario.seed if scenario.policy.same_start else seed for seed in seeds]
    initial = {start: policy.initial(start) for start in dict.fromkeys(starts)}
    return torch.stack([initial[start] for start in starts])


def first_parameters_in_federation(
    policy: Policy, scenario: Scenario, clients: Sequence[str], shared: Tensor
) -> Tensor:
    """The parameters with which these clients begin a run with a server, [K, P].

    The shared ones are the server's. A second, personal policy begins where its client's first one does.
    shared: [S] int64, the columns that clients share.
    """
    first = first_parameters(policy, scenario, [client_seed(scenario.seed, name) for name in clients])
    columns, common = shared.cpu(), policy.initial(scenario.seed)
    start = read_server_start(scenario) if len(columns) else None
    first = place_starts(policy, first, client_starts(scenario, clients, policy, columns))
    first[:, columns] = (common if start is None else start.place(policy.layout, common))[columns]
    return first


def client_starts(
    scenario: Scenario, clients: Sequence[str], policy: Policy, shared: Tensor | None = None
) -> list[StartValues | None]:
    """Read what these clients' policies begin with, where the scenario names a file.

    shared: [S] int64, the columns whose values a server gives; a client with no others, and no moments, reads nothing.
    ValueError for files that are missing, or do not fit `normalise.observations`.
    """
    if shared is not None and len(shared) == policy.layout.size and not scenario.normalise.observations:
        return [None] * len(clients)
    starts = [read_client_start(scenario, client) for client in clients]
    for start in starts:
        if start is not None and start.moments and not scenario.normalise.observations:
            raise ValueError(
                f"{start.source}: this policy acts on normalised observations: set normalise.observations = true"
            )
    return starts


def place_starts(policy: Policy, first: Tensor, starts: Sequence[StartValues | None]) -> Tensor:
    """Put what policies begin with in place of their first parameters [K, P], which may be changed."""
    for row, start in enumerate(starts):
        if start is not None:
            first[row] = start.place(policy.layout, first[row])
    return first


def load_first_moments(normaliser: ObservationNormaliser | None, starts: Mapping[int, StartValues | None]) -> None:
    """Let a normaliser begin with the moments of its clients' starts, by row; ValueError if they do not fit."""
    for row, start in starts.items():
        if normaliser is None or start is None or not start.moments:
            continue
        try:
            normaliser.load(row, dict(start.moments))
        except ValueError as error:
            raise ValueError(f"{start.source}: {error}") from error


def refers_to_start(scenario: Scenario) -> bool:
    """Whether the KL to the policies that the run began with is penalised."""
    return scenario.trust.reference == "start" and scenario.trust.region in ("penalty", "adaptive")
