"""What each method is by definition, seen in what the clients do."""

from __future__ import annotations

from collections.abc import Mapping
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
from grpo_fed.rl.measurement import MeasurementStates, fisher_diagonal, mean_kl
from grpo_fed.rl.rng import Purpose, client_seed, generator
from grpo_fed.rl.stacked_learner import StackedLearner, sub_state
from grpo_fed.rl.update import ClientStack, reference_distributions, update_clients
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


def members(given: Scenario, folder: Path) -> Clients:
    return Clients(given, resolve_shared_blocks(given), resolve_tasks(given), StateStore(folder, durable=False))


def trained(asked: Clients, round: int, shared: np.ndarray) -> dict[str, Trained]:
    told = dict.fromkeys(asked.names, Train(Start("run", round, shared), (round - 1) / 3, round / 3))
    return {name: one for name, one in asked.answer(told).items() if isinstance(one, Trained)}


def state(folder: Path, client: str, round: int) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / client / f"round-{round:04d}.safetensors")


def shared_of(round: int, size: int) -> np.ndarray:
    return 0.3 * np.random.default_rng(round).normal(size=size).astype(np.float32)


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
def test_a_method_shares_its_blocks_and_leaves_a_client_all_others(
    tmp_path: Path, method: str, blocks: tuple[str, ...]
) -> None:
    """Nobody learns here: what is shared is what the server sends, and the rest is as it was."""
    asked = members(scenario(f"method={method}", "objective.learning_rate=1e-20"), tmp_path)
    sent = shared_of(1, asked.shared_blocks.size)
    found = trained(asked, 1, sent)["cart-1"]
    np.testing.assert_allclose(found.point, sent, rtol=0, atol=1e-12)
    policy = asked.policy
    first = policy.initial(0)
    for block in policy.layout.blocks:
        place = slice(block.start, block.stop)
        left = state(tmp_path, "cart-1", 1)["parameters"][place]
        assert np.allclose(left, first[place].numpy(), rtol=0, atol=1e-12) == (block.name not in blocks)
    assert asked.shared_blocks.blocks == blocks
    asked.close()


def test_federated_averaging_is_the_weighted_mean_bit_for_bit_and_all_go_on_from_it(tmp_path: Path) -> None:
    asked = members(scenario("method=fedavg", "objective.learning_rate=1e-20"), tmp_path)
    points = {name: shared_of(number, asked.shared_blocks.size) for number, name in enumerate(NAMES)}
    weights = dict(zip(NAMES, (256.0, 128.0, 384.0), strict=True))
    replies = [merge.Reply(name, torch.from_numpy(points[name]), weights[name]) for name in NAMES]
    mean = merge.mean(merge.Replies.of(replies), asked.shared_blocks.initial, asked.shared_blocks.groups).point.numpy()
    by_hand = sum(weights[name] * points[name].astype(np.float64) for name in NAMES) / 768.0
    assert mean.tobytes() == np.asarray(by_hand, np.float32).tobytes()
    for found in trained(asked, 1, mean).values():
        np.testing.assert_allclose(found.point, mean, rtol=0, atol=1e-12)
    asked.close()


# FedProx ------------------------------------------------------------------------------------------------------------

MU = 3.0
WITHOUT_LIMITS = "max_grad_norm = inf\nminibatches = 1\nepochs = 1\nvalue_epochs = 1\n"


def pulled(text: str, mu: float) -> tuple[ClientStack, Tensor, Tensor]:
    """After an update with the actor drawn to an anchor that is elsewhere; and parameters and anchor before."""
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    layout = plain.policy.layout
    shared = layout.mask(block for block in layout.blocks if block.name in ("torso.1", "actor", "critic"))
    stack = ClientStack(**{**vars(plain), "pull": mu * shared})
    torch.manual_seed(5)
    stack.anchor.add_(torch.randn_like(stack.anchor))
    before, anchor = stack.parameters.clone(), stack.anchor.clone()
    batch, judged = experience(stack)
    update_clients(stack, batch, judged, None, np.zeros(2, int), np.zeros(2))
    return stack, before, anchor


def test_the_proximal_terms_gradient_is_added_to_the_objectives() -> None:
    """Adam's first moment after one step is a tenth of the gradient; the term's own comes from autograd."""
    (plain, before, anchor), (drawn, *_) = pulled(WITHOUT_LIMITS, 0.0), pulled(WITHOUT_LIMITS, MU)
    assert drawn.proximal_weight is not None
    free = before.clone().requires_grad_()
    shared = drawn.proximal_weight > 0
    (MU / 2 * ((free - anchor)[:, shared]).square().sum()).backward()
    assert free.grad is not None
    assert free.grad[:, shared].abs().min() > 0
    torch.testing.assert_close(10 * (drawn.adam.mean - plain.adam.mean), free.grad, rtol=1e-4, atol=1e-4)


def test_the_proximal_term_bends_a_natural_step_and_the_critics_too() -> None:
    """With a damping of 10^6 the Fisher matrix is as good as a multiple of the identity: the step is the gradient."""
    text = f"preset = 'npg'\nlearning_rate = 1e6\nnormalise_advantages = 'off'\n{WITHOUT_LIMITS}"
    text += "[trust]\nregion = 'none'\ncg_damping = 1e6\n"
    (plain, before, anchor), (drawn, *_) = pulled(text, 0.0), pulled(text, MU)
    assert drawn.proximal_weight is not None
    names, layout = drawn.policy.actor_parameters(), drawn.policy.layout
    acts = torch.cat([torch.full((slot.size,), slot.name in names) for slot in layout.slots])
    expected = -drawn.proximal_weight * (before - anchor)
    moved = drawn.parameters - plain.parameters
    torch.testing.assert_close(moved[:, acts], expected[:, acts], rtol=1e-3, atol=1e-3)
    fitted = drawn.adam.mean - plain.adam.mean
    torch.testing.assert_close(-10 * fitted[:, ~acts], expected[:, ~acts], rtol=1e-3, atol=1e-3)
    assert not fitted[:, acts].any()


@pytest.mark.parametrize("target", [0.01, 1e3])
def test_a_line_search_judges_what_is_climbed_with_the_proximal_term_in_it(target: float) -> None:
    """Against a pull this strong the surrogate alone would call a step towards the anchor a loss, and one with a limit
    this wide, which goes far beyond the anchor, a gain.
    """
    drawn, before, anchor = pulled(f"preset = 'trpo'\n{WITHOUT_LIMITS}[trust]\ntarget = {target}\n", 1e4)
    assert drawn.proximal_weight is not None
    names = drawn.policy.actor_parameters()
    acts = torch.cat([torch.full((slot.size,), slot.name in names) for slot in drawn.policy.layout.slots])
    shared = (drawn.proximal_weight > 0) & acts
    far, near = (((each - anchor)[:, shared]).norm(dim=1) for each in (before, drawn.parameters))
    assert (near < far).all()


def test_clients_are_drawn_to_what_the_server_sent_in_the_shared_blocks_alone(tmp_path: Path) -> None:
    """A pull of 100 at a step size of 0.01 holds them there; without one they are ten times as far off."""
    far = {}
    for mu in (0.0, 100.0):
        given = scenario("method=fedprox", f"penalty.squared={mu}", 'policy.shared=["torso.*"]')
        asked = members(given, tmp_path / str(mu))
        sent = shared_of(1, asked.shared_blocks.size)
        found = trained(asked, 1, sent)["cart-0"]
        left = state(tmp_path / str(mu), "cart-0", 1)["parameters"]
        private = np.delete(left - asked.policy.initial(0).numpy(), asked.columns.numpy())
        far[mu] = np.linalg.norm(found.point - sent), np.linalg.norm(private)
        asked.close()
    assert far[100.0][0] < 0.5 * far[0.0][0]
    assert far[100.0][1] == pytest.approx(far[0.0][1], rel=0.5)


# FedRep -------------------------------------------------------------------------------------------------------------


def test_in_fedrep_the_heads_learn_on_a_torso_that_rests_and_then_it_under_them() -> None:
    """Written out with autograd and an Adam for either: 2 of 5 epochs for the heads, and 3 for the torso."""
    text = "epochs = 5\nminibatches = 1\nlearning_rate = 0.01\nclip = 0.1\n[personal]\nfirst = 0.4\n"
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    layout = plain.policy.layout
    torso = layout.mask(layout.select(["torso.*"]))
    turns = tuple(plain.adam.for_columns(part.nonzero().squeeze(1)) for part in (~torso, torso))
    stack = ClientStack(**{**vars(plain), "turns": turns})
    batch, judged = experience(stack)
    start = layout.unstack(stack.parameters.clone())
    update_clients(stack, batch, judged, None, np.zeros(2, int), np.zeros(2))
    for client, values in enumerate(start):
        actor = plain_network(values, ["torso.0", "torso.1", "actor"])
        critic = plain_network(values, ["critic.0", "critic.1", "critic.head"])
        base, heads = list(actor[:4].parameters()), [*actor[4:].parameters(), *critic.parameters()]
        advantages = judged.advantages[client].flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for learning, epochs in ((heads, 2), (base, 3)):
            adam = torch.optim.Adam(learning, lr=0.01, eps=1e-5)
            for _ in range(epochs):
                observations = batch.observations[client].flatten(0, 1)
                chosen = torch.distributions.Categorical(logits=actor(observations))
                ratio = (chosen.log_prob(batch.actions[client].flatten()) - batch.log_probs[client].flatten()).exp()
                surrogate = torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()
                error = (critic(observations).flatten() - judged.returns[client].flatten()).square().mean()
                for parameter in (*base, *heads):
                    parameter.grad = None
                (-surrogate + 0.5 * error).backward()
                nn.utils.clip_grad_norm_(learning, 0.5)
                adam.step()
        found = torch.cat([view[client].flatten() for view in stack.views.values()])
        expected = torch.cat([parameter.detach().flatten() for parameter in (*base, *heads)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert [turn.count.flatten().tolist() for turn in turns] == [[2.0, 2.0], [3.0, 3.0]]


@pytest.mark.parametrize(("first", "heads"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_either_part_has_an_epoch_at_least_and_counts_its_own_steps(tmp_path: Path, first: float, heads: int) -> None:
    """2 updates of 4 epochs of 2 minibatches; the moments outlive the process."""
    given = scenario("method=fedrep", f"personal.first={first}", "objective.epochs=4")
    asked = members(given, tmp_path)
    trained(asked, 1, shared_of(1, asked.shared_blocks.size))
    assert state(tmp_path, "cart-1", 1)["adam.turns"].tolist() == [4 * heads, 4 * (4 - heads)]
    asked.close()
    again = members(given, tmp_path)
    trained(again, 2, shared_of(2, asked.shared_blocks.size))
    assert state(tmp_path, "cart-1", 2)["adam.turns"].tolist() == [8 * heads, 8 * (4 - heads)]
    again.close()


def test_a_group_penalty_leaves_alone_what_rests() -> None:
    """A weight this large takes all that moves at once: after the heads' one epoch, with the torso's left out."""
    text = "epochs = 2\nminibatches = 1\n[personal]\nfirst = 0.5\n[trust]\nstop = 1e-9\n"
    text += "[penalty]\ntoward = 'zero'\nweight = 1e6\n"
    given = Scenario.loads(f'name = "a"\n[objective]\n{text}[[clients]]\nname = "c"\nenv = "CartPole-v1"')
    plain = stack_of(given)
    torso = plain.policy.layout.mask(plain.policy.layout.select(["torso.*"]))
    turns = tuple(plain.adam.for_columns(part.nonzero().squeeze(1)) for part in (~torso, torso))
    stack, before = ClientStack(**{**vars(plain), "turns": turns}), plain.parameters.clone()
    update_clients(stack, *experience(stack), None, np.zeros(2, int), np.zeros(2))
    assert not stack.parameters[:, ~torso].any()
    assert torch.equal(stack.parameters[:, torso], before[:, torso])


# Ditto --------------------------------------------------------------------------------------------------------------


def test_what_ditto_shares_does_not_depend_on_the_policies_of_their_own(tmp_path: Path) -> None:
    """With half of 512 steps for each, the shared one does bit for bit what it does in 256 of FedAvg."""
    both = members(scenario("method=ditto", "steps=512", "normalise.observations=true"), tmp_path / "both")
    one = members(scenario("method=fedavg", "steps=256", "normalise.observations=true"), tmp_path / "one")
    for round in (1, 2, 3):
        sent = shared_of(round, both.shared_blocks.size)
        found, expected = trained(both, round, sent), trained(one, round, sent)
        for name in NAMES:
            assert found[name].point.tobytes() == expected[name].point.tobytes()
            assert (found[name].gain, found[name].spread) == (expected[name].gain, expected[name].spread)
            assert (found[name].steps, expected[name].steps) == (512, 256)
            assert found[name].episodes > expected[name].episodes
    both.close()
    one.close()


def test_dittos_own_policy_begins_where_the_server_is_and_then_goes_its_own_way(tmp_path: Path) -> None:
    """Nobody learns here."""
    asked = members(scenario("method=ditto", "steps=512", "objective.learning_rate=1e-20"), tmp_path)
    one, two = (shared_of(round, asked.shared_blocks.size) for round in (1, 2))
    for round, sent in ((1, one), (2, two)):
        trained(asked, round, sent)
        left = state(tmp_path, "cart-1", round)
        columns = asked.columns.numpy()
        np.testing.assert_allclose(left["parameters"][columns], sent, rtol=0, atol=1e-12)
        np.testing.assert_allclose(left["own.parameters"][columns], one, rtol=0, atol=1e-12)
    asked.close()


def test_without_a_pull_dittos_own_policy_learns_alone(tmp_path: Path) -> None:
    """It begins where the shared one does, and draws from streams of its own."""
    given = scenario("method=ditto", "steps=512", "personal.pull=0.0", "personal.steps=0.25")
    asked = members(given, tmp_path)
    first = asked.shared_blocks.initial.numpy()
    fleet = StackedLearner(resolve_tasks(given), given, [client_seed(0, f"{name} own") for name in NAMES])
    for round in (1, 2, 3):
        trained(asked, round, first if round == 1 else shared_of(round, asked.shared_blocks.size))
        fleet.train(128, (round - 1) / 3, round / 3)
        for row, name in enumerate(NAMES):
            own = state(tmp_path, name, round)["own.parameters"]
            np.testing.assert_array_equal(own, fleet.parameters[row].numpy())
    asked.close()
    fleet.close()


def test_dittos_own_policy_is_drawn_to_what_the_server_sent_and_is_what_plays(tmp_path: Path) -> None:
    """From a round to the next the server's policy moves far; drawn strongly, a client's own one follows it."""
    near: dict[float, float] = {}
    for pull in (0.0, 30.0):
        way = ("method=ditto", "steps=512", "normalise.observations=true", "evaluate.episodes=20")
        asked = members(scenario(*way, f"personal.pull={pull}"), tmp_path / str(pull))
        trained(asked, 1, shared_of(1, asked.shared_blocks.size))
        begin = state(tmp_path / str(pull), "cart-0", 1)["own.parameters"][asked.columns.numpy()]
        sent = shared_of(2, asked.shared_blocks.size)
        trained(asked, 2, sent)
        left = state(tmp_path / str(pull), "cart-0", 2)
        own = left["own.parameters"]
        near[pull] = np.linalg.norm(own[asked.columns.numpy()] - sent) / np.linalg.norm(begin - sent)
        told = Evaluate(Start("run", 2, sent), EvaluationPlan(0))
        (found,) = asked.answer({"cart-0": told}).values()
        other = asked.answer({"cart-0": Evaluate(Start("run", 2, 0 * sent), EvaluationPlan(0))})["cart-0"]
        assert isinstance(found, Evaluated)
        assert isinstance(other, Evaluated)
        assert vars(found.played) == vars(other.played), "what the server sends does not play"
        fleet = StackedLearner([asked.tasks["cart-0"]], asked.scenario)
        fleet.parameters[0] = torch.from_numpy(own)
        assert fleet.observation_normaliser is not None
        fleet.observation_normaliser.load(0, sub_state(left, "own.observation_normaliser"))
        assert found.played.mean == fleet.evaluate()[0].score
        fleet.close()
        asked.close()
    assert near[30.0] < 0.95 < near[0.0]


# FedKL --------------------------------------------------------------------------------------------------------------


def test_in_fedkl_a_client_is_held_to_the_policy_that_the_round_began_with(tmp_path: Path) -> None:
    """The reference of a later update is what the server sent, not the policy that collected the batch."""
    asked = members(scenario("method=fedkl"), tmp_path)
    for round in (1, 2):
        sent = torch.from_numpy(shared_of(round, asked.shared_blocks.size))
        trained(asked, round, sent.numpy())
    assert asked._learners is not None
    stack = asked._learners.shared.stacks[0]
    assert torch.equal(stack.anchor[:, asked.columns], sent.expand(3, -1))
    assert not torch.equal(stack.anchor, stack.parameters)
    batch, _ = experience(stack)
    found = reference_distributions(stack, batch)
    assert found is not None
    with torch.no_grad():
        began = stack.policy.act(stack.policy.layout.views(stack.anchor), batch.observations.flatten(1, 2))
    assert torch.equal(found, began)
    weights = [state(tmp_path, name, 2)["kl_coefficient"].item() for name in NAMES]
    assert any(weight != 1.0 for weight in weights), "its weight adapts, and goes along from round to round"
    asked.close()


# Fisher -------------------------------------------------------------------------------------------------------------


def states(count: int, size: int, clients: int = 2) -> MeasurementStates:
    rng = np.random.default_rng(3)
    kept = [rng.normal(size=(count - client, size)).astype(np.float32) for client in range(clients)]
    return MeasurementStates.of(kept, torch.device("cpu"))


def policies() -> Mapping[str, StackedPolicy]:
    clients = "".join(
        f'[[clients]]\nname = "{name}"\nenv = "{env}"\n' for name, env in (("c", "CartPole-v1"), ("p", "Pendulum-v1"))
    )
    given = scenario(clients=clients)
    found = {task.env: make_policy(task, given.policy) for task in resolve_tasks(given)}
    own = scenario("policy.module=test_knobs:Own", 'policy.shared=["*"]', clients=clients)
    return found | {"a module": make_policy(resolve_tasks(own)[1], own.policy)}


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "a module"])
def test_the_fisher_diagonal_is_the_mean_square_of_single_scores(name: str) -> None:
    """State by state with autograd, for the very actions that are drawn; clients have unlike numbers of states."""
    policy = policies()[name]
    torch.manual_seed(0)
    parameters = policy.initial(1) + 0.3 * torch.randn(2, policy.layout.size)
    kept, seeds = states(7, policy.observation_size), [11, 12]
    found = fisher_diagonal(policy, kept, parameters, seeds, number=4)
    for client, count in enumerate((7, 6)):
        noise = policy.distribution.draw_noise(generator(seeds[client], Purpose.FISHER, 4), (count,))
        total = torch.zeros(policy.layout.size)
        for n in range(count):
            free = parameters[client].clone().requires_grad_()
            said = policy.act(policy.layout.views(free[None]), kept.observations[client, n][None, None])
            action = policy.distribution.sample(said, torch.from_numpy(noise[n])[None, None]).detach()
            policy.distribution.log_prob(said, action).sum().backward()
            assert free.grad is not None
            total += free.grad.square()
        torch.testing.assert_close(found[client], total / count, rtol=1e-3, atol=1e-6)
        assert found[client].max() > 0


def test_the_fisher_diagonal_of_a_softmax_is_known() -> None:
    """E[x_j^2 p_i (1 - p_i)] for the weight of logit i by input j, within what 20,000 draws leave."""
    policy = ActorCritic(3, Categorical(4), scenario("policy.hidden=[]").policy)
    parameters = policy.initial(0)[None] + 0.5 * torch.randn(1, policy.layout.size, generator=torch.manual_seed(2))
    kept = states(20_000, 3, clients=1)
    found = policy.layout.views(fisher_diagonal(policy, kept, parameters, [5], number=0))
    p = policy.act(policy.layout.views(parameters), kept.observations)[0].softmax(-1)
    x = kept.observations[0]
    expected = torch.einsum("ni,nj->ij", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(found["actor.weight"][0], expected, rtol=0.05, atol=0.003)
    torch.testing.assert_close(found["actor.bias"][0], (p * (1 - p)).mean(0), rtol=0.05, atol=0.003)
    assert not found["critic.head.weight"].any(), "the critic says nothing of what is done"


def test_half_the_fisher_is_the_kl_of_a_small_step() -> None:
    """Along single logits of a softmax, where the diagonal is all there is: KL = 1/2 F d^2."""
    policy = ActorCritic(3, Categorical(4), scenario("policy.hidden=[]").policy)
    parameters = policy.initial(0)[None] + 0.5 * torch.randn(1, policy.layout.size, generator=torch.manual_seed(2))
    kept = states(20_000, 3, clients=1)
    fisher = fisher_diagonal(policy, kept, parameters, [5], number=0)[0]
    (bias,) = [slot for slot in policy.layout.slots if slot.name == "actor.bias"]
    steps = [parameters + 0.05 * torch.eye(policy.layout.size)[column] for column in range(bias.start, bias.stop)]
    kl = mean_kl(policy, kept, parameters, steps)[:, 0]
    torch.testing.assert_close(kl, 0.5 * 0.05**2 * fisher[bias.start : bias.stop], rtol=0.06, atol=0)


@pytest.mark.parametrize("overrides", [("method=fisher",), ("proximity.mode=quadratic",)])
def test_a_client_sends_its_fisher_diagonal_where_the_server_needs_it(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Of the policy that it leaves the round with, on the states that it kept of it."""
    asked = members(scenario(*overrides), tmp_path)
    trained(asked, 1, shared_of(1, asked.shared_blocks.size))
    for row, (name, found) in enumerate(trained(asked, 2, shared_of(2, asked.shared_blocks.size)).items()):
        left = state(tmp_path, name, 2)
        kept = MeasurementStates.of([left["kept"]], torch.device("cpu"))
        parameters = torch.from_numpy(left["parameters"])[None]
        expected = fisher_diagonal(asked.policy, kept, parameters, [client_seed(0, NAMES[row])], number=2)
        assert found.fisher is not None
        assert found.fisher.dtype == np.float32
        np.testing.assert_allclose(found.fisher, expected[0, asked.columns].numpy(), rtol=1e-3, atol=1e-6)
    asked.close()
