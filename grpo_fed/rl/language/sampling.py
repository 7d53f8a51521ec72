"""Samples the completions of K clients token by token, by one uniform number for each token.

K clients, Q prompts each, N = Q * group completions each, T tokens of a prompt, C of a completion, V in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.language.cache import Cache
from grpo_fed.policy.language.transformer import Adapters, Transformer


@dataclass(frozen=True, eq=False)
class Completions:
    """Prompts and what K clients wrote after them; those of one prompt follow each other."""

    prompts: Tensor
    """[K, Q, T] int64, padded on the left."""
    prompt_valid: Tensor
    """[K, Q, T] bool: False for padding."""
    tokens: Tensor
    """[K, N, C] int64; 0 after the end."""
    log_probs: Tensor
    """[K, N, C] float32: of each token in the distribution that it was sampled from; 0 after the end."""
    valid: Tensor
    """[K, N, C] bool: which tokens belong to the completion; the one that ends it does."""
    ended: Tensor
    """[K, N] bool: whether the completion ended by itself; it was cut off otherwise."""


@torch.no_grad()
def sample_completions(
    transformer: Transformer,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    group: int,
    noise: np.ndarray,
    temperature: float,
    stop: Iterable[int],
    greedy: bool = False,
    tokens_at_a_time: int = 16_384,
) -> Completions:
    """Sample `group` completions of each prompt.

    A token is where the distribution function passes its uniform number, so that a client's completions depend on its
    own prompts and noise, and neither on other clients nor on `tokens_at_a_time`.

    prompts: tokens of each of the Q prompts of each client. noise: [K, Q * group, C], uniform in [0, 1); C is the most
    tokens of a completion. stop: tokens that end one. greedy: take the likeliest token instead. tokens_at_a_time: how
    many tokens of all clients are in memory at a time; a part of the prompts is completed after the other.

    Raises a ValueError where a prompt is empty, or is longer with its completion than the model's context.
    """
    length, count = noise.shape[-1], len(prompts[0])
    longest = max(len(prompt) for client in prompts for prompt in client)
    _check_prompts(prompts, length, transformer.shape.context)
    chunk = max(1, tokens_at_a_time // (len(prompts) * group * (longest + length)))
    ends = torch.tensor(sorted(stop), device=transformer.device)
    parts = []
    for first in range(0, count, chunk):
        some = [client[first : first + chunk] for client in prompts]
        draws = noise[:, first * group : (first + chunk) * group]
        uniform = None if greedy else torch.from_numpy(np.float32(draws)).to(transformer.device)
        tokens, valid = pad_prompts(some, longest, transformer.device)
        parts.append(_sample(transformer, adapters, tokens, valid, group, length, uniform, temperature, ends))
    fields = zip(*parts, strict=True)
    return Completions(*(torch.cat(field, 1) for field in fields))


def pad_prompts(prompts: Sequence[Sequence[Sequence[int]]], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: tokens [K, Q, length] int64, and which are valid, bool."""
    tokens = np.zeros((len(prompts), len(prompts[0]), length), np.int64)
    valid = np.zeros(tokens.shape, bool)
    for client, own in enumerate(prompts):
        for row, prompt in enumerate(own):
            tokens[client, row, length - len(prompt) :] = prompt
            valid[client, row, length - len(prompt) :] = True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(valid).to(device)


def _sample(
    transformer: Transformer,
    adapters: Adapters | None,
    prompts: Tensor,
    prompt_valid: Tensor,
    group: int,
    length: int,
    uniform: Tensor | None,
    temperature: float,
    ends: Tensor,
) -> tuple[Tensor, ...]:
    """Complete prompts [K, Q, T] at once and return the fields of `Completions`."""
    clients, count, longest = prompts.shape
    rows = (clients, count * group)
    tokens = torch.zeros(*rows, length, dtype=torch.int64, device=prompts.device)
    log_probs = torch.zeros(*rows, length, device=prompts.device)
    valid = torch.zeros(*rows, length, dtype=torch.bool, device=prompts.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompts.device)
    padded = None if bool(prompt_valid.all()) else prompt_valid
    cache = Cache(longest)
    hidden = transformer.hidden(adapters, prompts, padded, cache)[:, :, -1]
    hidden = hidden.repeat_interleave(group, 1)
    cache = cache.repeat(group, longest + length)
    for step in range(length):
        if step:
            hidden = transformer.hidden(adapters, tokens[..., step - 1 : step], None, cache)[:, :, 0]
        scores = transformer.logits(hidden) / temperature
        chosen = scores.argmax(-1) if uniform is None else _choose(scores, uniform[..., step])
        likely = scores.gather(-1, chosen[..., None])[..., 0] - scores.logsumexp(-1)
        valid[..., step] = ~ended
        tokens[..., step] = chosen.masked_fill(ended, 0)
        log_probs[..., step] = likely.masked_fill(ended, 0.0)
        ended |= torch.isin(chosen, ends) & ~ended
        if bool(ended.all()):
            break
    return prompts, prompt_valid, tokens, log_probs, valid, ended


def _choose(scores: Tensor, uniform: Tensor) -> Tensor:
    """Sample tokens [K, N] from softmax(scores) [K, N, V]: the first at which the distribution function passes them."""
    passed = scores.softmax(-1).cumsum(-1)
    below_one = 1 - 2**-24  # float32 may have rounded to 1
    bound = uniform.clamp_max(below_one)[..., None] * passed[..., -1:]
    return torch.searchsorted(passed, bound, right=True)[..., 0]


def _check_prompts(prompts: Sequence[Sequence[Sequence[int]]], length: int, context: int) -> None:
    for client in prompts:
        for prompt in client:
            if not prompt:
                raise ValueError("a prompt has no tokens; there is nothing that could be completed")
            if len(prompt) + length > context:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and a completion of {length} are longer than the model's context"
                    f" of {context}; shorten the prompt or language.length"
                )
