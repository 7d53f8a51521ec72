"""Every distribution against torch.distributions, against numbers by hand and against its own samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor
from torch import distributions as peers

from grpo_fed.policy.distributions import (
    Categorical,
    Distribution,
    Gaussian,
    Hybrid,
    MultiCategorical,
    SquashedGaussian,
)

CHOICES = [Categorical(2), Categorical(5), MultiCategorical((3, 3)), MultiCategorical((2, 4, 3))]
GAUSSIANS = [Gaussian(1), Gaussian(3), SquashedGaussian(1), SquashedGaussian(2)]
NO_DEADLINE = settings(deadline=None, max_examples=50)
HYBRIDS = [Hybrid(MultiCategorical((3,)), Gaussian(1)), Hybrid(MultiCategorical((2, 4)), Gaussian(3))]
SQUASHED_HYBRID = Hybrid(MultiCategorical((2, 3)), SquashedGaussian(2))
ALL = [*CHOICES, *GAUSSIANS, *HYBRIDS]
NOT_SQUASHED = [d for d in ALL if not isinstance(d, SquashedGaussian)]


def torch_distributions(distribution: Distribution, parameters: Tensor) -> list[peers.Distribution]:
    """Make a distribution of torch's own for each action component."""
    if isinstance(distribution, Categorical):
        return [peers.Categorical(logits=parameters)]
    if isinstance(distribution, Hybrid):
        logits, moments = parameters.tensor_split([distribution.choices.parameter_size], -1)
        parts = (distribution.choices, logits), (distribution.point, moments)
        return [peer for part, its in parts for peer in torch_distributions(part, its)]
    if isinstance(distribution, MultiCategorical):
        return [peers.Categorical(logits=logits) for logits in parameters.split(distribution.counts, -1)]
    mean, log_std = parameters.split(distribution.action_size, -1)
    normals = [peers.Normal(m, s) for m, s in zip(mean.unbind(-1), log_std.exp().unbind(-1), strict=True)]
    if isinstance(distribution, Gaussian):
        return list(normals)
    return [peers.TransformedDistribution(normal, peers.TanhTransform()) for normal in normals]


def random_parameters(distribution: Distribution, shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw distribution parameters [*shape, M], float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, distribution.parameter_size, generator=generator, dtype=torch.float64)


def sample_actions(distribution: Distribution, parameters: Tensor, seed: int = 0) -> Tensor:
    """Sample actions [..., A] in the dtype of the parameters."""
    noise = distribution.draw_noise(np.random.default_rng(seed), tuple(parameters.shape[:-1]))
    return distribution.sample(parameters, torch.from_numpy(noise).to(parameters)).to(parameters)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_log_probabilities_are_those_of_torch(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (3, 50), scale=0.5)  # torch's atanh is inexact near 1
    actions = sample_actions(distribution, parameters)
    outcome = actions.tanh() if isinstance(distribution, SquashedGaussian) else actions
    pairs = zip(torch_distributions(distribution, parameters), outcome.unbind(-1), strict=True)
    expected = torch.stack([peer.log_prob(action) for peer, action in pairs]).sum(0)
    torch.testing.assert_close(distribution.log_prob(parameters, actions), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("distribution", NOT_SQUASHED, ids=str)
def test_entropies_are_those_of_torch(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (3, 50))
    expected = torch.stack([peer.entropy() for peer in torch_distributions(distribution, parameters)], -1)
    torch.testing.assert_close(distribution.entropy(parameters), expected)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_divergences_are_those_of_torch(distribution: Distribution) -> None:
    p, q = random_parameters(distribution, (3, 50), 1), random_parameters(distribution, (3, 50), 2)
    pairs = zip(torch_distributions(distribution, p), torch_distributions(distribution, q), strict=True)
    expected = torch.stack([peers.kl_divergence(a, b) for a, b in pairs]).sum(0)
    torch.testing.assert_close(distribution.kl(p, q), expected)


def test_log_probabilities_entropies_and_divergences_by_hand() -> None:
    uniform = torch.zeros(4)
    assert Categorical(4).entropy(uniform).item() == pytest.approx(math.log(4))
    assert Categorical(4).log_prob(uniform, torch.tensor([2.0])).item() == pytest.approx(-math.log(4))
    fair, biased = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert Categorical(2).kl(fair, biased).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert Categorical(2).kl(biased, fair).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5
    )
    standard, moved = torch.tensor([0.0, 0.0]), torch.tensor([3.0, math.log(2)])
    assert Gaussian(1).log_prob(standard, torch.tensor([2.0])).item() == pytest.approx(-2 - 0.5 * math.log(2 * math.pi))
    assert Gaussian(1).entropy(standard).item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e))
    assert Gaussian(1).kl(standard, moved).item() == pytest.approx(math.log(2) + (1 + 9) / 8 - 0.5)
    assert SquashedGaussian(1).log_prob(standard, torch.tensor([1.0])).item() == pytest.approx(
        -0.5 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(1) ** 2)
    )


def test_each_component_has_its_own_entropy() -> None:
    parameters = torch.cat((torch.zeros(2), torch.zeros(8)))
    entropies = MultiCategorical((2, 8)).entropy(parameters)
    torch.testing.assert_close(entropies, torch.tensor([math.log(2), math.log(8)]))


@pytest.mark.parametrize("counts", [(3, 3), (2, 4, 3)])
def test_the_probabilities_of_all_actions_sum_to_one(counts: tuple[int, ...]) -> None:
    distribution = MultiCategorical(counts)
    actions = torch.tensor(list(itertools.product(*map(range, counts))), dtype=torch.float64)
    parameters = random_parameters(distribution, (1,)).expand(len(actions), -1)
    assert distribution.log_prob(parameters, actions).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("distribution", CHOICES, ids=str)
def test_choices_are_as_frequent_as_their_probabilities(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (1,)).expand(20_000, -1)
    actions = sample_actions(distribution, parameters)
    for component, peer in enumerate(torch_distributions(distribution, parameters[0])):
        assert isinstance(peer, peers.Categorical)
        counts = torch.bincount(actions[:, component].long(), minlength=len(peer.probs)).numpy()
        assert stats.chisquare(counts, peer.probs.numpy() * len(actions)).pvalue > 1e-3


@pytest.mark.parametrize("distribution", GAUSSIANS, ids=str)
def test_points_are_normally_distributed(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (1,))
    actions = sample_actions(distribution, parameters.expand(20_000, -1)).numpy()
    mean, log_std = parameters[0].split(distribution.action_size)
    for component in range(distribution.action_size):
        normal = stats.norm(mean[component].item(), log_std[component].exp().item())
        assert stats.kstest(actions[:, component], normal.cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_arrays_and_tensors_give_the_same_actions(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (2, 8)).float()
    noise = distribution.draw_noise(np.random.default_rng(3), (2, 8))
    assert noise.dtype == np.float32
    assert noise.shape == (2, 8, distribution.noise_size)
    array, tensor = (
        distribution.sample(parameters.numpy(), noise),
        distribution.sample(parameters, torch.from_numpy(noise)),
    )
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    assert array.shape == (2, 8, distribution.action_size)
    np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(distribution.mode(parameters.numpy()), distribution.mode(parameters).numpy())


@pytest.mark.parametrize("distribution", NOT_SQUASHED, ids=str)
def test_no_other_action_is_likelier_than_the_mode(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (1,)).expand(500, -1)
    best = distribution.log_prob(parameters, distribution.mode(parameters).to(parameters))
    assert (distribution.log_prob(parameters, sample_actions(distribution, parameters)) <= best).all()


def test_a_choice_with_probability_zero_is_never_sampled() -> None:
    parameters = torch.tensor([-1e9, 0.0, 0.0, 0.0, -1e9]).expand(5_000, -1)
    actions = sample_actions(MultiCategorical((2, 3)), parameters)
    assert set(actions[:, 0].tolist()) == {1.0}
    assert set(actions[:, 1].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_the_pullback_is_the_gradient_of_autograd(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (2, 9)).requires_grad_()
    actions = sample_actions(distribution, parameters.detach())
    by_log_prob, by_entropy = torch.randn(2, 9).double(), torch.randn(2, 9, distribution.components).double()
    log_prob, entropy, pullback = distribution.vjp(parameters, actions)
    assert entropy is not None
    for gradients in ((by_log_prob, by_entropy), (by_log_prob, None)):
        outputs = (log_prob, entropy) if gradients[1] is not None else (log_prob,)
        (expected,) = torch.autograd.grad(outputs, parameters, gradients[: len(outputs)], retain_graph=True)
        with torch.no_grad():
            actual = pullback(*gradients)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_gradients_are_those_of_finite_differences(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (4,), scale=0.5).requires_grad_()
    actions, other = sample_actions(distribution, parameters.detach()), random_parameters(distribution, (4,), 5, 0.5)
    assert torch.autograd.gradcheck(lambda x: distribution.evaluate(x, actions), parameters)
    assert torch.autograd.gradcheck(lambda x: (distribution.kl(x, other), distribution.kl(other, x)), parameters)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_evaluate_is_log_prob_and_entropy(distribution: Distribution) -> None:
    parameters = random_parameters(distribution, (2, 9))
    actions = sample_actions(distribution, parameters)
    log_prob, entropy = distribution.evaluate(parameters, actions)
    torch.testing.assert_close(log_prob, distribution.log_prob(parameters, actions))
    torch.testing.assert_close(entropy, distribution.entropy(parameters))
    assert distribution.evaluate(parameters, actions, entropy=False)[1] is None


def test_the_curvature_of_the_divergence_is_the_fisher_matrix() -> None:
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    actual = torch.autograd.functional.hessian(lambda x: Categorical(3).kl(logits, x), logits)
    probs = logits.softmax(-1)
    torch.testing.assert_close(actual, probs.diag() - probs.outer(probs))
    normal = torch.tensor([0.3, -0.7], dtype=torch.float64)
    actual = torch.autograd.functional.hessian(lambda x: Gaussian(1).kl(normal, x), normal)
    torch.testing.assert_close(actual, torch.tensor([math.exp(1.4), 2.0], dtype=torch.float64).diag())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-2.0, 1.5), (3.0, 0.05)])
def test_the_squashed_entropy_is_that_of_its_samples(mean: float, std: float) -> None:
    parameters = torch.tensor([mean, math.log(std)], dtype=torch.float64)
    distribution = SquashedGaussian(1)
    log_probs = distribution.log_prob(parameters, sample_actions(distribution, parameters.expand(200_000, -1)))
    error = 5 * log_probs.std().item() / math.sqrt(len(log_probs))
    assert distribution.entropy(parameters).item() == pytest.approx(-log_probs.mean().item(), abs=error)


@pytest.mark.parametrize(("std", "error"), [(0.1, 1e-9), (1.0, 2e-7), (3.0, 5e-3)])
def test_the_squashed_entropy_is_as_exact_as_its_quadrature_says(std: float, error: float) -> None:
    def integrand(z: float) -> float:
        u = abs(0.5 + std * z)
        return float(stats.norm.pdf(z)) * 2 * (math.log(2) - u - math.log1p(math.exp(-2 * u)))

    expected = (
        0.5 * math.log(2 * math.pi * math.e * std**2) + integrate.quad(integrand, -12, 12, points=[-0.5 / std])[0]
    )
    parameters = torch.tensor([0.5, math.log(std)], dtype=torch.float64)
    assert SquashedGaussian(1).entropy(parameters).item() == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("point", [-60.0, -9.0, 0.0, 9.0, 60.0])
def test_squashed_log_probabilities_hold_where_tanh_is_flat(point: float) -> None:
    parameters = torch.tensor([point, 0.0], requires_grad=True)
    log_prob = SquashedGaussian(1).log_prob(parameters, torch.tensor([point]))
    # 1 - tanh(u)^2 -> 4 exp(-2 |u|)
    slope = math.log(4) - 2 * abs(point) - 2 * math.log1p(math.exp(-2 * abs(point)))
    assert log_prob.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - slope, rel=1e-6)
    log_prob.backward()
    assert parameters.grad is not None
    assert parameters.grad.isfinite().all()


@pytest.mark.parametrize("distribution", CHOICES, ids=str)
def test_certain_choices_give_no_nan(distribution: Distribution) -> None:
    parameters = (1e4 * random_parameters(distribution, (50,)).float()).requires_grad_()
    actions = sample_actions(distribution, parameters.detach())
    log_prob, entropy = distribution.evaluate(parameters, actions)
    assert entropy is not None
    (log_prob.sum() + entropy.sum() + distribution.kl(parameters, parameters.flip(0)).sum()).backward()
    assert parameters.grad is not None
    for numbers in (log_prob, entropy, parameters.grad):
        assert numbers.isfinite().all()
    assert (entropy >= 0).all()


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_noise_depends_on_its_own_generator_alone(distribution: Distribution) -> None:
    alone = distribution.draw_noise(np.random.default_rng(7), (5, 2))
    np.random.default_rng(8).random(100)
    np.testing.assert_array_equal(alone, distribution.draw_noise(np.random.default_rng(7), (5, 2)))
    assert np.isfinite(alone).all()


@NO_DEADLINE
@given(st.integers(0, 2**31), st.sampled_from(ALL), st.floats(0.01, 3))
def test_a_divergence_is_not_negative_and_zero_from_itself(seed: int, distribution: Distribution, scale: float) -> None:
    p, q = random_parameters(distribution, (6,), seed, scale), random_parameters(distribution, (6,), seed + 1, scale)
    assert (distribution.kl(p, q) >= 0).all()
    assert distribution.kl(p, p).abs().max() < 1e-12


@NO_DEADLINE
@given(st.integers(0, 2**31), st.sampled_from(CHOICES), st.floats(-30, 30))
def test_adding_a_number_to_all_logits_changes_nothing(seed: int, distribution: Distribution, shift: float) -> None:
    parameters = random_parameters(distribution, (6,), seed)
    actions = sample_actions(distribution, parameters, seed)
    for actual, expected in zip(
        distribution.evaluate(parameters + shift, actions), distribution.evaluate(parameters, actions), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_a_hybrid_is_its_parts_side_by_side() -> None:
    """A choice of two with logits log 3 and 0, and a real number with mean 1 and standard deviation 2."""
    hybrid = Hybrid(MultiCategorical((2,)), Gaussian(1))
    parameters = torch.tensor([math.log(3), 0.0, 1.0, math.log(2)], dtype=torch.float64)
    action = torch.tensor([1.0, 5.0], dtype=torch.float64)  # the second choice, two standard deviations above the mean
    by_hand = math.log(1 / 4) - 2 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert float(hybrid.log_prob(parameters, action)) == pytest.approx(by_hand)
    entropies = [0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2) + 0.5 * math.log(2 * math.pi * math.e)]
    assert hybrid.entropy(parameters).tolist() == pytest.approx(entropies)
    other = torch.tensor([0.0, 0.0, 0.0, math.log(2)], dtype=torch.float64)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 1 / 8
    assert float(hybrid.kl(parameters, other)) == pytest.approx(divergence)
    assert (hybrid.head_size, hybrid.log_std_size, hybrid.components) == (3, 1, 2)
    assert hybrid.mode(parameters).tolist() == [0.0, 1.0]


def test_a_squashed_hybrid_sums_what_its_parts_have() -> None:
    parameters = random_parameters(SQUASHED_HYBRID, (4, 7))
    actions = sample_actions(SQUASHED_HYBRID, parameters)
    choices, point = SQUASHED_HYBRID.choices, SQUASHED_HYBRID.point
    expected = choices.log_prob(parameters[..., :5], actions[..., :2]) + point.log_prob(
        parameters[..., 5:], actions[..., 2:]
    )
    torch.testing.assert_close(SQUASHED_HYBRID.log_prob(parameters, actions), expected)
