"""How the server's round loop reaches clients, whatever lies between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.runs.records import Failure


class Transport(Protocol):
    """Carries instructions to clients and their answers back, by the clients' names."""

    @property
    def bytes_up(self) -> int:
        """Bytes of arrays and metrics that came from clients so far."""

    @property
    def bytes_down(self) -> int:
        """Bytes that went to clients so far."""

    def reachable(self) -> tuple[str, ...]:
        """The clients that can be sent to now, in the scenario's order."""

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Every client's answer, or why there is none, once each and in the order of their names.

        An answer is handed on as soon as those before it are known, so that nobody has to hold them all. It has been
        checked: it fits the instruction, its arrays have their shapes and are finite. After `deadline` seconds (None:
        never) whoever has not answered is late; what comes from it then is thrown away.
        """
