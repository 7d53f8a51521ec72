"""Algorithms as data: a preset is a row of values for keys that a scenario does not give, without any code.

A value in the file or from `--set` has precedence over the row. Keys that a row does not mention keep their default,
which is PPO's. None means no limit, which TOML writes `inf`. A scenario may name a row of the user's own instead, by
`module:NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_fed.scenario.tables import Values, fill_missing, find_row_or_none

DEFAULT_PRESET = "ppo"


@dataclass(frozen=True)
class Preset:
    """An algorithm of the client, as a row of the table of presets."""

    name: str
    """The full name, in words."""
    paper: str
    """The source: a paper, and whose values these are."""
    values: Values
    """The values for keys that a scenario does not give."""
    when: str = ""
    """When to use it."""


PRESETS: Mapping[str, Preset] = {
    "vpg": Preset(
        "vanilla policy gradient",
        "Sutton et al. 1999, Policy Gradient Methods; gae_lambda as in OpenAI's Spinning Up. A batch is used for one "
        "step only, so the learning rate is larger: the best of 1e-3, 3e-3 and 1e-2 on CartPole.",
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
        "As the baseline that all others build on.",
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
        "Where updates should be cheap and frequent: each batch is short and used once.",
    ),
    "npg": Preset(
        "natural policy gradient",
        "Kakade 2001; step length from the KL limit as in Rajeswaran et al. 2017, 1703.02660, without a line search.",
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
        "Where a learning rate for the actor is hard to choose: each batch gives one step of fixed length in KL.",
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
        "Where no update may ruin the policy: a line search keeps each within the trust region. Updates cost more.",
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
        "First, and unless you have a reason for another. The default.",
    ),
    "ppo-kl": Preset(
        "PPO with an adaptive KL penalty",
        "Schulman et al. 2017, 1707.06347, section 4: KL target 0.01; the weight starts at 1 and is doubled or halved.",
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
        "Where the KL of an update should stay near a target, which a clipped ratio does not guarantee.",
    ),
    "mdpo": Preset(
        "mirror descent policy optimisation",
        "Tomar et al. 2020, 2005.09814: several epochs on ratio A - KL(new, old) / t with t = 1 (not annealed).",
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
        "Where clipping discards too much of a batch: several epochs without a clip.",
    ),
    "grpo": Preset(
        "group relative policy optimisation",
        "Shao et al. 2024, 2402.03300: the KL to the reference has weight 0.04. Epochs and learning rate are ours, for "
        "control tasks (the paper's are for a language model); on CartPole whole batches did better than minibatches.",
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
        "Where episodes are short or rewarded only at their end, so that a critic has little to learn from.",
    ),
    "dr-grpo": Preset(
        "GRPO done right",
        "Liu et al. 2025, 2503.20783: no division by the group's standard deviation or by the episode's length, no KL.",
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
        "Like `grpo`, where long episodes or groups with nearly equal returns have too much or too little weight.",
    ),
    "rloo": Preset(
        "REINFORCE, leave one out",
        "Ahmadian et al. 2024, 2402.14740: one step per batch; the baseline of an episode is the mean return of the "
        "others in its group.",
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
        "Like `grpo`, with one plain step per batch and the fewest knobs.",
    ),
    "dapo": Preset(
        "decoupled clip and dynamic sampling policy optimisation",
        "Yu et al. 2025, 2503.14476: a wider clip above than below, the mean over tokens, no KL, and other prompts in "
        "place of those whose completions are all equally good. Epochs and learning rate are ours.",
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
                "clip_high": 0.28,
                "normalise_advantages": "off",
                "average": "step",
            },
            "group": {"score": "zscore", "equal": "redraw"},
            "trust": {"region": "none"},
        },
        "Like `grpo`, for language models whose prompts are often all right or all wrong. With environments, set "
        '`group.equal = "skip"`.',
    ),
    "gspo": Preset(
        "group sequence policy optimisation",
        "Zheng et al. 2025, 2507.18071: one ratio for all tokens of a completion, the geometric mean of theirs, with "
        "the paper's clip of 3e-4 and 4e-4, and no KL. Epochs and learning rate are ours.",
        {
            "objective": {
                "advantage": "group",
                "surrogate": "clip",
                "step": "adam",
                "gamma": 1.0,
                "learning_rate": 1e-3,
                "epochs": 4,
                "minibatches": 1,
                "ratio": "episode",
                "clip": 3e-4,
                "clip_high": 4e-4,
                "normalise_advantages": "off",
                "average": "episode",
            },
            "group": {"score": "zscore"},
            "trust": {"region": "none"},
        },
        "Like `grpo`, where completions are long and the ratios of single tokens too noisy to clip.",
    ),
}

KEYS_OF_PRESETS = frozenset(
    (section, key) for preset in PRESETS.values() for section, values in preset.values.items() for key in values
)
"""The keys to which some preset gives a value."""


def fill_from_preset(
    data: Mapping[str, Any], is_valid: Callable[[Values], bool] = lambda values: True
) -> dict[str, Any]:
    """Add the values of a scenario's preset to its tables, for the keys that they do not have.

    The tables stay as they are if the preset is unknown, cannot be imported or has invalid values; validating the
    scenario reports that.
    """
    objective = data.get("objective", {})
    if not isinstance(objective, Mapping):
        return dict(data)
    row = find_row_or_none(objective.get("preset", DEFAULT_PRESET), PRESETS, Preset)
    return dict(data) if row is None or not is_valid(row.values) else fill_missing(data, row.values)
