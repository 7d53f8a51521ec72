"""Whole updates against plain torch, against sb3-contrib's TRPO, and against closed forms on tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from scipy import optimize
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.distributions import Categorical
from grpo_fed.policy.groups import Groups, cut_groups
from grpo_fed.rl.adam import Adam
from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.client_stack import ClientStack
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.penalty import penalty_value
from grpo_fed.rl.records import Batch
from grpo_fed.rl.trust_region import trust_budgets
from grpo_fed.rl.update import clip_gradient, penalise_after_adam, scheduled, update_clients
from grpo_fed.scenario.scenario import Scenario

STEPS, COPIES, SIZE = 32, 4, 4


def scenario(text: str) -> Scenario:
    return Scenario.loads(f'name = "a"\n{text}\n[[clients]]\nname = "c"\nenv = "CartPole-v1"')


def stack_of(given: Scenario, clients: int = 2, seed: int = 0, policy: ActorCritic | None = None) -> ClientStack:
    policy = policy or ActorCritic(SIZE, Categorical(3), given.policy)
    torch.manual_seed(seed)
    parameters = torch.stack([policy.initial(client) for client in range(clients)])
    parameters += 0.2 * torch.randn_like(parameters)
    return ClientStack(
        policy=policy,
        scenario=given,
        rows=slice(0, clients),
        seeds=list(range(clients)),
        parameters=parameters,
        views=policy.layout.views(parameters),
        gradient=(gradient := torch.zeros_like(parameters)),
        gradient_views=policy.layout.views(gradient),
        anchor=parameters.clone(),
        adam=Adam.start(clients, parameters.shape[1], given.objective.adam_epsilon),
        learning_rate=np.full((clients, 1), given.objective.learning_rate),
        entropy=torch.full((clients, 1), given.objective.entropy),
        penalty=torch.full((clients, 1), given.penalty.weight),
        kl_coefficient=torch.full((clients,), given.trust.coefficient),
        kl_limit=torch.full((clients,), given.trust.target),
        groups=cut_groups(policy.layout, given.policy.groups),
        budgets=trust_budgets(policy.layout, given.trust.blocks),
    )


def experience(stack: ClientStack, seed: int = 1) -> tuple[Batch, LearningTargets]:
    """Random observations, actions drawn from the policy, random advantages and returns; all steps valid."""
    torch.manual_seed(seed)
    clients = len(stack.parameters)
    observations = torch.randn(clients, STEPS, COPIES, stack.policy.observation_size)
    with torch.no_grad():
        said = stack.policy.forward(stack.views, observations.flatten(1, 2))
    distribution = said.distribution.unflatten(1, (STEPS, COPIES))
    actions = torch.distributions.Categorical(logits=distribution).sample()[..., None].float()
    values = said.values.unflatten(1, (STEPS, COPIES))
    zeros = torch.zeros(clients, STEPS, COPIES)
    batch = Batch(
        observations=observations,
        actions=actions,
        log_probs=stack.policy.distribution.log_prob(distribution, actions),
        distribution=distribution,
        values=values,
        next_values=values,
        rewards=zeros,
        ends=zeros.bool(),
        valid=~zeros.bool(),
        episodes=torch.arange(COPIES).expand(zeros.shape),
    )
    advantages = torch.randn(zeros.shape)
    return batch, LearningTargets(
        advantages, values + torch.randn(zeros.shape), torch.full(zeros.shape, 1 / (STEPS * COPIES))
    )


def run(stack: ClientStack, batch: Batch, judged: LearningTargets, active: Tensor | None = None) -> Mapping[str, float]:
    clients = len(stack.parameters)
    return update_clients(stack, batch, judged, active, np.zeros(clients, int), np.zeros(clients)).client(0)


def plain_network(values: Mapping[str, Tensor], tower: list[str]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for name in tower:
        layer = nn.Linear(*reversed(values[f"{name}.weight"].shape))
        layer.load_state_dict({"weight": values[f"{name}.weight"], "bias": values[f"{name}.bias"]})
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("inner_rate", [0.0, 0.2])
def test_adam_epochs_are_those_of_a_plain_ppo(inner_rate: float) -> None:
    """Written out with torch.distributions, autograd, clip_grad_norm_ and torch.optim.Adam; batches are whole.

    With an inner rate every second gradient is taken after a step along the one before (2002.07948, first-order).
    """
    epochs = "[objective]\nepochs = 6\nminibatches = 1\nlearning_rate = 0.01\nentropy = 0.02\nclip = 0.1"
    given = scenario(f"{epochs}\n[personal]\ninner_rate = {inner_rate}")
    stack = stack_of(given)
    batch, judged = experience(stack)
    start = stack.policy.layout.unstack(stack.parameters.clone())
    run(stack, batch, judged)
    for client, values in enumerate(start):
        actor = plain_network(values, ["torso.0", "torso.1", "actor"])
        critic = plain_network(values, ["critic.0", "critic.1", "critic.head"])
        every = [*actor.parameters(), *critic.parameters()]
        adam = torch.optim.Adam(every, lr=0.01, eps=1e-5)
        observations = batch.observations[client].flatten(0, 1)
        actions, old = batch.actions[client].flatten(), batch.log_probs[client].flatten()
        advantages = judged.advantages[client].flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for epoch in range(6):
            chosen = torch.distributions.Categorical(logits=actor(observations))
            ratio = (chosen.log_prob(actions) - old).exp()
            surrogate = torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()
            error = (critic(observations).flatten() - judged.returns[client].flatten()).square().mean()
            loss = -surrogate + 0.5 * error - 0.02 * chosen.entropy().mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(every, 0.5)
            if inner_rate and epoch % 2 == 0:
                before = [parameter.detach().clone() for parameter in every]
                for parameter in every:
                    assert parameter.grad is not None
                    parameter.data -= inner_rate * parameter.grad
                continue
            for parameter, value in zip(every, before if inner_rate else [], strict=bool(inner_rate)):
                parameter.data.copy_(value)
            adam.step()
        found = torch.cat([view[client].flatten() for view in stack.views.values()])
        torch.testing.assert_close(found, torch.cat([p.detach().flatten() for p in every]), rtol=1e-4, atol=2e-5)


def test_minibatches_contain_each_step_once_an_epoch() -> None:
    """With plain sums of gradients instead of Adam's this would be exact; so count: a weight of 0 must never matter."""
    given = scenario("[objective]\nepochs = 1\nminibatches = 3\nnormalise_advantages = 'off'")
    stack = stack_of(given, clients=3)
    batch, judged = experience(stack)
    valid = torch.rand(judged.weights.shape) < 0.7
    weights = valid / valid.sum((1, 2), keepdim=True)
    sample = PackedBatch.of(with_valid(batch, valid), LearningTargets(judged.advantages, judged.returns, weights), None)
    taken = torch.zeros(3)
    total = torch.zeros(3)
    for part in sample.minibatches([5, 6, 7], np.zeros(3, int), 1, 3):
        taken += (part.weights > 0).sum(1)
        total += (part.weights * part.returns).sum(1) / 3
    assert taken.tolist() == valid.sum((1, 2)).tolist()
    torch.testing.assert_close(total, (weights * judged.returns).sum((1, 2)))


def with_valid(batch: Batch, valid: Tensor) -> Batch:
    return replace(batch, valid=valid)


def test_a_clients_minibatches_do_not_depend_on_other_clients() -> None:
    stack = stack_of(scenario(""), clients=3)
    batch, judged = experience(stack)
    sample = PackedBatch.of(batch, judged, None)
    together = [part.returns for part in sample.minibatches([5, 6, 7], np.array([2, 0, 9]), 2, 4)]
    alone = PackedBatch(sample.packed[1:2], sample.sizes, None).minibatches([6], np.array([0]), 2, 4)
    for both, single in zip(together, alone, strict=True):
        assert torch.equal(both[1:2], single.returns)


def test_an_inactive_client_does_not_move_or_affect_the_others() -> None:
    given = scenario("[objective]\nepochs = 2\nminibatches = 2")
    whole, some = stack_of(given), stack_of(given)
    batch, judged = experience(whole)
    before = some.parameters.clone()
    run(whole, batch, judged)
    run(some, batch, judged, torch.tensor([True, False]))
    assert torch.equal(some.parameters[1], before[1])
    torch.testing.assert_close(some.parameters[0], whole.parameters[0])


def test_an_update_stops_once_the_kl_is_over_the_limit() -> None:
    """A rate of 0.5 throws the policy far off at once: with a stop only the first step is taken."""
    text = "[objective]\nepochs = 10\nminibatches = 1\nlearning_rate = 0.5\n"
    stopped, once = stack_of(scenario(text + "[trust]\nstop = 0.001")), stack_of(scenario(text.replace("10", "1", 1)))
    batch, judged = experience(stopped)
    run(stopped, batch, judged)
    run(once, batch, judged)
    assert stopped.adam.count.flatten().tolist() == [1.0, 1.0]
    torch.testing.assert_close(stopped.parameters, once.parameters)


def test_a_client_that_stops_early_reports_its_losses_at_the_stop() -> None:
    """The first client's rate throws it over the limit at once; the second's never does."""
    text = "[objective]\nepochs = 4\nminibatches = 2\n[trust]\nstop = 0.01"
    together, alone = stack_of(scenario(text)), stack_of(scenario(text), clients=1)
    together.learning_rate[:] = [[0.5], [1e-6]]
    alone.learning_rate[:] = 0.5
    alone.parameters.copy_(together.parameters[:1])
    batch, judged = experience(together)
    first, mine = (
        {field.name: value[:1] for field in fields(record) if (value := getattr(record, field.name)) is not None}
        for record in (batch, judged)
    )
    both, one = run(together, batch, judged), run(alone, Batch(**first), LearningTargets(**mine))
    assert together.adam.count.flatten().tolist() == [1.0, 8.0]
    torch.testing.assert_close(together.parameters[:1], alone.parameters, rtol=1e-3, atol=1e-3)
    assert both["approx_kl"] > 0.01
    assert both == pytest.approx(one, rel=1e-4, nan_ok=True)


def test_the_adaptive_kl_weight_follows_the_measured_kl() -> None:
    given = scenario("[objective]\npreset = 'ppo-kl'\nlearning_rate = 0.05\n[trust]\ntarget = 1e-4\ncoefficient = 1.0")
    stack = stack_of(given)
    said = run(stack, *experience(stack))
    assert said["kl"] > 1.5e-4
    assert stack.kl_coefficient.tolist() == [2.0, 2.0]


def test_blocks_stay_within_their_budgets_on_the_batchs_states() -> None:
    """The KL with one block moved is worked out here with torch.distributions, from the parameters before and after."""
    given = scenario("[objective]\nlearning_rate = 0.05\n[trust.blocks]\n'torso.*' = 1e-3\nactor = 2e-3")
    stack = stack_of(given)
    batch, judged = experience(stack)
    before = stack.parameters.clone()
    run(stack, batch, judged)
    old = torch.distributions.Categorical(logits=batch.distribution.flatten(1, 2))
    for block, budget in stack.budgets:
        candidate = before.clone()
        candidate[:, block.start : block.stop] = stack.parameters[:, block.start : block.stop]
        logits = stack.policy.act(stack.policy.layout.views(candidate), batch.observations.flatten(1, 2))
        kl = torch.distributions.kl_divergence(old, torch.distributions.Categorical(logits=logits)).mean(1)
        assert (kl <= budget * (1 + 1e-4)).all()
        assert (kl > 0.2 * budget).all()


def test_the_trpo_step_is_that_of_sb3_contrib() -> None:
    """The same network, batch and settings; sb3-contrib begins its conjugate gradient at noise of 1e-4, we at 0."""
    torch.manual_seed(0)
    peer = TRPO("MlpPolicy", gymnasium.make("CartPole-v1"), n_steps=STEPS * COPIES, batch_size=STEPS * COPIES)
    peer.set_logger(Logger(None, []))
    given = scenario(
        "[objective]\npreset = 'trpo'\nvalue_epochs = 1\nminibatches = 1\nlearning_rate = 1e-3\n"
        f"[trust]\ntarget = {peer.target_kl}\ncg_iterations = {peer.cg_max_steps}\ncg_damping = {peer.cg_damping}\n"
        "direction = 'new-old'"
    )
    policy = ActorCritic(4, Categorical(2), given.policy)
    stack = stack_of(given, clients=1, policy=policy)
    net = peer.policy
    layers = {
        "torso.0": net.mlp_extractor.policy_net[0],
        "torso.1": net.mlp_extractor.policy_net[2],
        "actor": net.action_net,
        "critic.0": net.mlp_extractor.value_net[0],
        "critic.1": net.mlp_extractor.value_net[2],
        "critic.head": net.value_net,
    }
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(stack.views[f"{name}.weight"][0])
            layer.bias.copy_(stack.views[f"{name}.bias"][0])
    batch, judged = experience(stack)
    buffer = peer.rollout_buffer
    buffer.observations = batch.observations[0].flatten(0, 1)[:, None].numpy()
    buffer.actions = batch.actions[0].flatten(0, 1)[:, None].numpy()
    buffer.log_probs = batch.log_probs[0].flatten()[:, None].numpy()
    buffer.advantages = judged.advantages[0].flatten()[:, None].numpy()
    buffer.returns = judged.returns[0].flatten()[:, None].numpy()
    buffer.values = batch.values[0].flatten()[:, None].numpy()
    buffer.full, buffer.generator_ready = True, False
    before = stack.parameters.clone()
    peer.n_critic_updates = 1
    peer.train()
    said = run(stack, batch, judged)
    for name, layer in layers.items():
        if name.startswith("critic"):
            continue
        ours = stack.views[f"{name}.weight"][0]
        old = policy.layout.views(before)[f"{name}.weight"][0]
        moved = layer.weight.detach() - old
        assert moved.norm() > 1e-3
        assert ((ours - old) - moved).norm() / moved.norm() < 0.02
    assert 0 < said["kl"] <= peer.target_kl


def test_the_natural_direction_solves_the_dense_fisher_system() -> None:
    """F = E[J' (diag(p) - p p') J], with the Jacobian J of a small network's logits worked out entry by entry."""
    given = scenario(
        "[policy]\nhidden = [3]\n[objective]\npreset = 'npg'\nlearning_rate = 0.01\nnormalise_advantages = 'off'\n"
        "[trust]\nregion = 'none'\ncg_damping = 0.05\ncg_iterations = 60"
    )
    stack = stack_of(given, clients=2)
    batch, judged = experience(stack)
    layout, names = stack.policy.layout, stack.policy.actor_parameters()
    columns = torch.cat([torch.arange(slot.start, slot.stop) for slot in layout.slots if slot.name in names])
    expected = []
    for client in range(2):
        observations = batch.observations[client].flatten(0, 1)

        def logits(flat: Tensor, observations: Tensor = observations) -> Tensor:
            return stack.policy.act(layout.views(flat[None]), observations[None])[0]

        start = stack.parameters[client].clone()
        jacobian = torch.autograd.functional.jacobian(logits, start)[..., columns].double()
        p = logits(start).softmax(-1).double()
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        fisher = torch.einsum("bip,bij,bjq->pq", jacobian, spread, jacobian) / len(observations)
        chosen = torch.nn.functional.one_hot(batch.actions[client].flatten().long(), 3) - p
        scores = torch.einsum("bi,bip->bp", chosen, jacobian)
        gradient = (scores * judged.advantages[client].flatten()[:, None]).mean(0)
        expected.append(torch.linalg.solve(fisher + 0.05 * torch.eye(len(columns)), gradient))
    before = stack.parameters.clone()
    run(stack, batch, judged)
    moved = (stack.parameters - before)[:, columns].double() / 0.01
    torch.testing.assert_close(moved, torch.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["trpo", "npg"])
def test_the_hard_limit_widens_when_steps_gain_as_predicted(preset: str) -> None:
    """At a KL of 1e-5 the linear model is right: the limit grows by half for both clients, searched for or not."""
    given = scenario(f"[objective]\npreset = '{preset}'\n[trust]\ntarget = 1e-5\nadaptive_target = true")
    stack = stack_of(given)
    run(stack, *experience(stack))
    assert stack.kl_limit.tolist() == pytest.approx([1.5e-5, 1.5e-5])


def test_a_hard_step_does_not_depend_on_the_advantages_scale() -> None:
    text = "[objective]\npreset = 'npg'\nnormalise_advantages = 'off'"
    small, large = stack_of(scenario(text)), stack_of(scenario(text))
    batch, judged = experience(small)
    run(large, batch, judged)
    said = run(small, batch, replace(judged, advantages=judged.advantages * 1e-6))
    names = small.policy.actor_parameters()
    for name in names:
        torch.testing.assert_close(small.views[name], large.views[name], rtol=1e-3, atol=1e-4)
    assert said["kl"] > 0.002


def test_the_penalty_after_a_natural_step_gives_exact_zeros() -> None:
    """A weight this large takes everything at once; at the end of a schedule down to 0 it takes nothing."""
    text = "[objective]\npreset = 'trpo'\nschedule = 'linear'\n[penalty]\ntoward = 'zero'\nweight = 1e6\n"
    stack = stack_of(scenario(text))
    batch, judged = experience(stack)
    said = run(stack, batch, judged)
    assert not stack.parameters.any()
    assert said["kl"] > 0.01, "what is reported is where the policy came to, beyond the limit of its natural step"
    last = stack_of(scenario(text))
    update_clients(last, batch, judged, None, np.zeros(2, int), np.ones(2))
    assert last.parameters.all()


def test_the_critics_gradient_is_clipped_after_a_natural_step() -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    text = "[objective]\npreset = 'trpo'\nminibatches = 1\nvalue_epochs = 1\nmax_grad_norm = "
    clipped, free = stack_of(scenario(text + "0.01")), stack_of(scenario(text + "inf"))
    for stack in (clipped, free):
        run(stack, *experience(stack))
    lengths = [stack.adam.mean.norm(dim=1) for stack in (clipped, free)]
    torch.testing.assert_close(lengths[0], torch.full((2,), 0.001), rtol=1e-3, atol=0)
    assert (lengths[1] > 0.01).all()


def test_the_kl_to_the_shared_policy_pulls_towards_the_anchor() -> None:
    """With no advantage at all, only the KL moves the policy: towards the anchor, not towards the old policy."""
    given = scenario(
        "[objective]\nlearning_rate = 0.01\nepochs = 100\nminibatches = 1\nnormalise_advantages = 'off'\n"
        "[trust]\nregion = 'penalty'\nreference = 'shared'\ncoefficient = 1.0"
    )
    stack = stack_of(given, clients=1)
    batch, judged = experience(stack)
    stack.anchor.add_(0.3 * torch.randn_like(stack.anchor))
    still = LearningTargets(torch.zeros_like(judged.advantages), batch.values, judged.weights)

    def distance() -> float:
        observations = batch.observations.flatten(1, 2)
        shared = stack.policy.act(stack.policy.layout.views(stack.anchor), observations)
        return float(stack.policy.distribution.kl(shared, stack.policy.act(stack.views, observations)).mean())

    before = distance()
    run(stack, batch, still)
    assert distance() < 0.05 * before


def table_policy(states: int, actions: int) -> ActorCritic:
    """A softmax over a table: one-hot states, no hidden layers."""
    return ActorCritic(states, Categorical(actions), scenario("[policy]\nhidden = []").policy)


def every_state_and_action(stack: ClientStack, advantages: Tensor) -> tuple[Batch, LearningTargets]:
    """Each (state, action) of a table [S, A] once, weighted by the policy's probability: an exact expectation."""
    states, actions = advantages.shape
    observations = torch.eye(states).repeat_interleave(actions, 0)[None, None]
    chosen = torch.arange(actions).repeat(states)[None, None, :, None].float()
    with torch.no_grad():
        distribution = stack.policy.act(stack.views, observations[0])[:, None]
    log_probs = stack.policy.distribution.log_prob(distribution, chosen)
    zeros = torch.zeros(1, 1, states * actions)
    batch = Batch(
        observations, chosen, log_probs, distribution, zeros, zeros, zeros, zeros.bool(), ~zeros.bool(), zeros.long()
    )
    return batch, LearningTargets(advantages.flatten()[None, None], zeros, log_probs.exp() / states)


def test_the_natural_step_on_a_table_multiplies_by_exponentiated_advantages() -> None:
    """Kakade's closed form: for a softmax table pi' ~ pi exp(step * A), with A centred under pi (2019, 1908.00261)."""
    given = scenario(
        "[policy]\nhidden = []\n[objective]\npreset = 'npg'\nlearning_rate = 0.7\nnormalise_advantages = 'off'\n"
        "[trust]\nregion = 'none'\ncg_damping = 1e-8\ncg_iterations = 60"
    )
    policy = table_policy(4, 3)
    stack = stack_of(given, clients=1, policy=policy)
    torch.manual_seed(3)
    logits = stack.policy.act(stack.views, torch.eye(4)[None])[0]
    old = logits.softmax(-1)
    advantages = torch.randn(4, 3)
    advantages = advantages - (old * advantages).sum(-1, keepdim=True)
    run(stack, *every_state_and_action(stack, advantages))
    new = stack.policy.act(stack.views, torch.eye(4)[None])[0].softmax(-1)
    expected = old * (0.7 * advantages).exp()
    torch.testing.assert_close(new, expected / expected.sum(-1, keepdim=True), rtol=2e-3, atol=1e-4)


def test_mirror_descent_on_a_table_multiplies_by_exponentiated_advantages() -> None:
    """MDPO's inner problem max E[r A] - 1/t KL(new, old) has the solution pi' ~ pi exp(t A) (2005.09814, eq. 7)."""
    given = scenario(
        "[policy]\nhidden = []\n[objective]\npreset = 'mdpo'\nlearning_rate = 0.02\nepochs = 1500\nminibatches = 1\n"
        "normalise_advantages = 'off'\nmax_grad_norm = inf\n[trust]\ncoefficient = 2.0"
    )
    stack = stack_of(given, clients=1, policy=table_policy(4, 3))
    torch.manual_seed(3)
    old = stack.policy.act(stack.views, torch.eye(4)[None])[0].softmax(-1)
    advantages = torch.randn(4, 3)
    run(stack, *every_state_and_action(stack, advantages))
    new = stack.policy.act(stack.views, torch.eye(4)[None])[0].softmax(-1)
    expected = old * (advantages / 2.0).exp()
    torch.testing.assert_close(new, expected / expected.sum(-1, keepdim=True), rtol=5e-3, atol=1e-3)


def test_schedules_go_from_one_to_zero() -> None:
    progress = np.array([0.0, 0.5, 1.0])
    constant, linear, cosine = (scheduled(kind, progress) for kind in ("constant", "linear", "cosine"))
    assert constant.flatten().tolist() == [1.0, 1.0, 1.0]
    assert linear.flatten().tolist() == [1.0, 0.5, 0.0]
    assert cosine.flatten().tolist() == pytest.approx([1.0, 0.5, 0.0])


# The penalty under Adam


@pytest.mark.parametrize("step", ["preconditioned", "decoupled"])
def test_the_penalty_moves_no_client_that_pauses(step: str) -> None:
    stack = stack_of(scenario(f"[penalty]\ntoward = 'zero'\nweight = 1.0\nstep = '{step}'"))
    before = stack.parameters.clone()
    run(stack, *experience(stack), torch.tensor([True, False]))
    assert torch.equal(stack.parameters[1], before[1])
    assert (stack.parameters[0] != before[0]).any()
    assert stack.parameters.isfinite().all()


CURVATURES = torch.tensor([[0.1, 1.0, 10.0]])


def minimise(text: str, groups: Groups, curvatures: Tensor, limit: float | None = None, noise: float = 0.0) -> Tensor:
    """Minimise sum_i c_i/2 (x_i - 1)^2 + penalty, c [K, P], by an update's own steps at rates from 0.01 down to 0."""
    given = scenario(f"[objective]\nlearning_rate = 0.01\n[penalty]\n{text}")
    parameters = torch.full_like(curvatures, 2.0)
    stack = replace(
        stack_of(given, len(curvatures)),
        parameters=parameters,
        anchor=torch.zeros_like(curvatures),
        adam=Adam.start(*curvatures.shape, given.objective.adam_epsilon),
        groups=groups,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(4000):
        gradient = curvatures * (parameters - 1)
        gradient += noise * torch.randn(gradient.shape, generator=generator)
        left = 1.0 if limit is None else clip_gradient(gradient, limit)
        rate = stack.learning_rate * (1 - step / 4000)
        stack.adam.step(parameters, gradient, rate)
        penalise_after_adam(stack, stack.adam, rate, left, None)
    return parameters


def groups_of(ids: list[int], blocks: tuple[str, ...]) -> Groups:
    sizes = torch.tensor(ids).bincount().float()
    return Groups(tuple(f"g{group}" for group in range(len(sizes))), torch.tensor(ids), sizes, blocks)


SINGLES = groups_of([0, 1, 2], ("a", "b", "c"))


@pytest.mark.parametrize("toward", ["zero", "shared"])
@pytest.mark.parametrize("limit", [None, 0.1], ids=["free", "clipped"])
def test_the_penalty_reaches_the_minimum_of_its_objective_under_adam(toward: str, limit: float | None) -> None:
    """c/2 (x - 1)^2 + 0.3 |x| has its minimum at max(0, 1 - 0.3 / c): 0, 0.7 and 0.97."""
    found = minimise(f"toward = '{toward}'\nweight = 0.3", SINGLES, CURVATURES, limit)
    assert found[0, 0] == 0.0
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.7, 0.97]]), rtol=0, atol=1e-3)


def test_the_minimum_is_reached_from_noisy_minibatches_too() -> None:
    found = minimise("toward = 'zero'\nweight = 0.3", SINGLES, CURVATURES.expand(8, 3), noise=0.3)
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found.mean(0), torch.tensor([0.0, 0.7, 0.97]), rtol=0, atol=0.02)


def test_the_decoupled_step_ignores_the_scale_of_the_loss() -> None:
    """The same weight takes a loss and a loss 100 times as large to the same point, which is no minimum of either."""
    text = "toward = 'zero'\nstep = 'decoupled'\nweight = 0.3"
    small, large = (minimise(text, SINGLES, scale * CURVATURES) for scale in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-2)
    assert (small[0] - torch.tensor([0.0, 0.7, 0.97])).abs().max() > 0.2


@pytest.mark.parametrize(
    "text",
    [
        "weight = 0.3",
        "kind = 'sparse-group'\nweight = 0.2\nl1 = 0.15",
        "kind = 'nested'\nweight = 0.2\nouter = 0.15",
    ],
    ids=["group", "sparse-group", "nested"],
)
def test_every_kind_of_penalty_reaches_its_minimum_under_adam(text: str) -> None:
    """Two groups of two in one block, curvatures from 0.1 to 10; the minimum from scipy."""
    curvatures = torch.tensor([[0.1, 10.0, 1.0, 0.3]])
    groups = groups_of([0, 0, 1, 1], ("a", "a"))
    found = minimise(f"toward = 'zero'\n{text}", groups, curvatures)
    settings = scenario(f"[penalty]\ntoward = 'zero'\n{text}").penalty

    def objective(x: np.ndarray) -> float:
        value = penalty_value(torch.from_numpy(x)[None], None, settings, groups, settings.weight)
        return float(value) + float((curvatures[0].numpy() / 2 * (x - 1) ** 2).sum())

    options = {"xatol": 1e-7, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
    best = optimize.minimize(objective, found[0].double().numpy() + 0.1, method="Nelder-Mead", options=options)
    np.testing.assert_allclose(found[0].numpy(), best.x, rtol=0, atol=2e-3)
