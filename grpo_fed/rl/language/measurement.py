"""KL between two policies of a client, and its Fisher matrix, both on completions that stay with the client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.rl.language.model import LanguageModel, TokenRows, unpack_rows
from grpo_fed.rl.language.objective import vocabulary_kl

NUMBERS = 1 << 24
"""Numbers of single completions' gradients that are computed at a time."""


@torch.no_grad()
def completion_kl(
    model: LanguageModel, packed: Sequence[Mapping[str, np.ndarray]], old: Tensor, new: Iterable[Tensor]
) -> Tensor:
    """The mean over the tokens of each client's completions of the exact KL(old, new), [M, K].

    old: [K, P], parameters; new: M of [K, P].
    """
    rows, real = unpack_rows(packed, model.device)
    parts = [(rows.part(part), real[:, part]) for part in model.parts(rows)]
    before = [model.distribution(old, part) for part, _ in parts] if len(parts) == 1 else None
    means = []
    for parameters in new:
        total, count = old.new_zeros(len(old)), old.new_zeros(len(old))
        for number, (part, is_real) in enumerate(parts):
            first = model.distribution(old, part) if before is None else before[number]
            kl = vocabulary_kl(first, model.distribution(parameters, part), "old-new")
            valid = part.valid & is_real.unsqueeze(-1)
            total += kl.masked_fill(~valid, 0.0).sum((1, 2))
            count += valid.sum((1, 2))
        means.append(total / count.clamp_min(1))
    return torch.stack(means)


def completion_fisher(model: LanguageModel, packed: Sequence[Mapping[str, np.ndarray]], parameters: Tensor) -> Tensor:
    """The mean of (d log p(completion) / d theta)^2 over each client's completions, [K, P] -> [K, P].

    The completions were sampled by the client's policy at the beginning of its last update. The square of a mean is not
    the mean of squares, so each completion is treated as a client of its own, with the same parameters.
    """
    fisher = torch.zeros_like(parameters)
    size = max(1, NUMBERS // parameters.shape[1])
    for client, each in enumerate(packed):
        rows, _ = unpack_rows([each], model.device)
        count = rows.tokens.shape[1]
        for begin in range(0, count, size):
            part = rows.part(slice(begin, min(begin + size, count)))
            single = _one_by_one(part)
            leaf = parameters[client].detach().expand(len(single.tokens), -1).clone().requires_grad_()
            score = (model.log_probs(leaf, single) * single.valid).sum()
            (gradient,) = torch.autograd.grad(score, leaf)
            fisher[client] += gradient.square().sum(0)
        fisher[client] /= count
    return fisher


def _one_by_one(rows: TokenRows) -> TokenRows:
    """The N completions of one client as those of N clients with one each."""
    of = rows.prompt_of[0]
    return TokenRows(
        rows.prompts[0, of, None],
        rows.prompt_valid[0, of, None],
        torch.zeros_like(of)[:, None],
        rows.tokens.transpose(0, 1),
        rows.valid.transpose(0, 1),
    )
