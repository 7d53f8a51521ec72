"""LanguageModel: one frozen base with its tokenizer, and what K clients' adapters make of it.

One process has one of them for all its clients; the base's numbers are mapped from a file, so that the processes of a
machine share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import open_base
from grpo_fed.policy.language.tokenizer import Tokenizer, open_tokenizer
from grpo_fed.policy.language.transformer import Transformer
from grpo_fed.rl.device import resolve_device
from grpo_fed.scenario.scenario import Scenario

LOGITS = 1 << 25
"""Numbers of the vocabulary's logits that are computed at a time."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Q prompts and N completions of each of K clients."""

    prompts: Tensor
    """[K, Q, T] int64: padded on the left."""
    prompt_valid: Tensor
    """[K, Q, T] bool: False for padding."""
    prompt_of: Tensor
    """[K, N] int64: the prompt that each completion follows; those of a group follow the same one."""
    tokens: Tensor
    """[K, N, C] int64: the completions, padded on the right."""
    valid: Tensor
    """[K, N, C] bool: the tokens of a completion, with the one that ends it."""

    def part(self, rows: slice) -> TokenRows:
        """Some completions of every client, with the prompts that they follow."""
        return replace(
            self, prompt_of=self.prompt_of[:, rows], tokens=self.tokens[:, rows], valid=self.valid[:, rows]
        ).trimmed()

    def take(self, index: Tensor) -> TokenRows:
        """Completions of every client in an order of its own, [K, B] int64."""
        wide = index.unsqueeze(-1).expand(-1, -1, self.tokens.shape[2])
        return replace(
            self,
            prompt_of=self.prompt_of.gather(1, index),
            tokens=self.tokens.gather(1, wide),
            valid=self.valid.gather(1, wide),
        )

    def trimmed(self) -> TokenRows:
        """The same without prompts that no completion follows, and without columns that are padding for all.

        [K, N, C] stays as wide as the longest completion. A client that uses fewer prompts than others keeps some that
        it does not use.
        """
        used = torch.zeros_like(self.prompt_valid[..., 0]).scatter_(1, self.prompt_of, True)
        count = int(used.sum(1).max())
        prompts, valid, prompt_of = self.prompts, self.prompt_valid, self.prompt_of
        if count < used.shape[1]:
            chosen = used.int().argsort(dim=1, descending=True, stable=True)[:, :count, None]
            chosen = chosen.expand(-1, -1, prompts.shape[2])
            prompts, valid = prompts.gather(1, chosen), valid.gather(1, chosen)
            prompt_of = (used.cumsum(1) - 1).gather(1, prompt_of)
        begin = int(valid.flatten(0, 1).any(0).int().argmax())
        return TokenRows(prompts[..., begin:], valid[..., begin:], prompt_of, self.tokens, self.valid)


@final
class LanguageModel:
    """Computes the probabilities of completions under the adapters of K clients."""

    def __init__(self, scenario: Scenario) -> None:
        """Open the model that the scenario names; ValueError where it cannot be opened."""
        settings = self.settings = scenario.language
        base = open_base(settings.model, settings.dtype)
        self.device = resolve_device(scenario.device)
        self.policy = AdapterPolicy(base.shape, settings, scenario.policy)
        self.transformer = Transformer(base, self.policy, self.policy.frozen_factors(scenario.seed), self.device)
        self.tokenizer: Tokenizer = open_tokenizer(settings.model)

    def adapters(self, parameters: Tensor | None) -> Mapping[str, Tensor] | None:
        """Adapters by name from flat parameters [K, P]; None stands for the base alone."""
        return None if parameters is None else self.policy.layout.views(parameters)

    def parts(self, rows: TokenRows) -> Iterator[slice]:
        """The rows in parts that are computed at a time."""
        clients, count, length = rows.tokens.shape
        width = length + math.ceil(rows.prompts.shape[1] * rows.prompts.shape[2] / count)
        by_tokens = self.settings.tokens // (clients * width)
        by_logits = LOGITS // (clients * length * self.policy.shape.vocabulary)
        size = max(1, min(by_tokens, by_logits))
        for begin in range(0, count, size):
            yield slice(begin, min(begin + size, count))

    def distribution(self, parameters: Tensor | None, rows: TokenRows) -> Tensor:
        """Log-probabilities of all tokens at each token of the completions, [K, N, C, V], at the temperature."""
        hidden = self._hidden(parameters, rows)
        return (self.transformer.logits(hidden) / self.settings.temperature).log_softmax(-1)

    def log_probs(self, parameters: Tensor | None, rows: TokenRows) -> Tensor:
        """Log-probabilities of the completions' tokens, [K, N, C], at the temperature."""
        logits = self.transformer.logits(self._hidden(parameters, rows)) / self.settings.temperature
        chosen = logits.gather(-1, rows.tokens.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    def all_log_probs(self, parameters: Tensor | None, rows: TokenRows) -> Tensor:
        """The same as `log_probs`, a part at a time and without gradient."""
        with torch.no_grad():
            return torch.cat([self.log_probs(parameters, rows.part(part)) for part in self.parts(rows)], 1)

    def _hidden(self, parameters: Tensor | None, rows: TokenRows) -> Tensor:
        """The last layer's output where each token of the completions is predicted, [K, N, C, width]."""
        return self.transformer.hidden_after_prompts(
            self.adapters(parameters),
            rows.prompts,
            rows.prompt_valid,
            rows.prompt_of,
            rows.tokens,
            recompute=self.settings.recompute and torch.is_grad_enabled(),
        )


def open_language_model(scenario: Scenario) -> LanguageModel:
    """Open a scenario's model, or return the one that this process has opened last, if it is the same."""
    key = scenario.language, scenario.policy, scenario.seed, scenario.device
    if not _opened or _opened[0][0] != key:
        _opened[:] = [(key, LanguageModel(scenario))]
    return _opened[0][1]


_opened: list[tuple[object, LanguageModel]] = []
"""The model that this process has opened last, with what it depends on."""


# A client's rows as it keeps them between rounds ---------------------------------------------------------------------


def pack_rows(rows: TokenRows, client: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of some of a client's rows: tokens [n, T + C] int32, and the lengths of prompt and completion [n, 2]."""
    of = rows.prompt_of[client].cpu().numpy()[chosen]
    prompts, tokens = rows.prompts[client].cpu().numpy()[of], rows.tokens[client].cpu().numpy()[chosen]
    packed = np.concatenate([prompts, tokens], 1).astype(np.int32)
    lengths = [rows.prompt_valid[client].sum(-1).cpu().numpy()[of], rows.valid[client].sum(-1).cpu().numpy()[chosen]]
    spans = np.stack(lengths, 1).astype(np.int32)
    return {"tokens": packed, "lengths": spans, "width": np.array([prompts.shape[1]])}


def unpack_rows(packed: Sequence[Mapping[str, np.ndarray]], device: torch.device) -> tuple[TokenRows, Tensor]:
    """The rows of K clients from what `pack_rows` made, filled up to the most and longest of any client.

    Gives the rows, and which of them are real, [K, N] bool.
    """
    most = max(len(each["tokens"]) for each in packed)
    longest_prompt = max(int(each["lengths"][:, 0].max()) for each in packed)
    longest = max(int(each["lengths"][:, 1].max()) for each in packed)
    clients = len(packed)
    prompts, tokens = (np.zeros((clients, most, width), np.int64) for width in (longest_prompt, longest))
    prompt_valid, valid = np.zeros(prompts.shape, bool), np.zeros(tokens.shape, bool)
    real = np.zeros((clients, most), bool)
    for client, each in enumerate(packed):
        width = int(each["width"][0])
        for row, (line, (before, after)) in enumerate(zip(each["tokens"], each["lengths"], strict=True)):
            prompts[client, row, longest_prompt - before :] = line[width - before : width]
            prompt_valid[client, row, longest_prompt - before :] = True
            tokens[client, row, :after] = line[width : width + after]
            valid[client, row, :after] = True
            real[client, row] = True
        prompt_valid[client, len(each["tokens"]) :, -1] = True  # a row must have a token to attend to
    prompt_of = np.tile(np.arange(most), (clients, 1))
    arrays = (torch.from_numpy(array).to(device) for array in (prompts, prompt_valid, prompt_of, tokens, valid))
    return TokenRows(*arrays), torch.from_numpy(real).to(device)
