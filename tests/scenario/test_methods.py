"""Every method does on the clients what its paper defines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from grpo_fed.aggregation import merge
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Evaluate, Evaluated, EvaluationPlan, Start, Train, Trained
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.distributions import Categorical
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.client_stack import ClientStack
from grpo_fed.rl.learner import sub_state
from grpo_fed.rl.measurement import MeasurementStates, fisher_diagonal, mean_kl
from grpo_fed.rl.rng import Purpose, client_seed, generator
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.rl.update import reference_distributions, update_clients
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks
from tests.rl.test_update import experience, plain_network, stack_of

SMALL = """
name = "small"
rounds = 3
steps = 256
[policy]
hidden = [8, 8]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 2
learning_rate = 1e-2
[evaluate]
episodes = 4
"""
CARTS = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 3
spread = { length = [0.1, 0.9] }
"""
NAMES = ("cart-0", "cart-1", "cart-2")


def scenario(*overrides: str, clients: str = CARTS) -> Scenario:
    return Scenario.loads(SMALL + clients, overrides=overrides)


def make_clients(settings: Scenario, folder: Path) -> Clients:
    store = StateStore(folder, durable=False)
    return Clients(settings, resolve_shared_blocks(settings), resolve_tasks(settings), store)


def train(clients: Clients, round: int, shared: np.ndarray) -> dict[str, Trained]:
    instruction = Train(Start("run", round, shared), (round - 1) / 3, round / 3)
    answers = clients.answer(dict.fromkeys(clients.names, instruction))
    return {name: answer for name, answer in answers.items() if isinstance(answer, Trained)}


def load_state(folder: Path, client: str, round: int) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / client / f"round-{round:04d}.safetensors")


def random_vector(seed: int, size: int) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).normal(size=size).astype(np.float32)


# What is shared -----------------------------------------------------------------------------------------------------

TORSO, ACTOR, CRITIC = ("torso.0", "torso.1"), ("actor",), ("critic",)


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        ("grpo", TORSO + ACTOR),
        ("local", ()),
        ("fedavg", TORSO + ACTOR + CRITIC),
        ("fedprox", TORSO + ACTOR + CRITIC),
        ("fedper", TORSO),
        ("fedrep", TORSO),
        ("lg", ACTOR),
        ("ditto", TORSO + ACTOR + CRITIC),
        ("fedkl", TORSO + ACTOR + CRITIC),
        ("fisher", TORSO + ACTOR + CRITIC),
        ("clusters", TORSO + ACTOR + CRITIC),
    ],
)
def test_a_method_shares_its_blocks_and_keeps_all_others_private(
    tmp_path: Path, method: str, blocks: tuple[str, ...]
) -> None:
    """Without learning, the shared blocks become what the server sends, and the others stay at their initial values."""
    clients = make_clients(scenario(f"method={method}", "objective.learning_rate=1e-20"), tmp_path)
    sent = random_vector(1, clients.shared_blocks.size)
    answer = train(clients, 1, sent)["cart-1"]
    np.testing.assert_allclose(answer.point, sent, rtol=0, atol=1e-12)
    policy = clients.policies.policy
    initial = policy.initial(0)
    for block in policy.layout.blocks:
        columns = slice(block.start, block.stop)
        parameters = load_state(tmp_path, "cart-1", 1)["parameters"][columns]
        assert np.allclose(parameters, initial[columns].numpy(), rtol=0, atol=1e-12) == (block.name not in blocks)
    assert clients.shared_blocks.blocks == blocks
    clients.close()


def test_fedavg_is_the_weighted_mean_from_which_all_clients_continue(tmp_path: Path) -> None:
    clients = make_clients(scenario("method=fedavg", "objective.learning_rate=1e-20"), tmp_path)
    points = {name: random_vector(number, clients.shared_blocks.size) for number, name in enumerate(NAMES)}
    weights = dict(zip(NAMES, (256.0, 128.0, 384.0), strict=True))
    replies = [merge.Reply(name, torch.from_numpy(points[name]), weights[name]) for name in NAMES]
    shared_blocks = clients.shared_blocks
    mean = merge.mean(merge.Replies.of(replies), shared_blocks.initial, shared_blocks.groups).point.numpy()
    by_hand = sum(weights[name] * points[name].astype(np.float64) for name in NAMES) / 768.0
    assert mean.tobytes() == np.asarray(by_hand, np.float32).tobytes()
    for answer in train(clients, 1, mean).values():
        np.testing.assert_allclose(answer.point, mean, rtol=0, atol=1e-12)
    clients.close()


# FedProx ------------------------------------------------------------------------------------------------------------

MU = 3.0
WITHOUT_LIMITS = "max_grad_norm = inf\nminibatches = 1\nepochs = 1\nvalue_epochs = 1\n"


def update_with_proximal_term(text: str, mu: float) -> tuple[ClientStack, Tensor, Tensor]:
    """Update clients that are pulled towards a distant anchor; also return parameters and anchor before it."""
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    layout = plain.policy.layout
    shared = layout.mask(block for block in layout.blocks if block.name in ("torso.1", "actor", "critic"))
    stack = replace(plain, proximal_weight=mu * shared)
    torch.manual_seed(5)
    stack.anchor.add_(torch.randn_like(stack.anchor))
    before, anchor = stack.parameters.clone(), stack.anchor.clone()
    batch, targets = experience(stack)
    update_clients(stack, batch, targets, None, np.zeros(2, int), np.zeros(2))
    return stack, before, anchor


def test_the_gradient_of_the_proximal_term_is_added() -> None:
    """Adam's first moment after one step is a tenth of the gradient; autograd gives that of the term."""
    plain, before, anchor = update_with_proximal_term(WITHOUT_LIMITS, 0.0)
    pulled, *_ = update_with_proximal_term(WITHOUT_LIMITS, MU)
    assert pulled.proximal_weight is not None
    leaf = before.clone().requires_grad_()
    shared = pulled.proximal_weight > 0
    (MU / 2 * ((leaf - anchor)[:, shared]).square().sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad[:, shared].abs().min() > 0
    torch.testing.assert_close(10 * (pulled.adam.mean - plain.adam.mean), leaf.grad, rtol=1e-4, atol=1e-4)


def test_the_proximal_term_changes_natural_steps_and_the_critics() -> None:
    """With a damping of 10^6 the Fisher matrix is as good as a multiple of the identity: the step is the gradient."""
    text = f"preset = 'npg'\nlearning_rate = 1e6\nnormalise_advantages = 'off'\n{WITHOUT_LIMITS}"
    text += "[trust]\nregion = 'none'\ncg_damping = 1e6\n"
    plain, before, anchor = update_with_proximal_term(text, 0.0)
    pulled, *_ = update_with_proximal_term(text, MU)
    assert pulled.proximal_weight is not None
    names, layout = pulled.policy.actor_parameters(), pulled.policy.layout
    of_actor = torch.cat([torch.full((slot.size,), slot.name in names) for slot in layout.slots])
    expected = -pulled.proximal_weight * (before - anchor)
    parameter_change = pulled.parameters - plain.parameters
    torch.testing.assert_close(parameter_change[:, of_actor], expected[:, of_actor], rtol=1e-3, atol=1e-3)
    moment_change = pulled.adam.mean - plain.adam.mean
    torch.testing.assert_close(-10 * moment_change[:, ~of_actor], expected[:, ~of_actor], rtol=1e-3, atol=1e-3)
    assert not moment_change[:, of_actor].any()


@pytest.mark.parametrize("target", [0.01, 1e3])
def test_a_line_search_includes_the_proximal_term(target: float) -> None:
    """With such a strong term, the surrogate alone would reject a step towards the anchor and accept one that a wide
    limit lets go far beyond it.
    """
    text = f"preset = 'trpo'\n{WITHOUT_LIMITS}[trust]\ntarget = {target}\n"
    pulled, before, anchor = update_with_proximal_term(text, 1e4)
    assert pulled.proximal_weight is not None
    names = pulled.policy.actor_parameters()
    of_actor = torch.cat([torch.full((slot.size,), slot.name in names) for slot in pulled.policy.layout.slots])
    shared = (pulled.proximal_weight > 0) & of_actor
    before_update, after_update = (((point - anchor)[:, shared]).norm(dim=1) for point in (before, pulled.parameters))
    assert (after_update < before_update).all()


def test_the_proximal_term_pulls_only_shared_blocks_to_the_servers(tmp_path: Path) -> None:
    """A weight of 100 with a learning rate of 0.01 keeps clients near; without it they move ten times as far."""
    distances = {}
    for mu in (0.0, 100.0):
        given = scenario("method=fedprox", f"penalty.squared={mu}", 'policy.shared=["torso.*"]')
        clients = make_clients(given, tmp_path / str(mu))
        sent = random_vector(1, clients.shared_blocks.size)
        answer = train(clients, 1, sent)["cart-0"]
        parameters = load_state(tmp_path / str(mu), "cart-0", 1)["parameters"]
        private = np.delete(parameters - clients.policies.policy.initial(0).numpy(), clients.columns.numpy())
        distances[mu] = np.linalg.norm(answer.point - sent), np.linalg.norm(private)
        clients.close()
    assert distances[100.0][0] < 0.5 * distances[0.0][0]
    assert distances[100.0][1] == pytest.approx(distances[0.0][1], rel=0.5)


# FedRep -------------------------------------------------------------------------------------------------------------


def test_fedrep_trains_the_heads_first_and_then_the_torso() -> None:
    """Equals autograd with an Adam for each part: 2 of 5 epochs train the heads, and 3 the torso."""
    text = "epochs = 5\nminibatches = 1\nlearning_rate = 0.01\nclip = 0.1\n[personal]\nfirst = 0.4\n"
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    layout = plain.policy.layout
    torso = layout.mask(layout.select(["torso.*"]))
    optimisers = tuple(plain.adam.for_columns(part.nonzero().squeeze(1)) for part in (~torso, torso))
    stack = replace(plain, phase_optimisers=optimisers)
    batch, targets = experience(stack)
    start = layout.unstack(stack.parameters.clone())
    update_clients(stack, batch, targets, None, np.zeros(2, int), np.zeros(2))
    for client, values in enumerate(start):
        actor = plain_network(values, ["torso.0", "torso.1", "actor"])
        critic = plain_network(values, ["critic.0", "critic.1", "critic.head"])
        base, heads = list(actor[:4].parameters()), [*actor[4:].parameters(), *critic.parameters()]
        advantages = targets.advantages[client].flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for learning, epochs in ((heads, 2), (base, 3)):
            adam = torch.optim.Adam(learning, lr=0.01, eps=1e-5)
            for _ in range(epochs):
                observations = batch.observations[client].flatten(0, 1)
                chosen = torch.distributions.Categorical(logits=actor(observations))
                ratio = (chosen.log_prob(batch.actions[client].flatten()) - batch.log_probs[client].flatten()).exp()
                surrogate = torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()
                error = (critic(observations).flatten() - targets.returns[client].flatten()).square().mean()
                for parameter in (*base, *heads):
                    parameter.grad = None
                (-surrogate + 0.5 * error).backward()
                nn.utils.clip_grad_norm_(learning, 0.5)
                adam.step()
        parameters = torch.cat([view[client].flatten() for view in stack.views.values()])
        expected = torch.cat([parameter.detach().flatten() for parameter in (*base, *heads)])
        torch.testing.assert_close(parameters, expected, rtol=1e-4, atol=2e-5)
    assert [optimiser.count.flatten().tolist() for optimiser in optimisers] == [[2.0, 2.0], [3.0, 3.0]]


@pytest.mark.parametrize(("first", "heads"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_each_part_has_at_least_one_epoch_and_its_own_step_count(tmp_path: Path, first: float, heads: int) -> None:
    """2 updates of 4 epochs of 2 minibatches; the moments are restored in a new process."""
    given = scenario("method=fedrep", f"personal.first={first}", "objective.epochs=4")
    clients = make_clients(given, tmp_path)
    train(clients, 1, random_vector(1, clients.shared_blocks.size))
    assert load_state(tmp_path, "cart-1", 1)["adam.turns"].tolist() == [4 * heads, 4 * (4 - heads)]
    clients.close()
    restarted = make_clients(given, tmp_path)
    train(restarted, 2, random_vector(2, restarted.shared_blocks.size))
    assert load_state(tmp_path, "cart-1", 2)["adam.turns"].tolist() == [8 * heads, 8 * (4 - heads)]
    restarted.close()


def test_a_group_penalty_applies_only_to_the_part_that_learns() -> None:
    """So large a weight makes all learning parameters zero: the heads, as the update ends before the torso learns."""
    text = "epochs = 2\nminibatches = 1\n[personal]\nfirst = 0.5\n[trust]\nstop = 1e-9\n"
    text += "[penalty]\ntoward = 'zero'\nweight = 1e6\n"
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    torso = plain.policy.layout.mask(plain.policy.layout.select(["torso.*"]))
    optimisers = tuple(plain.adam.for_columns(part.nonzero().squeeze(1)) for part in (~torso, torso))
    stack, before = replace(plain, phase_optimisers=optimisers), plain.parameters.clone()
    update_clients(stack, *experience(stack), None, np.zeros(2, int), np.zeros(2))
    assert not stack.parameters[:, ~torso].any()
    assert torch.equal(stack.parameters[:, torso], before[:, torso])


# Ditto --------------------------------------------------------------------------------------------------------------


def test_dittos_shared_policy_does_not_depend_on_the_personal_ones(tmp_path: Path) -> None:
    """With half of 512 steps for each policy, the shared one is bit for bit that of FedAvg with 256 steps."""
    ditto = make_clients(scenario("method=ditto", "steps=512", "normalise.observations=true"), tmp_path / "ditto")
    fedavg = make_clients(scenario("method=fedavg", "steps=256", "normalise.observations=true"), tmp_path / "fedavg")
    for round in (1, 2, 3):
        sent = random_vector(round, ditto.shared_blocks.size)
        answers, expected = train(ditto, round, sent), train(fedavg, round, sent)
        for name in NAMES:
            assert answers[name].point.tobytes() == expected[name].point.tobytes()
            assert (answers[name].gain, answers[name].spread) == (expected[name].gain, expected[name].spread)
            assert (answers[name].steps, expected[name].steps) == (512, 256)
            assert answers[name].episodes > expected[name].episodes
    ditto.close()
    fedavg.close()


def test_dittos_personal_policy_starts_from_the_first_shared_one(tmp_path: Path) -> None:
    """Without learning, it stays there when the server's policy changes."""
    clients = make_clients(scenario("method=ditto", "steps=512", "objective.learning_rate=1e-20"), tmp_path)
    first, second = (random_vector(round, clients.shared_blocks.size) for round in (1, 2))
    for round, sent in ((1, first), (2, second)):
        train(clients, round, sent)
        state = load_state(tmp_path, "cart-1", round)
        columns = clients.columns.numpy()
        np.testing.assert_allclose(state["parameters"][columns], sent, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state["own.parameters"][columns], first, rtol=0, atol=1e-12)
    clients.close()


def test_without_a_pull_dittos_personal_policy_learns_alone(tmp_path: Path) -> None:
    """It starts from the initial shared policy, and has its own random streams."""
    given = scenario("method=ditto", "steps=512", "personal.pull=0.0", "personal.steps=0.25")
    clients = make_clients(given, tmp_path)
    initial = clients.shared_blocks.initial.numpy()
    learner = StackedLearner(resolve_tasks(given), given, [client_seed(0, f"{name} own") for name in NAMES])
    for round in (1, 2, 3):
        train(clients, round, initial if round == 1 else random_vector(round, clients.shared_blocks.size))
        learner.train(128, (round - 1) / 3, round / 3)
        for row, name in enumerate(NAMES):
            personal = load_state(tmp_path, name, round)["own.parameters"]
            np.testing.assert_array_equal(personal, learner.parameters[row].numpy())
    clients.close()
    learner.close()


def test_dittos_personal_policy_follows_the_shared_one_and_is_evaluated(tmp_path: Path) -> None:
    """The server's policy moves far between two rounds; with a strong pull the personal policy follows it."""
    relative_distance: dict[float, float] = {}
    for pull in (0.0, 30.0):
        overrides = ("method=ditto", "steps=512", "normalise.observations=true", "evaluate.episodes=20")
        clients = make_clients(scenario(*overrides, f"personal.pull={pull}"), tmp_path / str(pull))
        train(clients, 1, random_vector(1, clients.shared_blocks.size))
        before = load_state(tmp_path / str(pull), "cart-0", 1)["own.parameters"][clients.columns.numpy()]
        sent = random_vector(2, clients.shared_blocks.size)
        train(clients, 2, sent)
        state = load_state(tmp_path / str(pull), "cart-0", 2)
        personal = state["own.parameters"]
        after = personal[clients.columns.numpy()]
        relative_distance[pull] = np.linalg.norm(after - sent) / np.linalg.norm(before - sent)
        instruction = Evaluate(Start("run", 2, sent), EvaluationPlan(0))
        (answer,) = clients.answer({"cart-0": instruction}).values()
        with_zeros = clients.answer({"cart-0": Evaluate(Start("run", 2, 0 * sent), EvaluationPlan(0))})["cart-0"]
        assert isinstance(answer, Evaluated)
        assert isinstance(with_zeros, Evaluated)
        assert vars(answer.summary) == vars(with_zeros.summary), "the shared policy is not evaluated"
        learner = StackedLearner([clients.tasks["cart-0"]], clients.scenario)
        learner.parameters[0] = torch.from_numpy(personal)
        assert learner.observation_normaliser is not None
        learner.observation_normaliser.load(0, sub_state(state, "own.observation_normaliser"))
        assert answer.summary.mean == learner.evaluate()[0].score
        learner.close()
        clients.close()
    assert relative_distance[30.0] < 0.95 < relative_distance[0.0]


# FedKL --------------------------------------------------------------------------------------------------------------


def test_fedkls_reference_is_the_policy_with_which_the_round_began(tmp_path: Path) -> None:
    """The reference of a later update is what the server sent, not the policy that collected the batch."""
    clients = make_clients(scenario("method=fedkl"), tmp_path)
    for round in (1, 2):
        sent = torch.from_numpy(random_vector(round, clients.shared_blocks.size))
        train(clients, round, sent.numpy())
    assert clients.learners is not None
    assert isinstance(clients.learners.shared, StackedLearner)
    stack = clients.learners.shared.stacks[0]
    assert torch.equal(stack.anchor[:, clients.columns], sent.expand(3, -1))
    assert not torch.equal(stack.anchor, stack.parameters)
    batch, _ = experience(stack)
    reference = reference_distributions(stack, batch)
    assert reference is not None
    with torch.no_grad():
        expected = stack.policy.act(stack.policy.layout.views(stack.anchor), batch.observations.flatten(1, 2))
    assert torch.equal(reference, expected)
    weights = [load_state(tmp_path, name, 2)["kl_coefficient"].item() for name in NAMES]
    assert any(weight != 1.0 for weight in weights), "the weight adapts and is kept between rounds"
    clients.close()


# Fisher -------------------------------------------------------------------------------------------------------------


def random_states(count: int, size: int, clients: int = 2) -> MeasurementStates:
    rng = np.random.default_rng(3)
    states = [rng.normal(size=(count - client, size)).astype(np.float32) for client in range(clients)]
    return MeasurementStates.of(states, torch.device("cpu"))


def make_policies() -> Mapping[str, StackedPolicy]:
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "{env}"\n' for name, env in (("c", "CartPole-v1"), ("p", "Pendulum-v1"))
    )
    given = scenario(clients=clients)
    policies = {task.env: make_policy(task, given.policy) for task in resolve_tasks(given)}
    with_module = scenario("policy.module=tests.scenario.test_knobs:UserModule", 'policy.shared=["*"]', clients=clients)
    return policies | {"a module": make_policy(resolve_tasks(with_module)[1], with_module.policy)}


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "a module"])
def test_the_fisher_diagonal_is_the_mean_square_of_single_scores(name: str) -> None:
    """Equals autograd state by state, with the same sampled actions; clients have different numbers of states."""
    policy = make_policies()[name]
    torch.manual_seed(0)
    parameters = policy.initial(1) + 0.3 * torch.randn(2, policy.layout.size)
    states, seeds = random_states(7, policy.observation_size), [11, 12]
    fisher = fisher_diagonal(policy, states, parameters, seeds, number=4)
    for client, count in enumerate((7, 6)):
        noise = policy.distribution.draw_noise(generator(seeds[client], Purpose.FISHER, 4), (count,))
        total = torch.zeros(policy.layout.size)
        for n in range(count):
            leaf = parameters[client].clone().requires_grad_()
            output = policy.act(policy.layout.views(leaf[None]), states.observations[client, n][None, None])
            action = policy.distribution.sample(output, torch.from_numpy(noise[n])[None, None]).detach()
            policy.distribution.log_prob(output, action).sum().backward()
            assert leaf.grad is not None
            total += leaf.grad.square()
        torch.testing.assert_close(fisher[client], total / count, rtol=1e-3, atol=1e-6)
        assert fisher[client].max() > 0


def test_the_fisher_diagonal_of_a_softmax_matches_its_formula() -> None:
    """E[x_j^2 p_i (1 - p_i)] for the weight of logit i by input j, within the error of 20,000 samples."""
    policy = ActorCritic(3, Categorical(4), scenario("policy.hidden=[]").policy)
    parameters = policy.initial(0)[None] + 0.5 * torch.randn(1, policy.layout.size, generator=torch.manual_seed(2))
    states = random_states(20_000, 3, clients=1)
    fisher = policy.layout.views(fisher_diagonal(policy, states, parameters, [5], number=0))
    p = policy.act(policy.layout.views(parameters), states.observations)[0].softmax(-1)
    x = states.observations[0]
    expected = torch.einsum("ni,nj->ij", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(fisher["actor.weight"][0], expected, rtol=0.05, atol=0.003)
    torch.testing.assert_close(fisher["actor.bias"][0], (p * (1 - p)).mean(0), rtol=0.05, atol=0.003)
    assert not fisher["critic.head.weight"].any(), "the critic does not affect the actions"


def test_half_the_fisher_is_the_kl_of_a_small_step() -> None:
    """For a step d along a single logit of a softmax, only the diagonal F matters: KL = 1/2 F d^2."""
    policy = ActorCritic(3, Categorical(4), scenario("policy.hidden=[]").policy)
    parameters = policy.initial(0)[None] + 0.5 * torch.randn(1, policy.layout.size, generator=torch.manual_seed(2))
    states = random_states(20_000, 3, clients=1)
    fisher = fisher_diagonal(policy, states, parameters, [5], number=0)[0]
    (bias,) = [slot for slot in policy.layout.slots if slot.name == "actor.bias"]
    steps = [parameters + 0.05 * torch.eye(policy.layout.size)[column] for column in range(bias.start, bias.stop)]
    kl = mean_kl(policy, states, parameters, steps)[:, 0]
    torch.testing.assert_close(kl, 0.5 * 0.05**2 * fisher[bias.start : bias.stop], rtol=0.06, atol=0)


@pytest.mark.parametrize("overrides", [("method=fisher",), ("proximity.mode=quadratic",)])
def test_a_client_sends_its_fisher_diagonal_where_the_server_needs_it(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """The diagonal is that of the policy at the end of the round, on the states that the client kept of the round."""
    clients = make_clients(scenario(*overrides), tmp_path)
    train(clients, 1, random_vector(1, clients.shared_blocks.size))
    answers = train(clients, 2, random_vector(2, clients.shared_blocks.size))
    for row, (name, answer) in enumerate(answers.items()):
        state = load_state(tmp_path, name, 2)
        states = MeasurementStates.of([state["measurement_states"]], torch.device("cpu"))
        parameters = torch.from_numpy(state["parameters"])[None]
        expected = fisher_diagonal(clients.policies.policy, states, parameters, [client_seed(0, NAMES[row])], number=2)
        assert answer.fisher is not None
        assert answer.fisher.dtype == np.float32
        np.testing.assert_allclose(answer.fisher, expected[0, clients.columns].numpy(), rtol=1e-3, atol=1e-6)
    clients.close()
