"""Networks whose parameters are cut into named blocks and groups.

    blocks.py         Layout: where every tensor and block lies in one flat vector
    groups.py         Groups: what a penalty or a merge keeps or drops as one
    patterns.py       from patterns such as "torso.*" to blocks
    shared.py         SharedBlocks: what all clients of a scenario have in common
    base.py           Policy, the interface
    actor_critic.py   our network, with its gradient written out
    user_module.py    a user's own torch module
    distributions.py  action distributions
    activations.py    activations, forwards and backwards
    make.py           the policy that fits a task

Begin with blocks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.policy.base import Policy, PolicyOutput
    from grpo_fed.policy.blocks import Block, Layout
    from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
    from grpo_fed.policy.groups import Groups, cut_groups
    from grpo_fed.policy.make import make_policy
    from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks

__all__ = [
    "Block",
    "Categorical",
    "Distribution",
    "Gaussian",
    "Groups",
    "Layout",
    "MultiCategorical",
    "Policy",
    "PolicyOutput",
    "SharedBlocks",
    "SquashedGaussian",
    "cut_groups",
    "make_policy",
    "resolve_shared_blocks",
]

MODULES = {
    "Block": "grpo_fed.policy.blocks",
    "Categorical": "grpo_fed.policy.distributions",
    "Distribution": "grpo_fed.policy.distributions",
    "Gaussian": "grpo_fed.policy.distributions",
    "Groups": "grpo_fed.policy.groups",
    "Layout": "grpo_fed.policy.blocks",
    "MultiCategorical": "grpo_fed.policy.distributions",
    "Policy": "grpo_fed.policy.base",
    "PolicyOutput": "grpo_fed.policy.base",
    "SharedBlocks": "grpo_fed.policy.shared",
    "SquashedGaussian": "grpo_fed.policy.distributions",
    "cut_groups": "grpo_fed.policy.groups",
    "make_policy": "grpo_fed.policy.make",
    "resolve_shared_blocks": "grpo_fed.policy.shared",
}

__getattr__ = lazy_getattr(__name__, MODULES)
