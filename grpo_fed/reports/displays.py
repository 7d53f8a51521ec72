"""Displays of a run while it goes on: a live table on a terminal, a line for each round elsewhere, or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TextIO, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_fed.reports.formatting import CURVE_WIDTH, format_duration
from grpo_fed.reports.outcome import print_line, print_outcome, result_line
from grpo_fed.reports.progress import RunHeader, RunProgress, round_line
from grpo_fed.reports.tables import MAX_ROWS, progress_table
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.runs.results import Result

OTHER_ROWS = 5
"""Rows of a terminal for the bar, the table's head and the cursor."""
NUMBER_COLUMNS, NARROW_NUMBER_COLUMNS = 50, 34
"""Terminal columns for the table's numbers, beside clients' names and curves; the second for a narrow table."""
DEPARTED_COLUMNS = 17
"""Terminal columns for the groups that clients have departed from."""
MIN_CURVE_WIDTH = 8
"""Characters of a curve, and of the bar, on the narrowest terminal."""


class Display(Protocol):
    """Shows a run while it goes on, and its outcome."""

    def begin(self, header: RunHeader) -> None:
        """Show what is known before the first evaluation."""
        ...

    def round(self, record: RoundRecord) -> None:
        """Show a round; number 0 is the evaluation before the first."""
        ...

    def stop(self) -> None:
        """Stop following the rounds: the run has ended, for whatever reason."""
        ...

    def end(self, result: Result) -> None:
        """Show the outcome."""
        ...

    def say(self, line: str) -> None:
        """Print a line about what was written, or what to do next."""
        ...

    def busy(self, task: str) -> AbstractContextManager[object]:
        """Name a task for as long as it takes."""
        ...


def display_for(out: TextIO, as_json: bool, quiet: bool) -> Display:
    """Choose the display that fits the output stream and the user's options."""
    console = Console(file=out, highlight=False)
    if as_json:
        return JsonDisplay(out, Console(stderr=True, highlight=False), quiet)
    if quiet:
        return QuietDisplay(console)
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


# On a terminal --------------------------------------------------------------------------------------------------------


@final
class LiveDisplay:
    """Shows a header, and below it a bar and a table that follow the rounds; the outcome replaces these."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = RunProgress()
        self.start_time = 0.0
        self.live = Live(console=console, get_renderable=self._render, transient=True, vertical_overflow="crop")

    def begin(self, header: RunHeader) -> None:
        scenario = header.scenario
        lines = [Text(scenario.description)] if scenario.description else []
        lines += [Text(header.facts), *(Text(place, style="dim", overflow="fold") for place in header.places)]
        title = Text.assemble(("grpo-fed ", "bold"), (scenario.name, "bold cyan"))
        self.console.print(Panel(Group(*lines), title=title, title_align="left", border_style="cyan"))
        self.progress.rounds, self.progress.unit = scenario.rounds, scenario.unit
        self.start_time = time.monotonic()
        self.live.start()

    def round(self, record: RoundRecord) -> None:
        self.progress.add(record)

    def stop(self) -> None:
        self.live.stop()

    def end(self, result: Result) -> None:
        print_outcome(self.console, result)

    def say(self, line: str) -> None:
        print_line(self.console, line)

    def busy(self, task: str) -> AbstractContextManager[object]:
        return self.console.status(task)

    def _render(self) -> RenderableType:
        progress, console = self.progress, self.console
        bar = progress_bar(progress, time.monotonic() - self.start_time, console.width)
        if not progress.clients:
            return bar
        longest_name = max(len(name) for name in progress.clients)
        federated = any(client.departed is not None for client in progress.clients.values())
        room = console.width - longest_name - (DEPARTED_COLUMNS if federated else 0)
        narrow = federated and room - NUMBER_COLUMNS < CURVE_WIDTH
        curve_width = room - (NARROW_NUMBER_COLUMNS if narrow else NUMBER_COLUMNS)
        curve_width = max(MIN_CURVE_WIDTH, min(CURVE_WIDTH, curve_width))
        max_rows = min(MAX_ROWS, console.height - OTHER_ROWS)
        server = [Text(progress.server, style="dim", overflow="ellipsis", no_wrap=True)] if progress.server else []
        note = [Text(f"note: {progress.note}", style="yellow")] if progress.note else []
        return Group(bar, *server, *note, progress_table(progress.clients, max_rows, curve_width, narrow))


def progress_bar(progress: RunProgress, elapsed: float, width: int) -> Table:
    """Make a line with the round, a bar, and the times that fit beside it.

    elapsed: seconds since the run began. width: columns of the terminal.
    """
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=progress.rounds, completed=progress.round, complete_style="cyan", finished_style="green")
    count = Text.assemble("round ", (f"{progress.round}", "bold"), f"/{progress.rounds}")
    room = width - len(count.plain) - MIN_CURVE_WIDTH - 2
    grid.add_row(count, bar, Text(_times(progress, elapsed, room)))
    return grid


def _times(progress: RunProgress, elapsed: float, room: int) -> str:
    """Write what the run is doing or how fast it is; the least important parts are left out if there is no room."""
    so_far = f"{format_duration(elapsed)} so far"
    if progress.seconds_left is not None and progress.round < progress.rounds:
        pace, speed = f"{progress.seconds:.2f} s/round", f"{progress.speed:,.0f} {progress.unit}/s"
        left = f"{format_duration(progress.seconds_left)} left"
        choices = [[pace, speed, left, so_far], [pace, speed, left], [pace, left], [left]]
    else:
        choices = [[_phase(progress), so_far], [_phase(progress)]]
    texts = [", ".join(parts) for parts in choices]
    return next((text for text in texts if len(text) <= room), texts[-1])


def _phase(progress: RunProgress) -> str:
    """Name what a run does before the first round has ended, and after the last one."""
    if not progress.end_times:
        return "evaluating the untrained policies"
    return "training round 1" if progress.seconds_left is None else "evaluating the trained policies"


# Elsewhere ------------------------------------------------------------------------------------------------------------


@final
class LineDisplay:
    """Prints a plain line for each round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = RunProgress()

    def begin(self, header: RunHeader) -> None:
        self.progress.unit = header.scenario.unit
        _print_header(self.console, header)

    def round(self, record: RoundRecord) -> None:
        self.progress.add(record)
        if record.round:
            print_line(self.console, round_line(record, self.progress))
        if self.progress.is_new_note:
            print_line(self.console, f"note: {self.progress.note}", "yellow")

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        print_outcome(self.console, result)

    def say(self, line: str) -> None:
        print_line(self.console, line)

    def busy(self, task: str) -> AbstractContextManager[object]:
        return nullcontext()


@final
class JsonDisplay:
    """Writes a JSON line for each round and for the result; text for people goes to another console."""

    def __init__(self, out: TextIO, console: Console, quiet: bool) -> None:
        self.out = out
        self.console = console
        self.quiet = quiet

    def begin(self, header: RunHeader) -> None:
        if not self.quiet:
            _print_header(self.console, header)

    def round(self, record: RoundRecord) -> None:
        if record.round and not self.quiet:
            self._write({"type": "round", **record_to_line(record)})

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        self._write({"type": "result", **result.to_json(), "out": None if result.out is None else str(result.out)})
        self.say(result_line(result))

    def say(self, line: str) -> None:
        if not self.quiet:
            print_line(self.console, line)

    def busy(self, task: str) -> AbstractContextManager[object]:
        return nullcontext()

    def _write(self, document: Mapping[str, object]) -> None:
        self.out.write(json.dumps(document, allow_nan=False) + "\n")
        self.out.flush()


@final
class QuietDisplay:
    """Prints the result in one line, and nothing before it."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, header: RunHeader) -> None:
        pass

    def round(self, record: RoundRecord) -> None:
        pass

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        print_line(self.console, f"{result_line(result)}, in {result.out}")

    def say(self, line: str) -> None:
        pass

    def busy(self, task: str) -> AbstractContextManager[object]:
        return nullcontext()


def _print_header(console: Console, header: RunHeader) -> None:
    print_line(console, f"{header.scenario.name}: {header.facts}")
    for place in header.places:
        print_line(console, place)
