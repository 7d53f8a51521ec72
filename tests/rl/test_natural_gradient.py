"""Conjugate gradient, Fisher products and line searches against dense algebra."""

import torch
from torch import Tensor

from grpo_fed.rl.natural_gradient import conjugate_gradient, fisher_product, line_search


def test_conjugate_gradient_solves_each_clients_system() -> None:
    torch.manual_seed(0)
    roots = torch.randn(3, 12, 12, dtype=torch.float64)
    matrices = roots @ roots.transpose(1, 2) + 0.5 * torch.eye(12, dtype=torch.float64)
    target = torch.randn(3, 12, dtype=torch.float64)
    found = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], target, 40, tolerance=1e-24)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, target), rtol=1e-8, atol=1e-8)


def test_a_solved_client_does_not_change_while_others_iterate() -> None:
    """The first client's system is the identity: solved after one iteration, whatever the others still need."""
    torch.manual_seed(1)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrices = torch.stack([torch.eye(8, dtype=torch.float64), root @ root.T + torch.eye(8, dtype=torch.float64)])
    target = torch.randn(2, 8, dtype=torch.float64)
    found = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], target, 20)
    torch.testing.assert_close(found[0], target[0])
    alone = conjugate_gradient(lambda v: v, target[:1], 20)
    torch.testing.assert_close(found[:1], alone)


def test_a_direction_without_curvature_is_not_followed() -> None:
    """The second client's matrix is 0; rounding may make a curvature negative."""
    matrices = torch.stack([torch.eye(3), torch.zeros(3, 3), -1e-9 * torch.eye(3)])
    found = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], torch.ones(3, 3), 5)
    torch.testing.assert_close(found, torch.stack([torch.ones(3), torch.zeros(3), torch.zeros(3)]))


def test_the_fisher_product_is_that_of_the_dense_matrix() -> None:
    """For logits z = W x the Fisher matrix is E[x x' kron (diag(p) - p p')], written here by hand."""
    torch.manual_seed(2)
    weight = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(20, 4, dtype=torch.float64)
    logs = torch.log_softmax(inputs @ weight[0].T, -1)
    old = logs.detach()
    kl = (old.exp() * (old - logs)).sum(-1).mean()[None]
    product = fisher_product(kl, [weight], damping=0.1)
    p = old.exp()
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("bij,bk,bl->ikjl", spread, inputs, inputs).reshape(12, 12) / 20
    vector = torch.randn(1, 12, dtype=torch.float64)
    torch.testing.assert_close(product(vector)[0], dense @ vector[0] + 0.1 * vector[0])


def test_the_line_search_takes_each_clients_longest_step_within_the_limit() -> None:
    """KL = scale^2: limit 1 takes the whole step; 0.5 fails at 1 and 0.8, holds at 0.64; 1e-9 never holds."""

    def measure(scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale[:, 0] ** 2, scale[:, 0]

    found = line_search(measure, torch.tensor([1.0, 0.5, 1e-9]), torch.zeros(3))
    torch.testing.assert_close(found.scale[:, 0], torch.tensor([1.0, 0.64, 0.0]))
    torch.testing.assert_close(found.kl, torch.tensor([1.0, 0.4096, 0.0]))
    torch.testing.assert_close(found.gain, torch.tensor([1.0, 0.64, 0.0]))


def test_a_step_that_does_not_raise_the_surrogate_is_not_taken() -> None:
    found = line_search(lambda scale: (0 * scale[:, 0], -scale[:, 0]), torch.ones(1), torch.zeros(1))
    assert found.scale.item() == 0.0
