"""How far the server steps: within a KL budget for each shared block and one for all of them together.

    records.py    Budgets, AcceptedStep and interpolate
    quadratic.py  `quadratic`: the KL is predicted from a diagonal Fisher matrix
    measured.py   `measured`: the KL is measured by clients, in a BudgetSearch
    adaptive.py   budgets that follow the clients' returns

A merge says where the shared blocks s should go, s*. Block b goes a fraction alpha_b of its step, to
s_b + alpha_b (s*_b - s_b): a trust region (1502.05477) of its own. `off` makes the whole step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
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

MODULES = {
    "AcceptedBlock": "grpo_fed.aggregation.proximity.records",
    "AcceptedStep": "grpo_fed.aggregation.proximity.records",
    "BudgetSearch": "grpo_fed.aggregation.proximity.measured",
    "Budgets": "grpo_fed.aggregation.proximity.records",
    "Query": "grpo_fed.aggregation.proximity.measured",
    "StepFractions": "grpo_fed.aggregation.proximity.records",
    "adapt_budgets": "grpo_fed.aggregation.proximity.adaptive",
    "full_step": "grpo_fed.aggregation.proximity.records",
    "interpolate": "grpo_fed.aggregation.proximity.records",
    "predicted_step": "grpo_fed.aggregation.proximity.quadratic",
}

__getattr__ = lazy_getattr(__name__, MODULES)
