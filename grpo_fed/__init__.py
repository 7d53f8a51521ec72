"""Federated multi-task reinforcement learning: policies cut into blocks, shared group by group within a KL budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fed.saved import load_policy
    from grpo_fed.scenario import Scenario
    from grpo_fed.training import resume, train

__all__ = ["Scenario", "load_policy", "resume", "train"]

HOMES = {
    "Scenario": "grpo_fed.scenario",
    "load_policy": "grpo_fed.saved",
    "resume": "grpo_fed.training",
    "train": "grpo_fed.training",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import grpo_fed` alone takes no time."""
    if name not in HOMES:
        raise AttributeError(f"module 'grpo_fed' has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)
