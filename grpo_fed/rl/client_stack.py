"""Clients as rows of the same tensors: what an update changes, and the chunks of rows that it works on.

K clients, P parameters of one policy, C action components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy, StackedPolicy
from grpo_fed.policy.blocks import Block, Slot
from grpo_fed.policy.groups import Groups, cut_groups
from grpo_fed.rl.adam import Adam
from grpo_fed.rl.cost_critic import CostCritic
from grpo_fed.rl.entropy_target import EntropyTargets, refuse_unreachable
from grpo_fed.rl.trust_region import trust_budgets
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.task import Task

ENTROPY_WEIGHTS, COST_MULTIPLIER = "entropy", "cost_multiplier"
COST_CRITIC = tuple(f"cost_critic.{part}" for part in ("parameters", "mean", "square", "count"))
BEGINS_LATE = frozenset({ENTROPY_WEIGHTS, COST_MULTIPLIER, *COST_CRITIC})
"""Names in a client's state of what constraints adapt. A state of a run without the constraint has none, and a run that
goes on from it with the constraint begins there."""


@dataclass(frozen=True)
class ClientTensors:
    """What updates change of K clients. Every array changes in place, so that slices of it are the same memory."""

    parameters: Tensor
    """[K, P]."""
    anchor: Tensor
    """[K, P]: the point that penalties and KL are measured from."""
    adam: Adam
    phase_counts: np.ndarray
    """[K, 2] float64: steps of Adam on the private and on the shared blocks, with `personal.first`; else [K, 0]."""
    phase_optimisers: tuple[Adam, ...]
    """Adam on the private and on the shared blocks, with the moments of `adam`; empty without `personal.first`."""
    kl_coefficient: Tensor
    """[K]."""
    kl_limit: Tensor
    """[K]."""
    entropy: Tensor
    """[K, C]: weights of the action components' entropies."""
    cost_multiplier: Tensor
    """[K]: the price of costs."""
    proximal_weight: Tensor | None
    """[P]: see `ClientStack.proximal_weight`."""
    frozen: Tensor | None = None
    """[F] int64: the columns of the parameters that do not learn; None without any."""
    drift: Tensor | None = None
    """[K, P]: what is added after each step of Adam, with `merge.correct_drift`."""

    @classmethod
    def start(
        cls,
        parameters: Tensor,
        scenario: Scenario,
        shared: Tensor,
        proximal_weight: float,
        entropy: Tensor,
        frozen: Sequence[Slot] = (),
    ) -> ClientTensors:
        """The beginning of a run from parameters [K, P], which are used without a copy.

        entropy: [K, C], the first weights of the entropies.

        shared: [S] int64, the columns of the parameters that clients share.
        proximal_weight: how strongly these are pulled to the anchor.
        frozen: the tensors that do not learn.
        """
        settings, device = scenario.trust, parameters.device
        clients, size = parameters.shape
        adam = Adam.start(clients, size, scenario.objective.adam_epsilon, device)
        is_shared = torch.zeros(size, dtype=torch.bool).index_fill_(0, shared.cpu(), True).to(device)
        phases = (~is_shared, is_shared) if scenario.personal.first else ()
        counts = np.zeros((clients, len(phases)))
        return cls(
            parameters=parameters,
            anchor=parameters.clone(),
            adam=adam,
            phase_counts=counts,
            phase_optimisers=tuple(
                replace(adam.for_columns(columns.nonzero().squeeze(1)), count=counts[:, phase : phase + 1])
                for phase, columns in enumerate(phases)
            ),
            kl_coefficient=torch.full((clients,), settings.coefficient, device=device),
            kl_limit=torch.full((clients,), settings.target, device=device),
            entropy=entropy.to(device),
            cost_multiplier=torch.zeros(clients, device=device),
            proximal_weight=is_shared * proximal_weight if proximal_weight else None,
            frozen=torch.cat([torch.arange(slot.start, slot.stop) for slot in frozen]).to(device) if frozen else None,
            drift=torch.zeros_like(parameters) if scenario.merge.correct_drift else None,
        )


@dataclass(frozen=True, kw_only=True)
class ParameterStack:
    """The parameters of some clients as one computation, whatever their policies are: rows without a copy."""

    scenario: Scenario
    rows: slice
    """The clients' rows in the learner."""
    seeds: Sequence[int]
    parameters: Tensor
    """[K, P]: changed in place."""
    gradient: Tensor
    """[K, P]: gradient of the loss, written by every backward pass."""
    anchor: Tensor
    """[K, P]: the point that penalties and KL are measured from."""
    adam: Adam
    learning_rate: np.ndarray
    """[K, 1]."""
    entropy: Tensor
    """[K, C]: weights of the action components' entropies; adapts in place where there is a target."""
    penalty: Tensor
    """[K, 1]: weight of the group penalty."""
    kl_coefficient: Tensor
    """[K]: adapts in place."""
    kl_limit: Tensor
    """[K]: adapts in place."""
    groups: Groups
    """The parameters' groups in the penalty."""
    budgets: Sequence[tuple[Block, float]]
    """KL budgets of blocks."""
    entropy_targets: EntropyTargets | None = None
    """The groups of action components whose entropy has a target; None without any."""
    cost_multiplier: Tensor | None = None
    """[K]: the price of costs; adapts in place. None where costs have no limit."""
    proximal_weight: Tensor | None = None
    """[P]: strength w of the pull 1/2 w (x - anchor)^2 on each parameter; None without any."""
    frozen: Tensor | None = None
    """[F] int64: the columns of the parameters that do not learn; None without any."""
    drift: Tensor | None = None
    """[K, P]: what is added to the parameters after each step of Adam; None for nothing."""
    first: Tensor | None = None
    """[K, P]: the parameters that the run began with, where the KL is measured to them; else None."""
    phase_optimisers: tuple[Adam, ...] = ()
    """Where private blocks learn before shared ones (2102.07078): Adam for either, on the same moments."""

    @cached_property
    def penalises(self) -> bool:
        """Whether any client has a group penalty."""
        settings = self.scenario.penalty
        return bool(self.penalty.any() or settings.l1 or settings.outer)


@dataclass(frozen=True, kw_only=True)
class ClientStack(ParameterStack):
    """Some clients of a stacked learner, with the policy that their parameters belong to."""

    policy: StackedPolicy
    views: Mapping[str, Tensor]
    """The parameters' memory by name, [K, *shape] each, in the layout's order."""
    gradient_views: Mapping[str, Tensor]
    """The gradient's memory by name."""
    cost_critic: CostCritic | None = None
    """What gives advantages of costs; None where these have no limit, or without a critic."""

    @cached_property
    def critic_proximal_weight(self) -> Tensor | None:
        """[P]: `proximal_weight` on parameters that only the critic uses, 0 elsewhere."""
        if self.proximal_weight is None:
            return None
        names = self.policy.actor_parameters()
        of_critic = [torch.full((slot.size,), float(slot.name not in names)) for slot in self.policy.layout.slots]
        return self.proximal_weight * torch.cat(of_critic).to(self.proximal_weight.device)


@dataclass(frozen=True)
class PenaltyGroups:
    """How a policy's parameters are grouped in the penalty, and which blocks have a KL budget of their own."""

    groups: Groups
    budgets: Sequence[tuple[Block, float]]

    @classmethod
    def resolve(cls, policy: Policy, scenario: Scenario, device: torch.device) -> PenaltyGroups:
        """ValueError where a pattern of the scenario fits none of the policy's blocks."""
        layout = policy.layout
        penalised = [block for block in layout.select(scenario.penalty.blocks, "penalty.blocks") if not block.frozen]
        groups = cut_groups(layout, scenario.policy.groups, only=penalised).to(device)
        return cls(groups, trust_budgets(layout, scenario.trust.blocks))


def make_client_stack(
    policy: StackedPolicy,
    scenario: Scenario,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    tensors: ClientTensors,
    groups: PenaltyGroups,
    rows: slice,
    first: Tensor | None = None,
    cost_critic: CostCritic | None = None,
) -> ClientStack:
    """A stack of the clients in these rows; tasks, seeds and first parameters are those of all clients."""
    if scenario.objective.step == "natural" and policy.actor_parameters() <= {s.name for s in policy.layout.frozen}:
        text = 'policy.freeze leaves no parameter of the policy to objective.step = "natural"; narrow its patterns'
        raise ValueError(f"client {tasks[0].client}: {text}")
    own = _parameter_fields(scenario, tasks, seeds, tensors, groups, rows)
    return ClientStack(
        **own,
        policy=policy,
        views=policy.layout.views(own["parameters"]),
        gradient_views=policy.layout.views(own["gradient"]),
        first=None if first is None else first[rows],
        cost_critic=None if cost_critic is None else cost_critic.rows(rows),
    )


def make_parameter_stack(
    scenario: Scenario, tasks: Sequence[Task], seeds: Sequence[int], tensors: ClientTensors, groups: PenaltyGroups
) -> ParameterStack:
    """A stack of all clients."""
    return ParameterStack(**_parameter_fields(scenario, tasks, seeds, tensors, groups, slice(0, len(tasks))))


def _parameter_fields(
    scenario: Scenario,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    tensors: ClientTensors,
    groups: PenaltyGroups,
    rows: slice,
) -> dict[str, Any]:
    """The fields of a `ParameterStack` for these rows."""
    parameters, tasks = tensors.parameters[rows], tasks[rows]
    return {
        "scenario": scenario,
        "rows": rows,
        "seeds": seeds[rows],
        "parameters": parameters,
        "gradient": torch.zeros_like(parameters),
        "anchor": tensors.anchor[rows],
        "adam": tensors.adam.rows(rows),
        "learning_rate": own_learning_rates(tasks),
        "penalty": torch.tensor([[task.penalty] for task in tasks]).to(parameters.device),
        "kl_coefficient": tensors.kl_coefficient[rows],
        "kl_limit": tensors.kl_limit[rows],
        "entropy": tensors.entropy[rows],
        "cost_multiplier": None if scenario.objective.cost.limit is None else tensors.cost_multiplier[rows],
        "entropy_targets": EntropyTargets.of(scenario.objective, tensors.entropy.shape[1], parameters.device),
        "groups": groups.groups,
        "budgets": groups.budgets,
        "proximal_weight": tensors.proximal_weight,
        "frozen": tensors.frozen,
        "drift": None if tensors.drift is None else tensors.drift[rows],
        "phase_optimisers": tuple(adam.rows(rows) for adam in tensors.phase_optimisers),
    }


def own_learning_rates(tasks: Sequence[Task]) -> np.ndarray:
    """The learning rates of clients as the scenario has them, [K, 1]."""
    return np.array([[task.learning_rate] for task in tasks])


def entropy_weights(tasks: Sequence[Task], components: int, scenario: Scenario) -> Tensor:
    """The weights of the action components' entropies with which clients begin, [K, C].

    components: C, of the clients' actions. ValueError where `objective.entropy_groups` names a component that the
    actions do not have, or where a target cannot be reached.
    """
    settings = scenario.objective
    weights = torch.tensor([[task.entropy] * components for task in tasks])
    for name, members in settings.entropy_groups.items():
        beyond = [member for member in members if not 0 <= member < components]
        if beyond:
            raise ValueError(
                f"client {tasks[0].client}: objective.entropy_groups.{name} = {members}: {tasks[0].description} has"
                f" action components 0 to {components - 1}; leave out {beyond}"
            )
        if name in settings.entropy_weights and not isinstance(settings.entropy_target, float):
            weights[:, members] = settings.entropy_weights[name]
    for task in tasks:
        if isinstance(task, GymTask) and not task.action.reals:
            refuse_unreachable(settings, task.client, task.action.sizes)
    targets = EntropyTargets.of(settings, components, weights.device)
    return weights if targets is None else targets.first_weights(weights)


def token_entropy_weights(tasks: Sequence[Task], scenario: Scenario) -> Tensor:
    """The same for clients with language models, whose actions are tokens, [K, 1]; `entropy_groups` has no effect."""
    weights = torch.tensor([[task.entropy] for task in tasks])
    targets = EntropyTargets.of(scenario.objective, 1, weights.device)
    return weights if targets is None else targets.first_weights(weights)
