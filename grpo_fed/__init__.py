"""Federated multi-task reinforcement learning: policies cut into blocks, shared group by group within a KL budget."""

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.engines.alone import train
    from grpo_fed.engines.start import resume, run
    from grpo_fed.reports.comparison.compare import compare
    from grpo_fed.runs.policies import load_policy
    from grpo_fed.scenario.scenario import Scenario

__all__ = ["Scenario", "compare", "load_policy", "resume", "run", "train"]

MODULES = {
    "Scenario": "grpo_fed.scenario.scenario",
    "compare": "grpo_fed.reports.comparison.compare",
    "load_policy": "grpo_fed.runs.policies",
    "resume": "grpo_fed.engines.start",
    "run": "grpo_fed.engines.start",
    "train": "grpo_fed.engines.alone",
}


__getattr__ = lazy_getattr(__name__, MODULES)
