"""How much of the server's step is made: within a KL budget for each shared block and one for the whole policy.

A merge says where the shared blocks s should go, s*. Block b goes alpha_b of its way: s_b + alpha_b (s*_b - s_b), a
trust region (1502.05477) of its own. `off` makes the whole step, `quadratic` trusts a diagonal Fisher matrix, and a
`Search` trusts nothing but what clients measure.
"""

from __future__ import annotations

from grpo_fed.aggregation.proximity.adaptive import adapt_budgets
from grpo_fed.aggregation.proximity.measured import BudgetSearch, Query
from grpo_fed.aggregation.proximity.quadratic import predicted_step
from grpo_fed.aggregation.proximity.records import (
    AcceptedBlock,
    AcceptedStep,
    Budgets,
    StepFractions,
    full_step,
    interpolate,
)

__all__ = [
    "AcceptedBlock",
    "AcceptedStep",
    "BudgetSearch",
    "Budgets",
    "Query",
    "StepFractions",
    "adapt_budgets",
    "full_step",
    "interpolate",
    "predicted_step",
]
