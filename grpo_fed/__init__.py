"""Federated multi-task reinforcement learning: policies cut into blocks, shared group by group within a KL budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fed.comparison import compare
    from grpo_fed.engines.choice import resume, run
    from grpo_fed.saved import load_policy
    from grpo_fed.scenario import Scenario
    from grpo_fed.training import train

__all__ = ["Scenario", "compare", "load_policy", "resume", "run", "train"]

HOMES = {
    "Scenario": "grpo_fed.scenario",
    "compare": "grpo_fed.comparison",
    "load_policy": "grpo_fed.saved",
    "resume": "grpo_fed.engines.choice",
    "run": "grpo_fed.engines.choice",
    "train": "grpo_fed.training",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import grpo_fed` alone takes no time."""
    if name not in HOMES:
        raise AttributeError(f"module 'grpo_fed' has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)
