"""How clients learn: K of them as one stacked computation.

    learner.py           Learner and ClientPolicies, the interfaces that a federation needs
    make.py              the implementation that fits some clients
    stacked_learner.py   StackedLearner.train: the loop. Collect, judge, update
    start.py             the policies that clients begin a run with
    training_record.py   what a client does while it is trained
    scenario_envs.py     the clients' environments as the scenario wants them
    stacked_policies.py  StackedPolicies: policies given as arrays, evaluated and measured
    client_stack.py      clients as rows of tensors, and the chunks of rows that an update works on
    records.py           Batch, Minibatch, Episode, TrainingReport, Evaluation
    levels.py            the levels of a task that clients train on
    actor.py             acting with all policies of a stack
    rollout.py           collecting experience
    trajectories.py      the collected steps
    batch.py             from experience to a batch, with the policy's and the critic's output
    episode_sums.py      sums over the steps of episodes
    recurrence.py        what a policy with memory sees
    episode_groups.py    which episodes are judged against each other
    advantages.py        GAE, and an episode against its group
    minibatches.py       a batch packed, and sampled in parts
    objective.py         surrogate, value loss, entropy, KL, and their gradients
    constraints.py       multipliers that adapt before an update
    cost_critic.py       what a policy still costs, for advantages of costs
    entropy_target.py    weights of the entropy that adapt to a target
    update.py            Adam over minibatches, or a natural-gradient step
    inner_steps.py       gradients after a step on another minibatch
    losses.py            what an update reports
    adam.py              Adam for K stacked clients
    natural_gradient.py  conjugate gradients on the Fisher matrix, and a line search
    penalty.py           group penalties, as proximal steps
    preconditioned.py    the same steps in the metric of Adam's preconditioner
    rollback.py          updates that are taken back, since the policy plays worse after them
    trust_region.py      KL coefficients and budgets
    evaluation.py        episodes without learning
    measurement.py       KL and Fisher diagonal on states that stay with the client
    normalise.py         running moments of observations and rewards
    rng.py               each client's own random streams
    device.py            the device that tensors are on
    memory.py            the C library's allocator
    language/            how clients with a language model learn

Begin with StackedLearner.train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.rl.advantages import gae, group_advantages
    from grpo_fed.rl.evaluation import evaluate
    from grpo_fed.rl.learner import ClientPolicies, Learner
    from grpo_fed.rl.make import make_client_policies
    from grpo_fed.rl.objective import policy_surrogate
    from grpo_fed.rl.records import Batch, Minibatch, TrainingReport
    from grpo_fed.rl.stacked_learner import StackedLearner

__all__ = [
    "Batch",
    "ClientPolicies",
    "Learner",
    "Minibatch",
    "StackedLearner",
    "TrainingReport",
    "evaluate",
    "gae",
    "group_advantages",
    "make_client_policies",
    "policy_surrogate",
]

MODULES = {
    "Batch": "grpo_fed.rl.records",
    "ClientPolicies": "grpo_fed.rl.learner",
    "Learner": "grpo_fed.rl.learner",
    "Minibatch": "grpo_fed.rl.records",
    "StackedLearner": "grpo_fed.rl.stacked_learner",
    "TrainingReport": "grpo_fed.rl.records",
    "evaluate": "grpo_fed.rl.evaluation",
    "gae": "grpo_fed.rl.advantages",
    "group_advantages": "grpo_fed.rl.advantages",
    "make_client_policies": "grpo_fed.rl.make",
    "policy_surrogate": "grpo_fed.rl.objective",
}

__getattr__ = lazy_getattr(__name__, MODULES)
