"""The policies with which clients begin a run.

K clients, P parameters of one policy, S columns that clients share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
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
    columns = shared.cpu()
    first[:, columns] = policy.initial(scenario.seed)[columns]
    return first


def refers_to_start(scenario: Scenario) -> bool:
    """Whether the KL to the policies that the run began with is penalised."""
    return scenario.trust.reference == "start" and scenario.trust.region in ("penalty", "adaptive")
