"""A short run of clients with prompts: one that learns to sort, and one whose rewards are always equal."""

from __future__ import annotations

from grpo_fed.scenario.scenario import Scenario

TEXT = """
name = "letters"
rounds = 2
steps = 16
seed = 1
device = "cpu"
language = { model = "tiny", rank = 2, length = 6, show = 2 }
rollout = { num_envs = 8 }
group = { size = 4 }
objective = { preset = "dr-grpo", epochs = 1 }
evaluate = { episodes = 4 }
proximity = { states = 8 }

[[clients]]
name = "up"
prompts = "grpo_fed.tasks.letters:ascending"
rewards = [{ function = "exact" }, { function = "length", kwargs = { target = 4, most = 6 } }]

[[clients]]
name = "flat"
prompts = "grpo_fed.tasks.letters:descending"
rewards = [{ function = "pattern", kwargs = { pattern = "never" } }]
"""


def letters(*overrides: str) -> Scenario:
    """Make the scenario: two clients, two rounds of two batches of two prompts, about a second of training."""
    return Scenario.loads(TEXT, overrides=overrides)
