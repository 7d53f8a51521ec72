"""Activations on tensors and arrays, and their gradients, against float64 and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_fed.policy.activations import ACTIVATIONS, fast_tanh_


@pytest.mark.parametrize("by_numpy", [True, False])
def test_both_forms_of_fast_tanh_equal_tanh(by_numpy: bool):
    x = torch.linspace(-20, 20, 400_001)
    x[0], x[-1], x[1], x[2] = -torch.inf, torch.inf, -1e30, 1e30
    expected = x.double().tanh()
    actual = fast_tanh_(x.clone(), by_numpy)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-7)
    assert float(actual.abs().max()) == 1.0
    assert bool(fast_tanh_(torch.tensor([float("nan")]), by_numpy).isnan().all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tensors_arrays_and_autograd_give_the_same_activations(name: str):
    activation = ACTIVATIONS[name]
    x = torch.linspace(-3, 3, 61) + 0.01
    leaf = x.clone().requires_grad_()
    recorded = activation.forward(leaf)
    (expected,) = torch.autograd.grad(recorded.sum(), leaf)
    with torch.no_grad():
        value = activation.forward(x.clone())
        gradient = activation.backward(torch.ones_like(x), value)
    torch.testing.assert_close(value, recorded.detach(), rtol=0, atol=3e-7)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    array = activation.forward_numpy(x.numpy().copy())
    np.testing.assert_allclose(array, recorded.detach().numpy(), rtol=0, atol=3e-7)
