"""Prompts for small language models, with one right answer each.

Those for the model that ships with grpo_fed are a letter, some digits and "="; `addition` asks in English.
Each function is what `prompts` of a client names: it draws `count` prompts from a generator, each with its answer.
`ascending` and `descending` draw the very same prompts from equal generators and want opposite answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Row = dict[str, str]
"""A prompt and its answer, `{"prompt": "s3142=", "answer": "1234"}`."""


def ascending(generator: np.random.Generator, count: int, digits: int = 4) -> list[Row]:
    """Draw prompts that ask for their digits in ascending order: "s3142=", "1234"."""
    return _rows(generator, count, digits, "s", lambda text: "".join(sorted(text)))


def descending(generator: np.random.Generator, count: int, digits: int = 4) -> list[Row]:
    """Draw prompts that ask for their digits in descending order: "s3142=", "4321"."""
    return _rows(generator, count, digits, "s", lambda text: "".join(sorted(text, reverse=True)))


def backwards(generator: np.random.Generator, count: int, digits: int = 4) -> list[Row]:
    """Draw prompts that ask for their digits from the last to the first: "r3142=", "2413"."""
    return _rows(generator, count, digits, "r", lambda text: text[::-1])


def greatest(generator: np.random.Generator, count: int, digits: int = 4) -> list[Row]:
    """Draw prompts that ask for their greatest digit: "m3142=", "4"."""
    return _rows(generator, count, digits, "m", max)


def addition(generator: np.random.Generator, count: int, largest: int = 9) -> list[Row]:
    """Draw questions for a model that knows English: "What is 3 + 4?", "7"."""
    pairs = generator.integers(0, largest + 1, (count, 2)).tolist()
    return [{"prompt": f"What is {first} + {second}?", "answer": str(first + second)} for first, second in pairs]


def _rows(
    generator: np.random.Generator, count: int, digits: int, letter: str, answer: Callable[[str], str]
) -> list[Row]:
    texts = ["".join(map(str, row)) for row in generator.integers(0, 10, (count, digits))]
    return [{"prompt": f"{letter}{text}=", "answer": answer(text)} for text in texts]
