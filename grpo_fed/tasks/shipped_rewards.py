r"""The rewards that a scenario names by a short word. They have the signature of TRL's rewards and can be used there.

    exact     the completion is the answer
    numeric   the last number of the completion is that of the answer
    pattern   the completion matches a regular expression
    format    the completion consists of tagged parts, such as <think>...</think><answer>...</answer>
    length    the completion is short

Each takes completions that are text, or lists of chat messages, of which the last one counts. A completion whose row
has no answer is left out by the rewards that need one: they return None for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Completion: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text, or chat messages."""


def exact(completions: Sequence[Completion], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1 where the completion equals the column `answer`, without spaces around either, and 0 elsewhere."""
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def numeric(
    completions: Sequence[Completion], answer: Sequence[Any], *, tolerance: float = 1e-6, **_: Any
) -> list[float | None]:
    r"""Return 1 where the last number of the completion equals the last one of the column `answer`, and 0 elsewhere.

    Numbers may have signs, decimals, exponents and commas between thousands, and may be fractions, 3/4 or \frac{3}{4}.
    If there is a \boxed{...}, or else a ####, only what is in the last one, or after it, counts.

    tolerance: largest difference, relative to the answer where that is above 1.

    A completion whose answer has no number is left out (None).
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance = {tolerance} must be 0 or more")
    rewards: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        expected = None if right is None else last_number(str(right))
        found = last_number(text_of(completion))
        if expected is None:
            rewards.append(None)
        else:
            rewards.append(float(found is not None and abs(found - expected) <= tolerance * max(1.0, abs(expected))))
    return rewards


def pattern(completions: Sequence[Completion], *, pattern: str, full: bool = True, **_: Any) -> list[float]:
    """Return 1 where the completion matches a regular expression of Python, and 0 elsewhere.

    full: whether all of the completion must match, or any part of it.
    """
    expression = re.compile(pattern)
    match = expression.fullmatch if full else expression.search
    return [float(match(text_of(completion)) is not None) for completion in completions]


def format(completions: Sequence[Completion], *, tags: Sequence[str] = ("think", "answer"), **_: Any) -> list[float]:
    """Return 1 where the completion consists of <tag>...</tag> for each tag in this order, and 0 elsewhere.

    Each tag occurs once, and only spaces and line ends are around and between the parts.
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f'tags = {tags!r} must be a list such as ["think", "answer"]')
    parts = r"\s*".join(f"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    expression = re.compile(rf"\s*{parts}\s*", re.DOTALL)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    texts = [text_of(completion) for completion in completions]
    return [float(all(text.count(mark) == 1 for mark in marks) and bool(expression.fullmatch(text))) for text in texts]


def length(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], *, target: int, most: int, **_: Any
) -> list[float]:
    """Return 1 for completions of at most `target` tokens, less for longer ones in proportion, and 0 from `most` on."""
    if not 0 <= target < most:
        raise ValueError(f"target = {target}, most = {most}: target must be 0 or more, and most above it")
    return [min(max((most - len(tokens)) / (most - target), 0.0), 1.0) for tokens in completion_ids]


SHIPPED_REWARDS: dict[str, Callable[..., Any]] = {
    "exact": exact,
    "numeric": numeric,
    "pattern": pattern,
    "format": format,
    "length": length,
}
"""By their names in a scenario."""


def score_answers(
    completions: Sequence[Completion], entry: Sequence[Any], score_answer: Sequence[Callable[..., float]], **_: Any
) -> list[float]:
    """Return what a task of reasoning-gym scores, from 0 to 1: the reward of its prompts if a scenario gives none.

    The answer is what the last <answer>...</answer> of a completion encloses, or all of a completion without it. An
    answer that the task fails on is worth 0: some tasks do on text of another form than theirs.
    """
    answers = [_tagged_answer(text_of(completion)) for completion in completions]
    return [_score_answer(score, text, of) for score, text, of in zip(score_answer, answers, entry, strict=True)]


def _score_answer(score: Callable[..., float], answer: str, entry: Mapping[str, Any]) -> float:
    """Score one answer; raises what the task raises if it fails on the right answer, too."""
    try:
        return score(answer, entry)
    except Exception:  # noqa: BLE001, a task may raise anything on text that is no answer of its kind
        score(entry["answer"], entry)
        return 0.0


# Reading completions -------------------------------------------------------------------------------------------------


def text_of(completion: Completion) -> str:
    """Return a completion's text, of chat messages that of the last one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def last_number(text: str) -> float | None:
    r"""Return the last number of a text, or of its last \boxed{...}, or after its last ####; None if there is none."""
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    boxed = text.rpartition(r"\boxed{")
    part = _until_closed(boxed[2]) if boxed[1] else text.rpartition("####")[2]
    numbers = _NUMBER.findall(part)
    if not numbers:
        return None
    above, below = (float(figures.replace(",", "") or 1) for figures in numbers[-1])
    value = above / below if below else math.nan
    return value if math.isfinite(value) else None


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?:(?<![\w).])[-+])?(?<![\w.])(?:{_DIGITS}))(?:\s*/\s*({_DIGITS}))?", re.ASCII)
"""A number and what it is divided by. Digits within a word are none, and a minus after a number is no sign."""


def _until_closed(text: str) -> str:
    """Return a text up to the brace that closes one opened before it."""
    depth = 1
    for position, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:position]
    return text


def _tagged_answer(text: str) -> str:
    """Return what the last <answer>...</answer> encloses, or all of a text without it, without spaces around."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (tagged[-1] if tagged else text).strip()
