"""A stream whose reader may leave: `grpo-fed run ... | head` must not cost the run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, final


@final
class UnbreakableStream(io.TextIOBase):
    """Writes to another stream until that refuses; from then on to nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: str | None = None
        """Why it no longer writes."""

    def write(self, text: str) -> int:
        self._unless_lost(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_lost(self.stream.flush)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def _unless_lost(self, act: Callable[[], Any]) -> None:
        if self.lost is not None:
            return
        try:
            act()
        except OSError as error:
            self.lost = (error.strerror or str(error)).lower()
            # what is still buffered goes there when Python ends
            with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
