"""Federated multi-task reinforcement learning: policies cut into blocks, shared group by group within a KL budget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fed.engines.alone import train
    from grpo_fed.engines.start import resume, run
    from grpo_fed.reports.comparison.compare import compare
    from grpo_fed.runs.policies import load_policy
    from grpo_fed.scenario.scenario import Scenario

__all__ = ["Scenario", "compare", "load_policy", "resume", "run", "train"]

HOMES = {
    "Scenario": "grpo_fed.scenario.scenario",
    "compare": "grpo_fed.reports.comparison.compare",
    "load_policy": "grpo_fed.runs.policies",
    "resume": "grpo_fed.engines.start",
    "run": "grpo_fed.engines.start",
    "train": "grpo_fed.engines.alone",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import grpo_fed` alone takes no time."""
    if name not in HOMES:
        raise AttributeError(f"module 'grpo_fed' has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)
