"""A small scenario of clients with prompts, and one client's training once more, by transformers and torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.source import TINY
from grpo_fed.rl.language.batches import CompletionBatch
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.resolve import resolve_tasks

WORDS = """
name = "words"
rounds = 2
steps = 8
device = "cpu"
[language]
model = "tiny"
rank = 2
length = 6
maps = ["q_proj", "down_proj"]
[policy]
shared = ["layers.*"]
[rollout]
num_envs = 8
[group]
size = 4
[objective]
preset = "dr-grpo"
learning_rate = 0.02
epochs = 1
[proximity]
states = 6
[merge]
episodes = 4
[evaluate]
episodes = 6
[[clients]]
name = "up"
prompts = "grpo_fed.tasks.letters:ascending"
rewards = [{ function = "tests.support.small_language:near" }]
[[clients]]
name = "back"
prompts = "grpo_fed.tasks.letters:backwards"
kwargs = { digits = 3 }
rewards = [{ function = "tests.support.small_language:near" }]
[[clients]]
name = "down"
prompts = "grpo_fed.tasks.letters:descending"
rewards = [{ function = "tests.support.small_language:near" }, { function = "exact", weight = 0.5 }]
"""
CLIENTS = ("up", "back", "down")


def words(*overrides: str, clients: Sequence[str] = CLIENTS, text: str = WORDS) -> Scenario:
    """Make the scenario: three clients that answer eight prompts in two rounds."""
    head, *entries = text.split("[[clients]]")
    kept = [entry for entry in entries if any(f'name = "{name}"' in entry for name in clients)]
    return Scenario.loads("[[clients]]".join([head, *kept]), overrides=overrides)


def make_learner(given: Scenario, clients: Sequence[str] = CLIENTS) -> LanguageLearner:
    """Make a learner of some of a scenario's clients."""
    tasks = [task for task in resolve_tasks(given) if isinstance(task, LanguageTask) and task.client in clients]
    return LanguageLearner(tasks, given)


def move(learner: LanguageLearner, size: float = 0.02, seed: int = 3) -> Tensor:
    """Put random adapters in place, other ones for each client by its name; return a copy, [K, P]."""
    for row, name in enumerate(learner.names):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        learner.parameters[row] = size * torch.randn(learner.parameters.shape[1], generator=generator)
    return learner.parameters.clone()


# Rewards of tests ----------------------------------------------------------------------------------------------------


def near(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return the part of the answer's digits that are in their place."""
    return [
        sum(own == right for own, right in zip(text, answer, strict=False)) / max(len(text), len(answer), 1)
        for text, answer in zip(completions, answer, strict=True)
    ]


def never(completions: Sequence[str], **_: Any) -> list[None]:
    """Return no reward for any completion."""
    return [None] * len(completions)


def always(completions: Sequence[str], **_: Any) -> list[float]:
    """Return the same reward for every completion."""
    return [1.0] * len(completions)


def of_odd(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    """Reward every second completion alone, by the numbers of its tokens."""
    return [float(sum(ids) % 7) if number % 2 else None for number, ids in enumerate(completion_ids)]


def fails(completions: Sequence[str], **_: Any) -> list[float]:
    """Raise an error."""
    raise RuntimeError("the judge is ill")


def too_few(completions: Sequence[str], **_: Any) -> list[float]:
    """Return one reward too few."""
    return [0.0] * (len(completions) - 1)


# Prompts of tests ----------------------------------------------------------------------------------------------------


def endless(generator: np.random.Generator, count: int, length: int = 500) -> list[dict[str, str]]:
    """Return prompts that are longer than the model reads."""
    return [{"prompt": "s" + "1" * length + "=", "answer": "1"} for _ in range(count)]


def chats(generator: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Return prompts that are chat messages."""
    return [{"prompt": [{"role": "user", "content": "s12="}], "answer": "12"} for _ in range(count)]


def unknown_letters(generator: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Return prompts with a letter that the tiny model does not know."""
    return [{"prompt": "s1ß=", "answer": "1"} for _ in range(count)]


def often_equal(generator: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Return prompts that half of the time any completion answers."""
    rows = generator.integers(0, 10, (count, 4))
    return [{"prompt": f"s{''.join(map(str, row))}=", "easy": str(row[0] % 2)} for row in rows]


def easy_or_first(completions: Sequence[str], easy: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for completions of an easy prompt, and else whether the first digit is even."""
    return [float(each == "1" or text[:1] in tuple("02468")) for text, each in zip(completions, easy, strict=True)]


# The plain implementation --------------------------------------------------------------------------------------------


@cache
def plain_model() -> Any:
    """Open the tiny model in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@dataclass(frozen=True)
class PlainCompletion:
    """One completion as lists without padding."""

    prompt: list[int]
    tokens: list[int]
    old: Tensor
    """[C]: log-probabilities when it was sampled."""
    reward: float
    ended: bool


def completions_of(batch: CompletionBatch, client: int) -> list[PlainCompletion]:
    """Take one client's completions out of a batch."""
    rows = batch.rows
    return [
        PlainCompletion(
            rows.prompts[client, prompt][rows.prompt_valid[client, prompt]].tolist(),
            rows.tokens[client, n][rows.valid[client, n]].tolist(),
            batch.log_probs[client, n][rows.valid[client, n]],
            float(batch.rewards[client, n]),
            bool(batch.ended[client, n]),
        )
        for n, prompt in enumerate(rows.prompt_of[client].tolist())
    ]


def plain_distribution(
    policy: AdapterPolicy,
    factors: Mapping[str, Tensor],
    flat: Tensor | None,
    prompt: Sequence[int],
    tokens: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of all tokens at each token of one completion, [C, V]; each weight is W + scale B A.

    flat: one client's adapters [P]; None for the base alone. factors: A where it does not learn.
    """
    model = plain_model()
    weights = dict(model.named_parameters())
    values = {} if flat is None else {**factors, **policy.layout.views(flat)}
    for name in {name.rpartition(".")[0] for name in values}:
        _, layer, linear = name.split(".")
        module = "self_attn" if linear in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        path = f"model.layers.{layer}.{module}.{linear}.weight"
        weights[path] = weights[path].detach() + policy.scale * values[f"{name}.B"] @ values[f"{name}.A"]
    ids = torch.tensor([[*prompt, *tokens]])
    logits = functional_call(model, weights, (ids,), {"use_cache": False}).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
