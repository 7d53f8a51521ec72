"""How clients learn: K of them as one stacked computation.

    stacked_learner.py   StackedLearner.train: the loop. Collect, judge, update
    rollout.py           collecting experience
    batch.py             from experience to a batch that can be judged
    minibatches.py       a batch packed, and drawn from in parts
    records.py           Batch and Minibatch
    advantages.py        GAE, and an episode against its group
    objective.py         surrogate, value loss, entropy, KL, and their gradients
    update.py            Adam over minibatches, or a natural-gradient step
    adam.py              Adam for K stacked clients
    natural_gradient.py  conjugate gradients on the Fisher matrix, and a line search
    penalty.py           group penalties, as proximal steps
    trust_region.py      KL coefficients and budgets
    evaluation.py        episodes without learning
    measurement.py       KL and Fisher diagonal on states that stay with the client
    normalise.py         running moments of observations and rewards
    rng.py               each client's own random streams
    device.py            the device that is computed on
    memory.py            memory that is kept instead of being given back

Begin with StackedLearner.train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.rl.advantages import gae, group_advantages
    from grpo_fed.rl.evaluation import evaluate
    from grpo_fed.rl.objective import policy_surrogate
    from grpo_fed.rl.records import Batch, Minibatch
    from grpo_fed.rl.stacked_learner import StackedLearner, TrainingReport

__all__ = [
    "Batch",
    "Minibatch",
    "StackedLearner",
    "TrainingReport",
    "evaluate",
    "gae",
    "group_advantages",
    "policy_surrogate",
]

MODULES = {
    "Batch": "grpo_fed.rl.records",
    "Minibatch": "grpo_fed.rl.records",
    "StackedLearner": "grpo_fed.rl.stacked_learner",
    "TrainingReport": "grpo_fed.rl.stacked_learner",
    "evaluate": "grpo_fed.rl.evaluation",
    "gae": "grpo_fed.rl.advantages",
    "group_advantages": "grpo_fed.rl.advantages",
    "policy_surrogate": "grpo_fed.rl.objective",
}

__getattr__ = lazy_getattr(__name__, MODULES)
