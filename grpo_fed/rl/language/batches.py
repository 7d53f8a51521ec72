"""A batch of completions: prompts are drawn, answered by each client's policy, rewarded and put in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.rl.language.model import LanguageModel, TokenRows
from grpo_fed.rl.language.sampling import sample_completions
from grpo_fed.rl.language.texts import ClientTexts, Prompts
from grpo_fed.rl.rng import Purpose
from grpo_fed.scenario.settings import GroupSettings


@dataclass(frozen=True, eq=False)
class CompletionBatch:
    """What K clients wrote: N completions each, those of a prompt side by side."""

    rows: TokenRows
    log_probs: Tensor
    """[K, N, C]: log-probabilities of the tokens when they were sampled."""
    ended: Tensor
    """[K, N] bool: False for completions that were cut off."""
    rewards: Tensor
    """[K, N]: NaN where no function gave a reward."""
    parts: Sequence[Mapping[str, float]]
    """[K]: means of each reward function, by its name."""
    prompts: Sequence[Prompts]
    """[K]."""


def write_completions(
    model: LanguageModel,
    texts: Sequence[ClientTexts],
    parameters: Tensor,
    purpose: Purpose,
    numbers: Sequence[int],
    count: int,
    group: int,
    greedy: bool = False,
) -> CompletionBatch:
    """Let K clients answer prompts, and reward their completions.

    parameters: [K, P]. purpose, numbers: [K], name the draws of prompts and of tokens, the same for any policy.
    count: of prompts. group: completions of each prompt. greedy: whether the likeliest tokens are taken.
    """
    prompts = [text.draw(purpose, number, count) for text, number in zip(texts, numbers, strict=True)]
    noise = [text.noise(purpose, number, count * group) for text, number in zip(texts, numbers, strict=True)]
    settings = model.settings
    written = sample_completions(
        model.transformer,
        model.adapters(parameters),
        [each.tokens for each in prompts],
        group,
        np.stack(noise).reshape(len(texts), count * group, settings.length),
        settings.temperature,
        model.tokenizer.end,
        greedy=greedy,
        tokens_at_a_time=settings.tokens,
    )
    longest = int(written.valid.sum(-1).max())
    written = replace(
        written,
        tokens=written.tokens[..., :longest],
        log_probs=written.log_probs[..., :longest],
        valid=written.valid[..., :longest],
    )
    tokens, valid = written.tokens.cpu().numpy(), written.valid.cpu().numpy()
    rewarded = [
        text.reward(each, tokens[client], valid[client])
        for client, (text, each) in enumerate(zip(texts, prompts, strict=True))
    ]
    rewards = np.stack([each.rewards for each in rewarded]).astype(np.float32)
    return CompletionBatch(
        TokenRows(
            written.prompts,
            written.prompt_valid,
            torch.arange(count, device=written.tokens.device).repeat_interleave(group).repeat(len(texts), 1),
            written.tokens,
            written.valid,
        ),
        written.log_probs,
        written.ended,
        torch.from_numpy(rewards).to(parameters.device),
        [each.parts for each in rewarded],
        prompts,
    )


def completion_groups(rewards: Tensor, settings: GroupSettings) -> Tensor:
    """The group of each completion, [K, N] -> [K, N] int64: its prompt, or all with `group.by = "task"`."""
    clients, count = rewards.shape
    numbers = torch.arange(count, device=rewards.device) // settings.size
    return (numbers if settings.by == "start" else torch.zeros_like(numbers)).expand(clients, -1)


def replace_equal_groups(
    batch: CompletionBatch, equal: Tensor, other: CompletionBatch, differs: Tensor, clients: np.ndarray
) -> CompletionBatch:
    """Put completions of another batch where a client's groups are equal, as far as it has groups that differ.

    equal: [K, N] bool, completions of a group with equal rewards. other: what some clients, rows of the batch, have
    written to replace them. differs: [len(clients), N] bool, its completions that may take their place. Both come in
    whole groups of the same size.
    """
    index = torch.arange(batch.rewards.shape[1], device=equal.device).repeat(len(equal), 1)
    count = index.shape[1]
    row_of = torch.zeros(len(equal), dtype=torch.int64, device=equal.device)  # whoever wrote nothing takes nothing
    for row, client in enumerate(clients.tolist()):
        row_of[client] = row
        places = equal[client].nonzero().squeeze(1)
        others = differs[row].nonzero().squeeze(1)[: len(places)]
        index[client, places[: len(others)]] = others + count
    more = TokenRows(*(getattr(other.rows, each.name)[row_of] for each in fields(TokenRows)))
    rows, more_rows = _same_width(batch.rows, more)
    joined = TokenRows(
        torch.cat([rows.prompts, more_rows.prompts], 1),
        torch.cat([rows.prompt_valid, more_rows.prompt_valid], 1),
        torch.cat([rows.prompt_of, more_rows.prompt_of + rows.prompts.shape[1]], 1),
        torch.cat([rows.tokens, more_rows.tokens], 1),
        torch.cat([rows.valid, more_rows.valid], 1),
    )

    def choose(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], 1).gather(1, index)

    width = rows.tokens.shape[2]
    log_probs = torch.cat([_pad(batch.log_probs, width), _pad(other.log_probs[row_of], width)], 1)
    return replace(
        batch,
        rows=joined.take(index).trimmed(),
        log_probs=log_probs.gather(1, index.unsqueeze(-1).expand(-1, -1, width)),
        ended=choose(batch.ended, other.ended[row_of]),
        rewards=choose(batch.rewards, other.rewards[row_of]),
    )


def _same_width(first: TokenRows, second: TokenRows) -> tuple[TokenRows, TokenRows]:
    """Fill up rows of two batches to the same widths."""
    before = max(first.prompts.shape[2], second.prompts.shape[2])
    after = max(first.tokens.shape[2], second.tokens.shape[2])

    def widen(rows: TokenRows) -> TokenRows:
        left = before - rows.prompts.shape[2]
        prompts, prompt_valid = (torch.nn.functional.pad(each, (left, 0)) for each in (rows.prompts, rows.prompt_valid))
        tokens, valid = _pad(rows.tokens, after), _pad(rows.valid, after)
        return TokenRows(prompts, prompt_valid, rows.prompt_of, tokens, valid)

    return widen(first), widen(second)


def _pad(values: Tensor, width: int) -> Tensor:
    """Fill up with zeros on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))


def sampled_entropies(batch: CompletionBatch) -> Tensor:
    """The mean over each client's tokens of -log pi, [K, 1]: an estimate of the entropy of the policy that wrote them.

    Its mean over what might have been sampled is the entropy itself, and it needs no distribution.
    """
    valid = batch.rows.valid
    total = batch.log_probs.masked_fill(~valid, 0.0).sum((1, 2))
    return -(total / valid.sum((1, 2))).unsqueeze(1)
