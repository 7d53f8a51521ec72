"""The query by which clients measure the KL of a step, on states that stay with them.

A client gets two models, before the whole step and after it, and steps that go a fraction of the way in each block. A
Flower app answers with a function of its own from two models to the KL between their policies:

    @app.query()
    def query(message, context):
        return answer_query(message, lambda before, after: my_kl(before, after))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from grpo_fed.aggregation.proximity import StepFractions
from grpo_fed.flower.array_blocks import Arrays
from grpo_fed.flower.block_server import Candidate
from grpo_fed.policy.blocks import Layout

BEFORE, AFTER, STEPS, KL = "before", "after", "steps", "kl"
"""The records of a query: two models, and the steps; and that of its answer."""
FRACTIONS, BLOCK_OF = "fractions", "block-of-array"
"""In the steps: the fractions of all steps, one after another, and the block's number of each array, -1 for none."""


def make_query(candidate: Candidate, fractions: Sequence[StepFractions], layout: Layout) -> RecordDict:
    """Write the steps that a client is to measure. fractions: [M], of each block."""
    numbers = {block.name: number for number, block in enumerate(layout.blocks)}
    block_of = {slot.name: numbers[slot.block] for slot in layout.slots}
    steps = ConfigRecord(
        {
            FRACTIONS: [float(fraction) for step in fractions for fraction in step],
            BLOCK_OF: [block_of.get(name, -1) for name in candidate.before],
        }
    )
    before, after = to_record(candidate.before), to_record(candidate.after)
    return RecordDict({BEFORE: before, AFTER: after, STEPS: steps})


def answer_query(message: Message, kl: Callable[[ArrayRecord, ArrayRecord], float]) -> Message:
    """Answer a query with the KL of each step.

    kl: the mean KL(before, after) between the policies of two models, on states that the client has seen.
    """
    before = message.content.array_records[BEFORE]
    values = [float(kl(before, to_record(arrays))) for arrays in _models(message.content)]
    return Message(RecordDict({KL: MetricRecord({KL: values})}), reply_to=message)


def read_answer(content: RecordDict, steps: int) -> list[float]:
    """Read the KL of each of so many steps; ValueError where it is none. NaN stands for a policy that is broken."""
    values = content.metric_records.get(KL, MetricRecord()).get(KL)
    if not isinstance(values, list) or len(values) != steps:
        raise ValueError(f"its answer has no {steps} numbers {KL!r}; answer with grpo_fed.flower.answer_query")
    if any(value < -1e-4 for value in values):
        raise ValueError(f"its KL is {min(values):g}, and no KL is below 0; is it computed from before to after?")
    return [value if math.isnan(value) else max(0.0, float(value)) for value in values]


def to_arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Read the arrays of a record."""
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    """Write arrays as a record."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def _models(content: RecordDict) -> Iterator[Arrays]:
    """Yield the model after each step."""
    before, after = to_arrays(content.array_records[BEFORE]), to_arrays(content.array_records[AFTER])
    steps = content.config_records[STEPS]
    fractions, numbers = _list(steps[FRACTIONS]), [int(number) for number in _list(steps[BLOCK_OF])]
    blocks = max(numbers) + 1
    for start in range(0, len(fractions), blocks):
        alphas = [*fractions[start : start + blocks], 0.0]  # the last is that of arrays in no block
        yield {
            name: _between(before[name], after[name], alphas[number])
            for name, number in zip(before, numbers, strict=True)
        }


def _list(value: object) -> list[float]:
    """Read a list of a configuration, whose values Flower gives wider types."""
    assert isinstance(value, list), "the server writes lists"
    return [float(entry) for entry in value]


def _between(before: np.ndarray, after: np.ndarray, alpha: float) -> np.ndarray:
    """Go a fraction of the way, with the bits of `interpolate`."""
    if alpha in (0, 1):
        return after if alpha else before
    first, last = (torch.from_numpy(each.astype(np.float32)) for each in (before, after))
    return torch.lerp(first, last, alpha).numpy().astype(before.dtype)
