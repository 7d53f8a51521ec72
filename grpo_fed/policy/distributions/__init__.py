"""Action distributions: what a policy's M outputs mean, and how actions are sampled from them.

    base.py       Distribution, the interface
    choices.py    Categorical and MultiCategorical, discrete actions
    gaussians.py  Gaussian and SquashedGaussian, continuous actions
    hybrid.py     Hybrid, both side by side

Log-probabilities, entropies and divergences are computed from logits, or from means and log standard deviations, with
as few tensor operations as they need. On the hot path gradients are in closed form as well (`vjp`).
"""

from __future__ import annotations

from grpo_fed.policy.distributions.base import Distribution
from grpo_fed.policy.distributions.choices import Categorical, MultiCategorical
from grpo_fed.policy.distributions.gaussians import Gaussian, SquashedGaussian
from grpo_fed.policy.distributions.hybrid import Hybrid

__all__ = ["Categorical", "Distribution", "Gaussian", "Hybrid", "MultiCategorical", "SquashedGaussian"]
