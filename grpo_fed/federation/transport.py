"""How the server reaches clients, whatever lies between them: the interface that an engine provides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.runs.records import Failure


class Transport(Protocol):
    """Carries instructions to clients and their answers back, by the clients' names.

    A round that waits for its clients uses `send`. A server whose rounds do not wait uses `submit` and `collect`.
    Answers have been checked: each fits its instruction, its arrays have their shapes and are finite.
    """

    @property
    def bytes_up(self) -> int:
        """Bytes of arrays and metrics that came from clients so far."""

    @property
    def bytes_down(self) -> int:
        """Bytes that went to clients so far."""

    def reachable(self) -> tuple[str, ...]:
        """Return the clients that can be sent to now, in the scenario's order."""

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Yield every client's answer, or why there is none, once each and in the order of their names.

        An answer is yielded as soon as those before it are there, so that answers need not all be in memory. A client
        that has not answered after `deadline` seconds (None: never) is late, and its answer is thrown away.
        """

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        """Hand instructions to clients and return; `collect` gives their answers, or why there are none.

        A client's earlier instruction is given up if it was not answered yet.
        """

    def collect(self, timeout: float) -> Iterable[tuple[str, Answer | Failure]]:
        """Return the answers to submitted instructions that have come since, in the order in which they came.

        If there are none yet, wait for the first, `timeout` seconds at most.
        """
