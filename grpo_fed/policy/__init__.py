"""Networks whose parameters are cut into named blocks and groups.

    blocks.py         Layout: where every tensor and block lies in one flat vector
    groups.py         Groups: parameters that a penalty or a merge keeps or drops as one
    patterns.py       resolves patterns such as "torso.*" to names
    shared.py         SharedBlocks: the blocks that all clients of a scenario share
    start_values.py   what policies begin with, from the files of another run
    shared_names.py   SharedNames: the names of the shared blocks and groups, as a run's folder keeps them
    base.py           Policy, the interface of any kind, and StackedPolicy, what the stacked learner trains
    actor_critic.py   our network, with its gradient written out
    cnn.py            our network for pictures
    recurrent.py      our network with a memory, a GRU or an LSTM
    encoders.py       the convolutions that it begins with
    layers.py         layers of stacked networks, and first values of parameters
    autograd.py       AutogradPolicy, what follows from a network by autograd
    user_module.py    a user's own torch module
    own_shapes.py     the shapes in which a module of the user's sees observations
    distributions/    action distributions: choices and Gaussians
    activations.py    activation functions and their gradients
    make.py           makes the policy that fits a task
    language/         language models: a frozen base and adapters that learn

Begin with blocks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.policy.base import Policy, PolicyOutput, StackedPolicy
    from grpo_fed.policy.blocks import Block, Layout
    from grpo_fed.policy.distributions import (
        Categorical,
        Distribution,
        Gaussian,
        Hybrid,
        MultiCategorical,
        SquashedGaussian,
    )
    from grpo_fed.policy.groups import Groups, cut_groups
    from grpo_fed.policy.make import make_policy
    from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
    from grpo_fed.policy.shared_names import SharedNames

__all__ = [
    "Block",
    "Categorical",
    "Distribution",
    "Gaussian",
    "Groups",
    "Hybrid",
    "Layout",
    "MultiCategorical",
    "Policy",
    "PolicyOutput",
    "SharedBlocks",
    "SharedNames",
    "SquashedGaussian",
    "StackedPolicy",
    "cut_groups",
    "make_policy",
    "resolve_shared_blocks",
]

MODULES = {
    "Block": "grpo_fed.policy.blocks",
    "Categorical": "grpo_fed.policy.distributions",
    "Distribution": "grpo_fed.policy.distributions",
    "Gaussian": "grpo_fed.policy.distributions",
    "Hybrid": "grpo_fed.policy.distributions",
    "Groups": "grpo_fed.policy.groups",
    "Layout": "grpo_fed.policy.blocks",
    "MultiCategorical": "grpo_fed.policy.distributions",
    "Policy": "grpo_fed.policy.base",
    "PolicyOutput": "grpo_fed.policy.base",
    "SharedBlocks": "grpo_fed.policy.shared",
    "SharedNames": "grpo_fed.policy.shared_names",
    "SquashedGaussian": "grpo_fed.policy.distributions",
    "StackedPolicy": "grpo_fed.policy.base",
    "cut_groups": "grpo_fed.policy.groups",
    "make_policy": "grpo_fed.policy.make",
    "resolve_shared_blocks": "grpo_fed.policy.shared",
}

__getattr__ = lazy_getattr(__name__, MODULES)
