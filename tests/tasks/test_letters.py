"""Prompts of letters and digits, and their answers."""

from __future__ import annotations

import numpy as np

from grpo_fed.tasks import letters


def test_each_kind_of_prompt_has_its_right_answer():
    def first(task: object) -> dict[str, str]:
        return task(np.random.default_rng(8), 3)[0]  # type: ignore[operator]

    digits = first(letters.ascending)["prompt"][1:-1]
    assert len(digits) == 4
    assert first(letters.ascending) == {"prompt": f"s{digits}=", "answer": "".join(sorted(digits))}
    assert first(letters.descending) == {"prompt": f"s{digits}=", "answer": "".join(sorted(digits))[::-1]}
    assert first(letters.backwards) == {"prompt": f"r{digits}=", "answer": digits[::-1]}
    assert first(letters.greatest) == {"prompt": f"m{digits}=", "answer": str(max(map(int, digits)))}


def test_both_orders_are_asked_for_by_the_very_same_prompts():
    up, down = (task(np.random.default_rng(1), 50) for task in (letters.ascending, letters.descending))
    assert [row["prompt"] for row in up] == [row["prompt"] for row in down]
    assert [row["answer"][::-1] for row in up] == [row["answer"] for row in down]


def test_digits_are_as_many_as_asked_for_and_any_of_ten():
    rows = letters.backwards(np.random.default_rng(0), 200, digits=2)
    assert {len(row["answer"]) for row in rows} == {2}
    assert set("".join(row["answer"] for row in rows)) == set("0123456789")
