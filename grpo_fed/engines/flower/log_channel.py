"""Round records and the result of a run as marked lines of its log, from the server's app to the engine.

Flower returns nothing from a server's app but its log, wherever it runs. So the app prints what the engine has to know
as lines that begin with a mark, and the engine sorts these from all other lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias, final

from grpo_fed.engines.flower.processes import remove_colours
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.runs.serialisation import from_json

Watch: TypeAlias = Callable[[RoundRecord], None]
Say: TypeAlias = Callable[[str], None]

RECORD_MARK, RESULT_MARK = "grpo-fed round ", "grpo-fed result "


@final
class LogChannel:
    """Carries round records and the result of a run through Flower's log.

    The server's app prints what `format_record` and `format_result` return; the engine passes the log's lines to
    `read`. The log may begin again from its first line: each round is reported once.
    """

    def __init__(self, watch: Watch, say: Say, out: Path | None = None) -> None:
        """Prepare to read a log.

        watch: is called with every round's record. say: is called with every other line. out: the folder of the result.
        """
        self._watch, self._say, self._out = watch, say, out
        self._last_round, self._rest = -1, ""
        self.result: Result | None = None
        """The result of the run, once its line was read."""

    @staticmethod
    def format_record(record: RoundRecord) -> str:
        """Format a round's record as a line of the log."""
        return RECORD_MARK + json.dumps(asdict(record))

    @staticmethod
    def format_result(result: Result) -> str:
        """Format the run's result as a line of the log."""
        return RESULT_MARK + json.dumps(result.to_json())

    def read(self, text: str) -> None:
        """Read a further part of the log, which may end in the middle of a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._read_line(line)

    def _read_line(self, line: str) -> None:
        if line.startswith(RECORD_MARK):
            record = from_json(RoundRecord, json.loads(line.removeprefix(RECORD_MARK)))
            if record.round > self._last_round:
                self._last_round = record.round
                self._watch(record)
        elif line.startswith(RESULT_MARK):
            self.result = Result.from_json(json.loads(line.removeprefix(RESULT_MARK)), self._out)
        else:
            self._say(remove_colours(line))
