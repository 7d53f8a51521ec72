"""The objective compared with its formula, step by step on torch's own distributions, and with worked examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as peers

from grpo_fed.policy.base import PolicyOutput
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from grpo_fed.rl import objective
from grpo_fed.rl.objective import Coefficients, Surrogate
from grpo_fed.rl.records import Minibatch
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings

K, B = 3, 40
DISTRIBUTIONS = [Categorical(3), MultiCategorical((2, 3)), MultiCategorical((3, 3)), Gaussian(2), SquashedGaussian(2)]
SURROGATES = get_args(Surrogate)
FREE = TrustSettings()
UNHURRIED = settings(deadline=None, max_examples=50)


def policy_and_minibatch(
    distribution: Distribution, seed: int = 0, clients: int = K, steps: int = B, move: float = 0.5
) -> tuple[PolicyOutput, Minibatch]:
    """A minibatch in float64, and what policies that have moved away since then say of it."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(clients, steps, *shape, generator=generator, dtype=torch.float64)

    old = 0.5 * numbers(distribution.parameter_size)
    noise = distribution.draw_noise(np.random.default_rng(seed), (clients, steps))
    actions = distribution.sample(old, torch.from_numpy(noise).double()).double()
    weights = torch.rand(clients, steps, generator=generator, dtype=torch.float64)
    weights[:, -2:] = 0.0
    batch = Minibatch(
        observations=numbers(1),
        actions=actions,
        log_probs=distribution.log_prob(old, actions),
        distribution=old,
        advantages=numbers(),
        returns=numbers(),
        values=numbers(),
        weights=weights / weights.sum(1, keepdim=True),
    )
    return PolicyOutput(
        (old + move * numbers(distribution.parameter_size)).requires_grad_(),
        (batch.values + move * numbers()).requires_grad_(),
    ), batch


def tensors(record: PolicyOutput | Minibatch) -> list[Tensor]:
    return [value for field in fields(record) if (value := getattr(record, field.name)) is not None]


def output_gradients(loss: Tensor, new: PolicyOutput) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss.sum(), (new.distribution, new.values), materialize_grads=True)


# Compared with the formula, one client and one step at a time.


def torch_distributions(distribution: Distribution, parameters: Tensor) -> list[peers.Distribution]:
    """One for each action component; a squashed one before its tanh."""
    if isinstance(distribution, Categorical):
        return [peers.Categorical(logits=parameters)]
    if isinstance(distribution, MultiCategorical):
        return [peers.Categorical(logits=logits) for logits in parameters.split(distribution.counts, -1)]
    mean, log_std = parameters.split(distribution.action_size, -1)
    return [peers.Normal(m, s) for m, s in zip(mean, log_std.exp(), strict=True)]


def loss_by_formula(
    new: PolicyOutput,
    batch: Minibatch,
    distribution: Distribution,
    ours: ObjectiveSettings,
    trust: TrustSettings,
    given: list[dict[str, Any]],
) -> list[Tensor]:
    """The loss of each client, `given[k]` its coefficients."""
    losses = []
    for k, mine in enumerate(given):
        total = torch.zeros((), dtype=torch.float64)
        for b in range(batch.values.shape[1]):
            now, then = (
                torch_distributions(distribution, said[k, b]) for said in (new.distribution, batch.distribution)
            )
            log_prob = torch.stack([p.log_prob(a) for p, a in zip(now, batch.actions[k, b], strict=True)]).sum()
            entropies = [p.entropy() for p in now]
            if isinstance(distribution, SquashedGaussian):
                log_prob = log_prob - (1 - batch.actions[k, b].tanh() ** 2).log().sum()
                entropies = list(distribution.entropy(new.distribution[k, b]))  # tested against its samples elsewhere
            advantage = batch.advantages[k, b]
            ratio = (log_prob - batch.log_probs[k, b]).exp()
            if ours.surrogate == "score":
                surrogate = log_prob * advantage
            elif ours.surrogate == "ratio":
                surrogate = ratio * advantage
            else:
                near = ratio.clamp(1 - mine["clip_low"], 1 + mine["clip_high"])
                surrogate = torch.min(ratio * advantage, near * advantage)
            value, before = new.values[k, b], batch.values[k, b]
            if mine["value_clip"] is not None:
                value = before + (value - before).clamp(-mine["value_clip"], mine["value_clip"])
            step = -surrogate + mine["value"] * (value - batch.returns[k, b]) ** 2
            step = step - sum(weight * entropy for weight, entropy in zip(mine["entropy"], entropies, strict=True))
            if trust.region in ("penalty", "adaptive"):
                first, second = (then, now) if trust.direction == "old-new" else (now, then)
                kl = sum(peers.kl_divergence(p, q) for p, q in zip(first, second, strict=True))
                step = step + mine["kl"] * kl
            total = total + batch.weights[k, b] * step
        losses.append(total)
    return losses


def stack_coefficients(given: list[dict[str, Any]]) -> Coefficients:
    """[K, 1] (entropy [K, C]) from a client's numbers."""
    columns = {}
    for field in fields(Coefficients):
        rows = [mine[field.name] for mine in given]
        columns[field.name] = None if rows[0] is None else torch.tensor(rows, dtype=torch.float64).view(len(rows), -1)
    return Coefficients(**columns)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(
    ("trust", "value_clip"),
    [
        (TrustSettings(), None),
        (TrustSettings(region="hard"), 0.3),
        (TrustSettings(region="penalty", direction="old-new"), 0.3),
        (TrustSettings(region="adaptive", direction="new-old"), None),
    ],
)
def test_the_loss_equals_its_formula_for_clients_with_different_weights(
    distribution: Distribution, surrogate: Surrogate, trust: TrustSettings, value_clip: float | None
) -> None:
    new, batch = policy_and_minibatch(distribution, steps=12)
    ours = ObjectiveSettings(surrogate=surrogate, normalise_advantages="off")
    given = [
        {
            "clip_low": 0.1 + 0.1 * k,
            "clip_high": 0.2 + 0.2 * k,
            "value": 0.5 * k,
            "entropy": [0.1 * k - 0.05 * c for c in range(distribution.components)],
            "kl": 0.3 + k,
            "value_clip": None if value_clip is None else value_clip + 0.1 * k,
        }
        for k in range(K)
    ]
    found, terms = objective.loss(new, batch, distribution, ours, trust, stack_coefficients(given))
    expected = torch.stack(loss_by_formula(new, batch, distribution, ours, trust, given))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms.loss, expected.detach(), rtol=1e-6, atol=1e-9)
    for mine, theirs in zip(output_gradients(found, new), output_gradients(expected, new), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_closed_form_gradients_are_those_of_the_loss(distribution: Distribution) -> None:
    new, batch = policy_and_minibatch(distribution)
    coefficients = Coefficients(0.2, 0.3, 0.5, torch.full((K, distribution.components), 0.01).double(), 1.0)
    trust = TrustSettings(region="penalty")
    slopes, terms = objective.loss_gradients(new, batch, distribution, ObjectiveSettings(), trust, coefficients)
    loss, _ = objective.loss(new, batch, distribution, ObjectiveSettings(), trust, coefficients)
    assert torch.equal(terms.loss, loss.detach())
    by_distribution, by_values = output_gradients(loss, new)
    assert torch.equal(slopes.distribution, by_distribution)
    assert slopes.values is not None
    assert torch.equal(slopes.values, by_values)
    (scaled,) = torch.autograd.grad(
        objective.loss(new, batch, distribution, ObjectiveSettings(), trust, coefficients)[0],
        new.values,
        torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64),
    )
    torch.testing.assert_close(scaled, by_values * torch.tensor([1.0, 2.0, 0.0])[:, None])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_ratio_of_the_episode_is_the_geometric_mean_over_its_steps(
    distribution: Distribution, surrogate: Surrogate
) -> None:
    """Loss and gradient by autograd, an episode at a time; steps without a weight are in no mean."""
    new, batch = policy_and_minibatch(distribution)
    episodes = torch.randint(6, (K, B), generator=torch.Generator().manual_seed(3))
    batch = replace(batch, episodes=episodes)
    ours = ObjectiveSettings(surrogate=surrogate, ratio="episode", normalise_advantages="off")
    found, terms = objective.policy_loss(new, batch, distribution, ours, FREE, Coefficients(0.2, 0.28))
    log_probs = distribution.log_prob(new.distribution, batch.actions)
    total = torch.zeros(K, dtype=torch.float64)
    for k in range(K):
        for episode in range(6):
            steps = (episodes[k] == episode) & (batch.weights[k] > 0)
            ratio = (log_probs - batch.log_probs)[k, steps].mean().exp()
            advantages = batch.advantages[k, steps]
            surrogates = {
                "score": log_probs[k, steps] * advantages,
                "ratio": ratio * advantages,
                "clip": torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages),
            }
            total[k] -= (surrogates[surrogate] * batch.weights[k, steps]).sum()
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(output_gradients(found, new)[0], output_gradients(total, new)[0])
    assert (terms.clipfrac > 0).any() == (surrogate == "clip")


# What it promises.


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_has_the_policy_gradient_at_the_old_policy(
    distribution: Distribution, surrogate: Surrogate
) -> None:
    new, batch = policy_and_minibatch(distribution, move=0.0)
    ours = ObjectiveSettings(surrogate=surrogate, normalise_advantages="off")
    loss, _ = objective.policy_loss(new, batch, distribution, ours, FREE, Coefficients(0.2, 0.2))
    weighted = (distribution.log_prob(new.distribution, batch.actions) * batch.advantages * batch.weights).sum()
    (expected,) = torch.autograd.grad(-weighted, new.distribution)
    torch.testing.assert_close(output_gradients(loss, new)[0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_an_infinite_clip_equals_the_plain_ratio(distribution: Distribution) -> None:
    new, batch = policy_and_minibatch(distribution, move=2.0)
    losses = [
        objective.loss(new, batch, distribution, ObjectiveSettings(surrogate=surrogate), FREE, coefficients)[0]
        for surrogate, coefficients in (
            ("clip", Coefficients(math.inf, math.inf, 0.5)),
            ("ratio", Coefficients(0.2, 0.2, 0.5)),
        )
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(output_gradients(losses[0], new)[0], output_gradients(losses[1], new)[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.56, 0.0),  # above 1 + 0.28 and good: no more
        (1.25, 2.0, 2.5, 2.5),  # the limit above is its own
        (1.5, -1.0, -1.5, -1.5),  # above and bad: come back
        (0.5, -1.0, -0.8, 0.0),  # below 1 - 0.2 and bad: no less
        (0.5, 2.0, 1.0, 1.0),  # below and good: come back
    ],
)
def test_the_clipped_surrogate_matches_a_worked_example(
    ratio: float, advantage: float, surrogate: float, slope: float
) -> None:
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    found = objective.policy_surrogate(log_prob, torch.zeros_like(log_prob), advantages, "clip", 0.2, 0.28)
    assert found.item() == pytest.approx(surrogate)
    (by_log_prob,) = torch.autograd.grad(found, log_prob)
    assert by_log_prob.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (0.5, 0.25, -1.0),
        (3.0, 0.64, 0.0),  # counts as 1.0 + 0.8 and is not pulled
        (-1.0, 0.64, 0.0),  # counts as 1.0 - 0.8
    ],
)
def test_the_clipped_value_loss_matches_a_worked_example(value: float, loss: float, slope: float) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = objective.value_loss(values, one, one, one, clip=0.8)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found, values)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("direction", "kl"),
    [
        ("old-new", 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        ("new-old", 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
    ],
)
def test_the_kl_penalty_matches_a_worked_example(direction: Any, kl: float) -> None:
    new, batch = policy_and_minibatch(Categorical(2), clients=1)
    even = torch.full_like(batch.distribution, 0.5).log()
    tilted = torch.tensor([0.25, 0.75], dtype=torch.float64).log().expand_as(even)
    batch = replace(batch, distribution=even, advantages=torch.zeros_like(batch.values))
    ours, trust = ObjectiveSettings(normalise_advantages="off"), TrustSettings(region="penalty", direction=direction)
    said = PolicyOutput(tilted, new.values)
    loss, terms = objective.loss(said, batch, Categorical(2), ours, trust, Coefficients(0.2, 0.2, kl=3.0))
    assert loss.item() == pytest.approx(3 * kl)
    assert terms.kl.item() == pytest.approx(kl)


def test_an_entropy_group_has_its_own_weight() -> None:
    distribution = MultiCategorical((2, 3))
    new, batch = policy_and_minibatch(distribution)
    batch = replace(batch, advantages=torch.zeros_like(batch.values))
    entropy = torch.tensor([[0.0, 0.5]], dtype=torch.float64).expand(K, 2)
    loss, _ = objective.policy_loss(
        new, batch, distribution, ObjectiveSettings(), FREE, Coefficients(0.2, 0.2, entropy=entropy)
    )
    wheel = (distribution.entropy(new.distribution)[..., 1] * batch.weights).sum(1)
    torch.testing.assert_close(loss, -0.5 * wheel)
    slope = output_gradients(loss, new)[0]
    assert (slope[..., :2] == 0).all()
    assert (slope[:, :-2, 2:] != 0).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_steps_without_weight_do_not_affect_the_loss(distribution: Distribution) -> None:
    new, batch = policy_and_minibatch(distribution)
    coefficients = Coefficients(0.2, 0.2, 0.5, torch.full((K, distribution.components), 0.1).double(), 1.0)
    trust = TrustSettings(region="penalty")
    other = policy_and_minibatch(distribution, seed=1)
    idle = batch.weights == 0

    def mixed(mine: Tensor, theirs: Tensor) -> Tensor:
        mask = idle.view(*idle.shape, *[1] * (mine.dim() - 2))
        return torch.where(mask, theirs, mine).detach().requires_grad_(mine.requires_grad)

    changed = Minibatch(
        *(mixed(mine, theirs) for mine, theirs in zip(tensors(batch)[:-1], tensors(other[1])[:-1], strict=True)),
        weights=batch.weights,
    )
    said = PolicyOutput(mixed(new.distribution, other[0].distribution), mixed(new.values, other[0].values))
    before, terms = objective.loss(new, batch, distribution, ObjectiveSettings(), trust, coefficients)
    after, changed_terms = objective.loss(said, changed, distribution, ObjectiveSettings(), trust, coefficients)
    assert torch.equal(before, after)
    for name in ("policy_loss", "value_loss", "entropy", "kl", "approx_kl", "clipfrac"):
        assert torch.equal(getattr(terms, name), getattr(changed_terms, name))
    for old, fresh in zip(output_gradients(before, new), output_gradients(after, said), strict=True):
        assert torch.equal(old, fresh)
        assert (fresh[idle] == 0).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_a_clients_loss_is_the_same_alone_and_in_a_stack(distribution: Distribution) -> None:
    new, batch = policy_and_minibatch(distribution)
    coefficients = Coefficients(0.2, 0.2, 0.5, 0.1, 1.0)
    trust = TrustSettings(region="penalty")
    together, _ = objective.loss(new, batch, distribution, ObjectiveSettings(), trust, coefficients)
    expected = output_gradients(together, new)
    for k in range(K):
        mine = PolicyOutput(new.distribution[k : k + 1], new.values[k : k + 1])
        own = Minibatch(*(one[k : k + 1] for one in tensors(batch)))
        alone, _ = objective.loss(mine, own, distribution, ObjectiveSettings(), trust, coefficients)
        torch.testing.assert_close(alone[0], together[k])
        for one, all_of_them in zip(output_gradients(alone, new), expected, strict=True):
            torch.testing.assert_close(one[k], all_of_them[k])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_other_clients_batches_do_not_affect_a_clients_loss(distribution: Distribution) -> None:
    coefficients, trust = Coefficients(0.2, 0.2, 0.5, 0.1, 1.0), TrustSettings(region="penalty")
    (new, batch), (other, others) = policy_and_minibatch(distribution), policy_and_minibatch(distribution, seed=1)
    with torch.no_grad():
        said = PolicyOutput(
            *(torch.cat((a[:1], b[1:])).requires_grad_() for a, b in zip(tensors(new), tensors(other), strict=True))
        )
    mixed = Minibatch(*(torch.cat((a[:1], b[1:])) for a, b in zip(tensors(batch), tensors(others), strict=True)))
    before, _ = objective.loss(new, batch, distribution, ObjectiveSettings(), trust, coefficients)
    after, _ = objective.loss(said, mixed, distribution, ObjectiveSettings(), trust, coefficients)
    assert before[0] == after[0]
    assert before[1] != after[1]
    for old, fresh in zip(output_gradients(before, new), output_gradients(after, said), strict=True):
        assert torch.equal(old[0], fresh[0])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_zero_advantages_give_no_policy_gradient(surrogate: Surrogate) -> None:
    new, batch = policy_and_minibatch(Categorical(3))
    batch = replace(batch, advantages=torch.full_like(batch.advantages, 0.1))
    loss, _ = objective.policy_loss(
        new, batch, Categorical(3), ObjectiveSettings(surrogate=surrogate), FREE, Coefficients(0.2, 0.2)
    )
    assert loss.abs().max() < 1e-7
    assert output_gradients(loss, new)[0].abs().max() < 1e-7
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    loss, _ = objective.policy_loss(
        new, batch, Categorical(3), ObjectiveSettings(surrogate=surrogate), FREE, Coefficients(0.2, 0.2)
    )
    assert torch.equal(output_gradients(loss, new)[0], torch.zeros_like(new.distribution))


def test_a_client_without_valid_steps_has_no_gradient() -> None:
    new, batch = policy_and_minibatch(Gaussian(2))
    batch.weights[1] = 0.0
    loss, terms = objective.loss(
        new,
        batch,
        Gaussian(2),
        ObjectiveSettings(),
        TrustSettings(region="penalty"),
        Coefficients(0.2, 0.2, 0.5, 0.1, 1.0),
    )
    assert loss[1] == 0
    for slope in output_gradients(loss, new):
        assert (slope[1] == 0).all()
        assert slope.isfinite().all()
    for name in ("policy_loss", "value_loss", "entropy", "kl", "approx_kl", "clipfrac"):
        assert getattr(terms, name)[1] == 0


def test_the_critic_has_no_gradient_without_a_value_coefficient() -> None:
    new, batch = policy_and_minibatch(Categorical(3))
    coefficients = Coefficients(0.2, 0.2, 0.5)
    slopes, _ = objective.loss_gradients(
        new, batch, Categorical(3), ObjectiveSettings(), FREE, replace(coefficients, value=torch.zeros(K, 1))
    )
    assert slopes.values is None
    whole, terms = objective.loss(new, batch, Categorical(3), ObjectiveSettings(), FREE, coefficients)
    loss, _ = objective.policy_loss(new, batch, Categorical(3), ObjectiveSettings(), FREE, coefficients)
    torch.testing.assert_close(whole - 0.5 * terms.value_loss, loss)
    assert (output_gradients(loss, new)[1] == 0).all()


def test_the_loss_cannot_be_differentiated_twice() -> None:
    new, batch = policy_and_minibatch(Categorical(3))
    loss, _ = objective.loss(new, batch, Categorical(3), ObjectiveSettings(), FREE, Coefficients(0.2, 0.2, 0.5))
    with pytest.raises(AssertionError, match="differentiable once"):
        torch.autograd.grad(loss.sum(), new.values, create_graph=True)


# What is reported.


def test_loss_terms_have_no_graph_and_one_number_per_client() -> None:
    new, batch = policy_and_minibatch(Gaussian(2))
    _, terms = objective.loss(new, batch, Gaussian(2), ObjectiveSettings(), FREE, Coefficients(0.2, 0.2, 0.5))
    for name in ("loss", "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "clipfrac"):
        assert getattr(terms, name).shape == (K,)
        assert not getattr(terms, name).requires_grad


def test_term_means_are_normalised_by_the_sum_of_weights() -> None:
    new, batch = policy_and_minibatch(Gaussian(2))
    less = replace(batch, weights=0.25 * batch.weights)
    coefficients = Coefficients(0.2, 0.2, 0.5)
    _, terms = objective.loss(new, batch, Gaussian(2), ObjectiveSettings(), FREE, coefficients)
    _, fewer = objective.loss(new, less, Gaussian(2), ObjectiveSettings(), FREE, coefficients)
    for name in ("entropy", "kl", "approx_kl", "clipfrac"):
        torch.testing.assert_close(getattr(fewer, name), getattr(terms, name))
    for name in ("loss", "policy_loss", "value_loss"):
        torch.testing.assert_close(getattr(fewer, name), 0.25 * getattr(terms, name))


def test_the_kl_estimate_is_near_the_exact_kl() -> None:
    new, batch = policy_and_minibatch(Categorical(3), clients=1, steps=20_000, move=0.1)
    _, terms = objective.loss(new, batch, Categorical(3), ObjectiveSettings(), FREE, Coefficients(0.2, 0.2))
    assert terms.approx_kl.item() == pytest.approx(terms.kl.item(), rel=0.1)
    assert terms.kl.item() > 0


def test_the_kl_is_nan_without_a_reference() -> None:
    new, batch = policy_and_minibatch(Categorical(3))
    batch = replace(batch, distribution=batch.distribution[..., :0])
    loss, terms = objective.loss(new, batch, Categorical(3), ObjectiveSettings(), FREE, Coefficients(0.2, 0.2))
    assert terms.kl.isnan().all()
    assert loss.isfinite().all()


def test_the_clip_fraction_matches_a_worked_example() -> None:
    new, batch = policy_and_minibatch(Categorical(2), clients=1, steps=4)
    ratios = torch.tensor([[0.7, 0.9, 1.25, 1.4]], dtype=torch.float64)
    batch = replace(
        batch,
        weights=torch.full((1, 4), 0.25, dtype=torch.float64),
        log_probs=Categorical(2).log_prob(new.distribution, batch.actions).detach() - ratios.log(),
    )
    for surrogate, expected in (("clip", 0.5), ("ratio", 0.0), ("score", 0.0)):
        ours = ObjectiveSettings(surrogate=surrogate)  # type: ignore[arg-type]
        _, terms = objective.loss(new, batch, Categorical(2), ours, FREE, Coefficients(0.2, 0.3))
        assert terms.clipfrac.item() == expected


def test_explained_variance_matches_a_worked_example() -> None:
    returns = torch.tensor([[1.0, 3.0, torch.nan], [1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    values = torch.tensor([[1.0, 3.0, 7.0], [3.0, 3.0, 3.0], [0.0, 1.0, 2.0]])
    valid = torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    # All of it, none of it, and nothing to explain.
    assert objective.explained_variance(returns, values, valid).tolist() == [1.0, 0.0, 0.0]


def test_equal_returns_have_no_explained_variance() -> None:
    values = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 3
    returns = (1 - values) + values
    assert returns.std() > 0
    assert objective.explained_variance(returns, values, torch.ones(1, 64, dtype=torch.bool)).tolist() == [0.0]


def test_advantages_are_normalised_by_minibatch_only_on_request() -> None:
    new, batch = policy_and_minibatch(Categorical(3))
    shifted = replace(batch, advantages=3 * batch.advantages + 7)
    for where, same in (("minibatch", True), ("batch", False), ("off", False)):
        ours = ObjectiveSettings(normalise_advantages=where)  # type: ignore[arg-type]
        losses = [
            objective.loss(new, one, Categorical(3), ours, FREE, Coefficients(0.2, 0.2))[0] for one in (batch, shifted)
        ]
        assert torch.allclose(*losses) is same


def test_the_rloo_preset_uses_leave_one_out_advantages_at_every_step() -> None:
    # Two episodes of one choice each, returns 3 and 1: advantages 2 and -2, and half a step's weight each.
    even = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    scalars = [torch.full((1, 2), math.log(0.5)), torch.tensor([[2.0, -2.0]]), torch.zeros(1, 2), torch.zeros(1, 2)]
    log_probs, advantages, returns, values = (scalar.double() for scalar in scalars)
    batch = Minibatch(
        observations=torch.zeros(1, 2, 1),
        actions=torch.tensor([[[0.0], [1.0]]]),
        log_probs=log_probs,
        distribution=even.detach(),
        advantages=advantages,
        returns=returns,
        values=values,
        weights=torch.full((1, 2), 0.5).double(),
    )
    ours = ObjectiveSettings(surrogate="score", normalise_advantages="off")
    loss, _ = objective.policy_loss(
        PolicyOutput(even, values), batch, Categorical(2), ours, FREE, Coefficients(0.2, 0.2)
    )
    (slope,) = torch.autograd.grad(loss.sum(), even)
    # -1/2 * 2 * (1 - 1/2) for the choice of the better episode, and -1/2 * -2 * (0 - 1/2) for it in the other.
    torch.testing.assert_close(slope[0, :, 0], torch.tensor([-0.5, -0.5], dtype=torch.float64))


@dataclass(frozen=True)
class Case:
    """A minibatch that hypothesis makes."""

    distribution: Distribution
    seed: int
    move: float


CASES = st.builds(Case, st.sampled_from(DISTRIBUTIONS), st.integers(0, 2**31), st.floats(0, 2))


@UNHURRIED
@given(CASES, st.floats(0.01, 0.9), st.floats(0.01, 3))
def test_a_clipped_surrogate_never_exceeds_the_plain_one(case: Case, low: float, high: float) -> None:
    new, batch = policy_and_minibatch(case.distribution, case.seed, move=case.move)
    log_probs = case.distribution.log_prob(new.distribution, batch.actions)
    clipped = objective.policy_surrogate(log_probs, batch.log_probs, batch.advantages, "clip", low, high)
    plain = objective.policy_surrogate(log_probs, batch.log_probs, batch.advantages, "ratio", low, high)
    assert (clipped <= plain).all()


@UNHURRIED
@given(CASES, st.sampled_from(SURROGATES))
def test_a_small_step_against_the_gradient_lowers_the_loss(case: Case, surrogate: Surrogate) -> None:
    new, batch = policy_and_minibatch(case.distribution, case.seed, move=0.3 * case.move)
    ours, trust = ObjectiveSettings(surrogate=surrogate), TrustSettings(region="penalty")
    entropy = torch.full((K, case.distribution.components), 0.01).double()
    coefficients = Coefficients(0.2, 0.2, 0.5, entropy, 0.5)

    def measured(said: PolicyOutput) -> tuple[Tensor, Tensor, Tensor]:
        loss, _ = objective.loss(said, batch, case.distribution, ours, trust, coefficients)
        return loss, *output_gradients(loss, said)

    loss, by_distribution, by_values = measured(new)
    moved = PolicyOutput(
        (new.distribution - 1e-4 * by_distribution).detach().requires_grad_(),
        (new.values - 1e-4 * by_values).detach().requires_grad_(),
    )
    promised = 1e-4 * (by_distribution.square().sum((1, 2)) + by_values.square().sum(1))
    assert ((loss - measured(moved)[0]) > 0.9 * promised).all()
