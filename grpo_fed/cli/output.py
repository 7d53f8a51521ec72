"""A stream that outlives its reader, so that `grpo-fed run ... | head` does not stop the run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, final


@final
class UnbreakableStream(io.TextIOBase):
    """Writes to another stream until that fails, and discards everything afterwards."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: str | None = None
        """Why the other stream failed; None while it works."""

    def write(self, text: str) -> int:
        self._unless_failed(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_failed(self.stream.flush)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def _unless_failed(self, action: Callable[[], Any]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except OSError as error:
            self.failure = (error.strerror or str(error)).lower()
            # Python flushes what is still buffered when it ends; let that go to the null device
            with suppress(OSError), Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), self.stream.fileno())
