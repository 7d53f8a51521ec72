"""Our stacked Adam against torch's."""

import numpy as np
import torch

from grpo_fed.rl.adam import Adam, copy_to_device


def torch_adam(start: torch.Tensor, gradients: list[torch.Tensor], learning_rate: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.Adam([parameter], lr=learning_rate, eps=1e-5)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


def test_each_client_steps_like_torchs_adam_at_its_own_rate() -> None:
    torch.manual_seed(0)
    start, rates = torch.randn(3, 50), [1e-3, 3e-2, 0.5]
    gradients = [torch.randn(3, 50) * 10**scale for scale in (-3, 0, 2, -1, 0)]
    ours, adam = start.clone(), Adam.start(3, 50, 1e-5)
    for gradient in gradients:
        adam.step(ours, gradient, np.array(rates)[:, None])
    for client, rate in enumerate(rates):
        expected = torch_adam(start[client], [gradient[client] for gradient in gradients], rate)
        torch.testing.assert_close(ours[client], expected, rtol=1e-5, atol=1e-6)


def test_an_inactive_client_keeps_parameters_moments_and_count() -> None:
    torch.manual_seed(1)
    ours, adam, rate = torch.randn(2, 9), Adam.start(2, 9, 1e-5), np.full((2, 1), 0.1)
    start = ours.clone()
    gradients = [torch.randn(2, 9) for _ in range(4)]
    pattern = [[True, True], [True, False], [False, False], [True, True]]
    for gradient, active in zip(gradients, pattern, strict=True):
        adam.step(ours, gradient, rate, torch.tensor(active))
    for client in range(2):
        mine = [gradient[client] for gradient, active in zip(gradients, pattern, strict=True) if active[client]]
        torch.testing.assert_close(ours[client], torch_adam(start[client], mine, 0.1), rtol=1e-5, atol=1e-6)
    assert adam.count.flatten().tolist() == [3.0, 2.0]


def test_rows_share_memory_with_the_whole() -> None:
    whole, parameters = Adam.start(4, 3, 1e-5), torch.zeros(4, 3)
    whole.rows(slice(1, 3)).step(parameters[1:3], torch.ones(2, 3), np.full((2, 1), 0.1))
    assert whole.count.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
    assert parameters.abs().sum(1).gt(0).tolist() == [False, True, True, False]


def test_numbers_arrive_on_the_device_to_the_last_bit() -> None:
    for values in (np.full((5, 1), 0.1), 1 - 0.999 ** np.arange(1.0, 6.0)[:, None], np.full((1, 1), 3e-4)):
        numbers = values.astype(np.float32)
        assert copy_to_device(numbers, torch.device("cpu")).numpy().tobytes() == numbers.tobytes()
