"""What a client reads and writes: its prompts as tokens, its completions as texts, and what they are rewarded.

Everything is drawn from the client's own streams by number, so an episode's number names its prompt as it names a start
state elsewhere, and a resumed run draws on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from grpo_fed.policy.language.tokenizer import Tokenizer
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.prompts import Row, open_prompts
from grpo_fed.tasks.rewards import open_rewards

TRAINING = (Purpose.PROMPTS, Purpose.COMPARISON)
"""The purposes for which prompts for training are drawn; for all others those for evaluation are."""


@dataclass(frozen=True)
class Prompts:
    """Prompts that were drawn for one client."""

    rows: Sequence[Row]
    """[Q]: as the client's source gave them."""
    texts: Sequence[str]
    """[Q]: as the model reads them, messages written out by its chat template."""
    tokens: Sequence[Sequence[int]]
    """[Q]: the same as tokens."""


@dataclass(frozen=True)
class Rewarded:
    """What N completions of a client were rewarded."""

    rewards: np.ndarray
    """[N]: the weighted sum; NaN for a completion that no function rewarded, which is not learned from."""
    parts: Mapping[str, float]
    """The mean of each function's rewards, by its name; NaN where it gave none."""


@final
class ClientTexts:
    """One client's prompts and rewards, opened."""

    def __init__(self, task: LanguageTask, tokenizer: Tokenizer, context: int, seed: int) -> None:
        """Open them; ValueError where a file, a function or a key of the scenario is wrong.

        context: the most tokens that the model can read. seed: names the client's random streams.
        """
        self.task, self.tokenizer, self.context, self.seed = task, tokenizer, context, seed
        self.source = open_prompts(task.client, task.settings)
        self.rewards = open_rewards(task.client, task.settings)

    def draw(self, purpose: Purpose, number: int, count: int) -> Prompts:
        """Draw the `number`-th batch of `count` prompts of a purpose."""
        source = self.source.train if purpose in TRAINING else self.source.evaluate
        return self.read_rows(source.rows(self._stream(purpose), number, count))

    def read_rows(self, rows: Sequence[Row]) -> Prompts:
        """Turn rows with a key `prompt` into tokens; ValueError for one that is empty, too long or cannot be read."""
        try:
            texts = [self._to_text(row["prompt"]) for row in rows]
            tokens = [
                self.tokenizer.encode(text, special=not self._is_chat(row["prompt"]))
                for row, text in zip(rows, texts, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"client {self.task.client}: prompts: {error}") from error
        longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
        room = self.context - self.task.language.length
        if not 0 < len(tokens[longest]) <= room or not all(tokens):
            empty = next((index for index, each in enumerate(tokens) if not each), None)
            if empty is not None:
                raise ValueError(f"client {self.task.client}: prompts: a prompt has no tokens: {texts[empty]!r}")
            raise ValueError(
                f"client {self.task.client}: prompts: a prompt has {len(tokens[longest])} tokens, and the model reads"
                f" {self.context} with the {self.task.language.length} of language.length:"
                f" {texts[longest][:60]!r}...; shorten it, or language.length"
            )
        return Prompts(rows, texts, tokens)

    def noise(self, purpose: Purpose, number: int, completions: int) -> np.ndarray:
        """Draw what the tokens of these completions are sampled with, [completions, language.length] in [0, 1)."""
        stream = np.random.default_rng([self.seed, Purpose.COMPLETIONS, purpose, number])
        return stream.random((completions, self.task.language.length))

    def write_out(self, tokens: np.ndarray, valid: np.ndarray) -> list[str]:
        """Completions as texts, without the token that ends them, [N, C] int64, [N, C] bool -> [N]."""
        ends = self.tokenizer.end
        return [
            self.tokenizer.decode([int(token) for token in row[real] if int(token) not in ends])
            for row, real in zip(tokens, valid, strict=True)
        ]

    def reward(self, prompts: Prompts, tokens: np.ndarray, valid: np.ndarray) -> Rewarded:
        """Reward N completions of Q prompts, those of a prompt side by side, [N, C] int64, [N, C] bool."""
        per_prompt = len(tokens) // len(prompts.rows)
        rows = [row for row in prompts.rows for _ in range(per_prompt)]
        ids = [row[real].tolist() for row, real in zip(tokens, valid, strict=True)]
        scores = self.rewards.score(self.task.client, rows, self.write_out(tokens, valid), ids)
        means = [_mean_of_given(column) for column in scores.T]
        return Rewarded(self.rewards.total(scores), dict(zip(self.rewards.names, means, strict=True)))

    def _stream(self, purpose: Purpose) -> Callable[[int], np.random.Generator]:
        return lambda number: generator(self.seed, purpose, number)

    def _is_chat(self, prompt: Any) -> bool:
        return self.task.language.chat or not isinstance(prompt, str)

    def _to_text(self, prompt: Any) -> str:
        if not self._is_chat(prompt):
            return str(prompt)
        return self.tokenizer.render_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _mean_of_given(column: np.ndarray) -> float:
    given = column[np.isfinite(column)]
    return float(given.mean()) if len(given) else float("nan")
