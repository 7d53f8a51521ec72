"""What a run looks like while it goes on: a live table on a terminal, a line for each round elsewhere, or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO, final

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_fed.reports.tables import (
    CURVE,
    MANY,
    ClientProgress,
    is_number,
    lowest,
    many,
    number,
    results_table,
    small,
    some,
    span,
    standings_table,
)
from grpo_fed.runs.records import MB, RoundRecord, ServerRecord, record_to_line
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

ROWS_AROUND = 5
"""Rows of a terminal that the bar, the table's head and the cursor take."""
COLUMNS_BESIDE, COLUMNS_NARROW = 50, 34
"""Columns that a table's numbers take, beside the clients' names and the curves; and those of a narrow one."""
COLUMNS_KEPT = 17
"""And those that a federation needs for what a client keeps to itself."""
MISSING = 5
"""Missing clients that are named."""
READ = (1, 2, 0, 3)
"""In which order the parts beside the bar are read: seconds a round, steps a second, time left, time gone."""
SHORTEST = 8
"""Letters of a curve on the narrowest terminal."""


@dataclass(frozen=True)
class RunHeader:
    """What is known before the first round."""

    scenario: Scenario
    device: str
    out: Path
    method: str = ""
    """Of the federation; empty where there is none."""
    tracked: str = ""
    """Where MLflow shows it while it goes on, a page or a command; empty where nothing is tracked."""

    @property
    def facts(self) -> str:
        """In a line."""
        scenario = self.scenario
        clients = many(sum(entry.count for entry in scenario.clients), "client")
        rounds = f"{many(scenario.rounds, 'round')} of {scenario.steps:,} steps"
        method = f"{self.method}, " if self.method else ""
        return f"{clients}, {rounds}, {method}{scenario.objective.preset}, {self.device}, seed {scenario.seed}"

    @property
    def places(self) -> list[str]:
        """Where it is written down, and where it is shown, a line each."""
        return [f"{self.out}/", *([f"MLflow: {self.tracked}"] if self.tracked else [])]


class Display(Protocol):
    """What hears of a run."""

    def begin(self, opening: RunHeader) -> None:
        """Before the first policies play."""
        ...

    def round(self, note: RoundRecord) -> None:
        """After each round; number 0 is what there was before."""
        ...

    def stop(self) -> None:
        """There are no more rounds, for whatever reason."""
        ...

    def end(self, result: Result) -> None:
        """Say what became of it."""
        ...

    def say(self, line: str) -> None:
        """Where to look next."""
        ...

    def busy(self, what: str) -> AbstractContextManager[object]:
        """While something takes its time."""
        ...


def display_for(out: TextIO, as_json: bool, quiet: bool) -> Display:
    """What fits where the output goes."""
    console = Console(file=out, highlight=False)
    if as_json:
        return JsonDisplay(out, Console(stderr=True, highlight=False), quiet)
    if quiet:
        return QuietDisplay(console)
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


@dataclass
class RunProgress:
    """How a run has gone so far."""

    clients: dict[str, ClientProgress] = field(default_factory=dict)
    round: int = 0
    rounds: int = 0
    seconds: float = 0.0
    """Of the latest round's training."""
    speed: float = 0.0
    """Steps a second of all clients together, in the latest round."""
    clock: list[float] = field(default_factory=list)
    """When each round was over."""
    server: str = ""
    """What the server did in the latest round, in words; empty where there is none."""

    def add(self, note: RoundRecord) -> None:
        """One more round."""
        self.round, self.rounds, self.seconds = note.round, note.rounds, note.seconds
        self.clock.append(time.monotonic())
        if note.round == 0:
            self.clients = {one.client: ClientProgress(one.score) for one in note.clients}
        for one in note.clients if note.round else ():
            standing = self.clients.setdefault(one.client, ClientProgress())
            if one.mean is not None:
                standing.returns.append(one.mean)
            standing.state = "" if one.failure is None else one.failure.kind
            if note.server is not None:
                standing.personal, standing.clusters = one.departed, one.clusters
            if one.steps:
                standing.kl, standing.entropy = one.metrics.get("losses/approx_kl"), one.metrics.get("losses/entropy")
        if note.seconds:
            self.speed = note.steps / note.seconds
        if note.server is not None:
            self.server = server_line(note.server)

    @property
    def left(self) -> float | None:
        """Seconds until the last round is over, as the latest ten went; None before there is one."""
        latest = self.clock[-11:]
        if len(latest) < 2:
            return None
        pace = (latest[-1] - latest[0]) / (len(latest) - 1)
        return max(0.0, latest[-1] + pace * (self.rounds - self.round) - time.monotonic())


# On a terminal --------------------------------------------------------------------------------------------------------


@final
class LiveDisplay:
    """A header, a bar and a table that follow the rounds, and in their place a table of what became of the clients."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.course = RunProgress()
        self.began = 0.0
        self.live = Live(console=console, get_renderable=self._now, transient=True, vertical_overflow="crop")

    def begin(self, opening: RunHeader) -> None:
        scenario = opening.scenario
        lines = [Text(scenario.description)] if scenario.description else []
        lines += [Text(opening.facts), *(Text(place, style="dim", overflow="fold") for place in opening.places)]
        title = Text.assemble(("grpo-fed ", "bold"), (scenario.name, "bold cyan"))
        self.console.print(Panel(Group(*lines), title=title, title_align="left", border_style="cyan"))
        self.course.rounds, self.began = scenario.rounds, time.monotonic()
        self.live.start()

    def round(self, note: RoundRecord) -> None:
        self.course.add(note)

    def stop(self) -> None:
        self.live.stop()

    def end(self, result: Result) -> None:
        show_result(self.console, result)

    def say(self, line: str) -> None:
        say(self.console, line)

    def busy(self, what: str) -> AbstractContextManager[object]:
        return self.console.status(what)

    def _now(self) -> RenderableType:
        bar = _bar(self.course, self.began, self.console.width)
        if not self.course.clients:
            return bar
        most = min(MANY, self.console.height - ROWS_AROUND)
        longest = max(len(name) for name in self.course.clients)
        federated = any(one.personal is not None for one in self.course.clients.values())
        room = self.console.width - longest - (COLUMNS_KEPT if federated else 0)
        narrow = federated and room - COLUMNS_BESIDE < CURVE
        letters = max(SHORTEST, min(CURVE, room - (COLUMNS_NARROW if narrow else COLUMNS_BESIDE)))
        lines = [Text(self.course.server, style="dim", overflow="ellipsis", no_wrap=True)] if self.course.server else []
        return Group(bar, *lines, standings_table(self.course.clients, most, letters, narrow))


def _bar(course: RunProgress, began: float, width: int) -> Table:
    """Where in the run we are, in a line; where that is short, without what can best be spared."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=course.rounds, completed=course.round, complete_style="cyan", finished_style="green")
    count = Text.assemble("round ", (f"{course.round}", "bold"), f"/{course.rounds}")
    told = {**_doing(course), 3: f"{span(time.monotonic() - began)} so far"}
    room = width - len(count.plain) - SHORTEST - 2
    while len(told) > 1 and len(", ".join(told.values())) > room:
        del told[max(told)]
    grid.add_row(count, bar, Text(", ".join(told[place] for place in sorted(told, key=READ.index))))
    return grid


def _doing(course: RunProgress) -> dict[int, str]:
    """What goes on at the moment, the part that matters most under 0."""
    if not course.clock:
        return {0: "untrained policies play"}
    if course.left is None:
        return {0: "round 1 trains"}
    if course.round == course.rounds:
        return {0: "trained policies play"}
    return {0: f"{span(course.left)} left", 1: f"{course.seconds:.2f} s/round", 2: f"{course.speed:,.0f} steps/s"}


# Elsewhere ------------------------------------------------------------------------------------------------------------


@final
class LineDisplay:
    """A plain line for each round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.course = RunProgress()

    def begin(self, opening: RunHeader) -> None:
        say(self.console, f"{opening.scenario.name}: {opening.facts}")
        for place in opening.places:
            say(self.console, place)

    def round(self, note: RoundRecord) -> None:
        self.course.add(note)
        if note.round:
            say(self.console, round_line(note, self.course))

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        show_result(self.console, result)

    def say(self, line: str) -> None:
        say(self.console, line)

    def busy(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()


def round_line(note: RoundRecord, course: RunProgress) -> str:
    """A round in plain words."""
    means = note.returns
    parts = [f"round {note.round:>{len(str(note.rounds))}}/{note.rounds}"]
    parts.append(f"return {number(float(np.mean(list(means.values()))) if means else None)}")
    if len(means) > 1:
        worst = min(means, key=lambda name: means[name])
        parts.append(f"worst {worst} {number(means[worst])}")
    if note.scores:
        parts.append(f"evaluated {number(float(np.mean(list(note.scores.values()))))}")
    ones = course.clients.values()
    for name, values in (("KL", [one.kl for one in ones]), ("entropy", [one.entropy for one in ones])):
        known = [value for value in values if value is not None and is_number(value)]
        parts.append(f"{name} {small(float(np.mean(known)) if known else None)}")
    if note.server is not None:
        parts.append(server_line(note.server))
        parts += [f"{one.client} {one.failure.kind}" for one in note.clients if one.failure is not None][:MISSING]
    parts += [f"{note.seconds:.2f} s", f"{course.speed:,.0f} steps/s"]
    if course.left is not None and note.round < note.rounds:
        parts.append(f"{span(course.left)} left")
    return "  ".join(parts)


def server_line(server: ServerRecord) -> str:
    """How far the shared blocks went and within what, and what went over the wire."""
    parts = []
    if server.step is not None and server.step.blocks:
        steps = [block.alpha for block in server.step.blocks]
        short = [f"{block.block} {block.alpha:.0%}" for block in server.step.blocks if block.alpha < 1]
        parts.append("whole step" if min(steps) == 1 else f"step {some(short)}")
        if server.step.joint is not None:
            limit = f" of {server.step.joint_budget:g}" if is_number(server.step.joint_budget) else ""
            parts.append(f"shared KL {small(server.step.joint)}{limit}")
    parts.append(f"{(server.bytes_up + server.bytes_down) / MB:.2f} MB")
    return "  ".join(parts)


@final
class JsonDisplay:
    """A JSON line for each round and for the result; what is meant for people goes to `talk`."""

    def __init__(self, out: TextIO, talk: Console, quiet: bool) -> None:
        self.out = out
        self.talk = talk
        self.quiet = quiet

    def begin(self, opening: RunHeader) -> None:
        if not self.quiet:
            say(self.talk, f"{opening.scenario.name}: {opening.facts}")
            for place in opening.places:
                say(self.talk, place)

    def round(self, note: RoundRecord) -> None:
        if note.round and not self.quiet:
            self._write({"type": "round", **record_to_line(note)})

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        self._write({"type": "result", **result.to_json(), "out": None if result.out is None else str(result.out)})
        if not self.quiet:
            say(self.talk, result_line(result))

    def say(self, line: str) -> None:
        if not self.quiet:
            say(self.talk, line)

    def busy(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()

    def _write(self, document: Mapping[str, object]) -> None:
        self.out.write(json.dumps(document, allow_nan=False) + "\n")
        self.out.flush()


@final
class QuietDisplay:
    """The result, in a line."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, opening: RunHeader) -> None:
        pass

    def round(self, note: RoundRecord) -> None:
        pass

    def stop(self) -> None:
        pass

    def end(self, result: Result) -> None:
        say(self.console, f"{result_line(result)}, in {result.out}")

    def say(self, line: str) -> None:
        pass

    def busy(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()


# What became of it ----------------------------------------------------------------------------------------------------


def show_result(console: Console, result: Result) -> None:
    """A table of the clients, the whole in a line, who was missing, and what to do next."""
    if any(one.latest is not None or one.before is not None for one in result.clients.values()):
        console.print(results_table(result))
    say(console, result_line(result), "bold")
    for line in missing_lines(result):
        console.print(Text.assemble(("warning: ", "bold red"), (line, "yellow")), soft_wrap=True)
    if result.out is not None and result.status == "finished":
        console.print(Text.assemble(("next: ", "dim"), (next_command(result), "cyan")), soft_wrap=True)


def result_line(result: Result) -> str:
    """All in a line."""
    parts = [] if result.status == "finished" else [f"{result.status} after {many(result.rounds, 'round')}"]
    if result.score_mean is not None:
        parts.append(f"return {number(result.score_mean)}")
        if len(result.clients) > 1:
            parts[-1] += f" (middle half {number(result.score_iqm)}, worst {number(result.score_min)})"
        if len(result.returns) < len(result.clients):
            parts[-1] += f" of {len(result.returns):,} of {many(len(result.clients), 'client')}"
    if idle := result.idle:
        parts.append(f"{some(idle)} learned nothing")
    return f"{result.scenario}: {', '.join(parts)}, {result.env_steps:,} steps in {span(result.seconds)}"


def missing_lines(result: Result) -> list[str]:
    """Who had no answer when, and why the last time; first of all who never had one."""
    lines, idle = [], result.idle
    for name, every in sorted(result.missing.items(), key=lambda one: one[0] not in idle)[:MISSING]:
        rounds = [str(number) for number in dict.fromkeys(number for number, _, _ in every)]
        _, kind, reason = every[-1]
        when = f"round{'' if len(rounds) == 1 else 's'} {some(rounds, 8)}"
        told = f"{name} learned nothing: no answer" if name in idle else f"{name} had no answer"
        lines.append(f"{told} in {when}, the last time {kind}: {reason}")
    rest = len(result.missing) - MISSING
    return [*lines, f"and {many(rest, 'more client')}: results.json names them"] if rest > 0 else lines


def next_command(result: Result) -> str:
    """To see a client play: the worst, where there is most to mend."""
    latest = {name: client.latest for name, client in result.clients.items()}
    known = [name for name, value in latest.items() if value is not None]
    name = lowest({name: latest[name] for name in known or latest}, 1)[0]
    chosen = f" --client {name}" if len(result.clients) > 1 else ""
    return f"grpo-fed play {result.out}{chosen} --gif {name}.gif"


def say(console: Console, text: str, style: str = "") -> None:
    """A line that the terminal breaks, so that paths and commands in it can be copied."""
    console.print(Text(text, style=style), soft_wrap=True)
