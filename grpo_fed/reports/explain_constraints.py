"""What holds a client's learning within bounds, in sentences: targets for entropy, a limit on costs, rollbacks."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_fed.reports.formatting import format_range
from grpo_fed.rl.entropy_target import FIRST
from grpo_fed.scenario.scenario import Scenario


def explain_entropy(scenario: Scenario) -> Iterator[str]:
    """Explain the weights of the entropy, and the targets by which they adapt."""
    objective = scenario.objective
    target = objective.entropy_target
    weights = {objective.entropy if entry.entropy is None else entry.entropy for entry in scenario.clients}
    if isinstance(target, float):
        first = format_range({weight or FIRST for weight in weights})
        yield f"Plus the policy's entropy, times a weight that begins at {first} {_adapting(target)}."
        return
    if weights != {0.0}:
        yield f"Plus {format_range(weights)} times the policy's entropy."
    of_groups = target or {}
    for name, weight in objective.entropy_weights.items():
        if name not in of_groups:
            yield f"The entropy of the actions {name} has the weight {weight:g} instead."
    for name, value in of_groups.items():
        first = format_range({objective.entropy_weights.get(name, weight) or FIRST for weight in weights})
        yield f"The entropy of the actions {name} has a weight that begins at {first} {_adapting(value)}."


def explain_costs(scenario: Scenario) -> Iterator[str]:
    """Explain the limit on costs."""
    cost = scenario.objective.cost
    if cost.limit is None:
        return
    of = "A is that of the return less a price times that of the costs"
    if scenario.objective.advantage == "group":
        of = "what is compared is the return less a price times the costs"
    yield (
        f"Episodes may cost {cost.limit:g} in the mean, the sum of info[{cost.key!r}]: {of}, divided by 1 + the price."
        f" The price begins at 0, and each update adds {cost.rate:g} times what episodes cost above the limit, or less"
        " where they cost less."
    )
    if scenario.objective.advantage == "gae":
        yield "The costs have a critic of their own, which stays with the client."


def explain_rollback(scenario: Scenario) -> Iterator[str]:
    """Explain which updates are taken back."""
    trust = scenario.trust
    if trust.rollback is not None:
        yield (
            f"After an update the policies before and after it play {trust.rollback_episodes} episodes from the same"
            f" start states; if the mean return has fallen by more than {trust.rollback:g}, the update is taken back."
        )


def _adapting(target: float) -> str:
    return f"and rises while it is below {target:g} nats, and falls while it is above"
