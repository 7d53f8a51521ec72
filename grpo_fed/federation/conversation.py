"""Conversation: sends a round's instructions, and notes which clients gave no valid answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

import numpy as np

from grpo_fed.aggregation.proximity import StepFractions
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
)
from grpo_fed.federation.transport import Transport
from grpo_fed.federation.withheld_metrics import played
from grpo_fed.runs.recorder import Recorder
from grpo_fed.runs.records import Failure


@final
class Conversation:
    """Carries out what the loop asks of clients, over any transport."""

    def __init__(self, transport: Transport, recorder: Recorder, deadline: float | None) -> None:
        self._transport, self._recorder, self._deadline = transport, recorder, deadline

    def ask(
        self, round: int, instructions: Mapping[str, Instruction], failures: dict[str, Failure]
    ) -> Iterator[tuple[str, Answer]]:
        """Send instructions and yield the answers; a client without one is recorded as failed."""
        if not instructions:
            return
        for name, answer in self._transport.send(instructions, self._deadline):
            if isinstance(answer, Failure):
                self.client_failed(round, name, answer, failures)
            else:
                yield name, answer

    def evaluate(
        self, round: int, starts: Mapping[str, Start], plan: EvaluationPlan, failures: dict[str, Failure]
    ) -> dict[str, EvaluationSummary]:
        """Evaluate clients, each from its start; return the summaries of those that answered."""
        instructions = {name: Evaluate(start, plan) for name, start in starts.items()}
        answers = self.ask(round, instructions, failures)
        return played({name: answer.summary for name, answer in answers if isinstance(answer, Evaluated)})

    def measure(
        self, round: int, latest: Callable[[str], Start], failures: dict[str, Failure]
    ) -> Callable[[Mapping[str, np.ndarray], Sequence[StepFractions]], Mapping[str, Sequence[float]]]:
        """Make the function that asks clients for the KL of candidate steps in this round.

        latest: returns a client's start with its latest state.
        """

        def measure(
            candidates: Mapping[str, np.ndarray], fractions: Sequence[StepFractions]
        ) -> Mapping[str, Sequence[float]]:
            instructions = {
                name: Measure(latest(name), candidate, tuple(fractions)) for name, candidate in candidates.items()
            }
            answers = self.ask(round, instructions, failures)
            return {name: answer.kl for name, answer in answers if isinstance(answer, Measured)}

        return measure

    def client_failed(self, round: int, name: str, failure: Failure, failures: dict[str, Failure]) -> None:
        """Note why a client gave no valid answer; of several reasons a round's record has the first."""
        failures.setdefault(name, failure)
        self._recorder.client_failed(round, name, failure)
