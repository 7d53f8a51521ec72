"""Algorithms as data: a preset gives values to the keys that a scenario leaves open, and has no code of its own.

A key that a file or `--set` gives always wins. What no row mentions keeps its default, which is PPO's. None means no
limit, which TOML writes `inf`. A scenario may name a row of the user's own instead, by `module:NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fed.scenario import tables as rows
from grpo_fed.scenario.tables import Values

DEFAULT = "ppo"


@dataclass(frozen=True)
class Preset:
    """One row of the table."""

    name: str
    """In words."""
    paper: str
    """Where it comes from, and whose values these are."""
    values: Values
    when: str = ""
    """When to take it."""


PRESETS: Mapping[str, Preset] = {
    "vpg": Preset(
        "vanilla policy gradient",
        "Sutton et al. 1999, Policy Gradient Methods; gae_lambda as in OpenAI's Spinning Up. One step a batch, so a "
        "larger learning rate: of 1e-3, 3e-3 and 1e-2 the one that did best on CartPole.",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "score",
                "step": "adam",
                "gae_lambda": 0.97,
                "learning_rate": 3e-3,
                "epochs": 1,
                "minibatches": 1,
                "normalise_advantages": "batch",
            },
            "trust": {"region": "none"},
        },
        "To see what all the others add to it.",
    ),
    "a2c": Preset(
        "advantage actor-critic",
        "Mnih et al. 2016, 1602.01783; values of stable-baselines3's A2C, with Adam in place of RMSProp.",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "score",
                "step": "adam",
                "gae_lambda": 1.0,
                "learning_rate": 7e-4,
                "epochs": 1,
                "minibatches": 1,
                "normalise_advantages": "off",
            },
            "rollout": {"horizon": 5},
            "trust": {"region": "none"},
        },
        "Where updates should be cheap and often: every batch is short and learned from once.",
    ),
    "npg": Preset(
        "natural policy gradient",
        "Kakade 2001; the step's length from the KL limit as in Rajeswaran et al. 2017, 1703.02660, without a search.",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "score",
                "step": "natural",
                "learning_rate": 1e-3,
                "minibatches": 8,
                "normalise_advantages": "batch",
                "max_grad_norm": None,
            },
            "trust": {
                "region": "hard",
                "direction": "old-new",
                "reference": "old",
                "target": 0.01,
                "line_search": False,
            },
        },
        "One step of a length in KL for each batch: where a learning rate for the actor is hard to choose.",
    ),
    "trpo": Preset(
        "trust region policy optimisation",
        "Schulman et al. 2015, 1502.05477; values of sb3-contrib's TRPO (critic: 10 passes in minibatches of 128).",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "ratio",
                "step": "natural",
                "learning_rate": 1e-3,
                "minibatches": 8,
                "value_epochs": 10,
                "normalise_advantages": "batch",
                "max_grad_norm": None,
            },
            "trust": {
                "region": "hard",
                "direction": "old-new",
                "reference": "old",
                "target": 0.01,
                "line_search": True,
                "cg_iterations": 15,
                "cg_damping": 0.1,
            },
        },
        "Where no update may spoil the policy: a search holds each within the region. Dearer for each update.",
    ),
    "ppo": Preset(
        "proximal policy optimisation",
        "Schulman et al. 2017, 1707.06347; values of stable-baselines3's PPO (10 epochs in minibatches of 64).",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "clip",
                "step": "adam",
                "gamma": 0.99,
                "gae_lambda": 0.95,
                "learning_rate": 3e-4,
                "epochs": 10,
                "minibatches": 16,
                "clip": 0.2,
                "normalise_advantages": "minibatch",
                "max_grad_norm": 0.5,
            },
            "trust": {"region": "none"},
        },
        "First, and where nothing speaks for another. The default.",
    ),
    "ppo-kl": Preset(
        "PPO with an adaptive KL penalty",
        "Schulman et al. 2017, 1707.06347, section 4: target 0.01, weight from 1, doubled or halved.",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "ratio",
                "step": "adam",
                "epochs": 10,
                "minibatches": 16,
            },
            "trust": {
                "region": "adaptive",
                "direction": "old-new",
                "reference": "old",
                "coefficient": 1.0,
                "target": 0.01,
            },
        },
        "Where the policy's KL should stay near a target, which a clipped ratio does not promise.",
    ),
    "mdpo": Preset(
        "mirror descent policy optimisation",
        "Tomar et al. 2020, 2005.09814: several epochs on ratio A - KL(new, old) / t with t = 1 (held, not annealed).",
        {
            "objective": {
                "advantage": "gae",
                "surrogate": "ratio",
                "step": "adam",
                "epochs": 10,
                "minibatches": 16,
            },
            "trust": {
                "region": "penalty",
                "direction": "new-old",
                "reference": "old",
                "coefficient": 1.0,
            },
        },
        "Several epochs on a batch without a clip: where clipped steps lose too much of it.",
    ),
    "grpo": Preset(
        "group relative policy optimisation",
        "Shao et al. 2024, 2402.03300: KL to the reference weighs 0.04. Epochs and learning rate are ours, for control "
        "tasks (the paper's are a language model's); the whole batch at once did better on CartPole than minibatches.",
        {
            "objective": {
                "advantage": "group",
                "surrogate": "clip",
                "step": "adam",
                "gamma": 1.0,
                "learning_rate": 1e-3,
                "epochs": 4,
                "minibatches": 1,
                "clip": 0.2,
                "normalise_advantages": "off",
                "average": "episode",
            },
            "group": {"score": "zscore"},
            "trust": {
                "region": "penalty",
                "direction": "new-old",
                "reference": "shared",
                "coefficient": 0.04,
            },
        },
        "Where episodes are short or judged only at their end, and a critic has little to learn from.",
    ),
    "dr-grpo": Preset(
        "GRPO done right",
        "Liu et al. 2025, 2503.20783: no division by the group's deviation nor by an episode's length, no KL.",
        {
            "objective": {
                "advantage": "group",
                "surrogate": "clip",
                "step": "adam",
                "gamma": 1.0,
                "learning_rate": 1e-3,
                "epochs": 4,
                "minibatches": 1,
                "clip": 0.2,
                "normalise_advantages": "off",
                "average": "total",
            },
            "group": {"score": "centre"},
            "trust": {"region": "none"},
        },
        "As `grpo`, where long episodes or nearly equal groups get too much or too little say.",
    ),
    "rloo": Preset(
        "REINFORCE, leave one out",
        "Ahmadian et al. 2024, 2402.14740: one step a batch, each return against the mean of the others of its group.",
        {
            "objective": {
                "advantage": "group",
                "surrogate": "score",
                "step": "adam",
                "gamma": 1.0,
                "learning_rate": 3e-3,
                "epochs": 1,
                "minibatches": 1,
                "normalise_advantages": "off",
                "average": "total",
            },
            "group": {"score": "leave-one-out"},
            "trust": {"region": "none"},
        },
        "As `grpo`, with one plain step for each batch and the fewest knobs.",
    ),
}

KEYS_OF_PRESETS = frozenset(
    (section, key) for preset in PRESETS.values() for section, values in preset.values.items() for key in values
)
"""The keys that some preset gives a value to."""


def fill_from_preset(
    data: Mapping[str, Any], is_sound: Callable[[Values], bool] = lambda values: True
) -> dict[str, Any]:
    """A scenario's tables with what its preset says for the keys that they leave open; the rest as it is.

    What is not a table, or no preset, is left for the models to complain about, and so is a preset that is not sound.
    """
    objective = data.get("objective", {})
    if not isinstance(objective, Mapping):
        return dict(data)
    row = rows.find_row_or_none(objective.get("preset", DEFAULT), PRESETS, Preset)
    return dict(data) if row is None or not is_sound(row.values) else rows.fill_missing(data, row.values)
