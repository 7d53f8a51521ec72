"""Plays every attack against every merge rule, and writes what is left of the return: `grpo-fed attack-board`.

A scenario with hostile clients is run once for each attack, rule and seed, in processes of its own. Every finished run
is a line of `runs.jsonl` in the board's folder and is not repeated. The attack `none` lets the hostile clients be
honest: what a rule costs when nobody attacks.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from grpo_fed.reports.charts import Drawing, make_drawing
from grpo_fed.reports.figures.write import write_drawings
from grpo_fed.reports.formatting import format_count
from grpo_fed.runs.files import write_atomic
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.scenario.shipped import find_scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOARD = "attack-board"
"""The name of a board's page and figure, without their endings."""
RUNS = "runs.jsonl"
ATTACKS: tuple[str, ...] = get_args(ClientSettings.model_fields["attack"].annotation)
"""All attacks, `none` first."""
BOARD_RULES = ("mean", "median", "trimmed-mean", "multi-krum", "geometric-median", "centred-clipping")
MIXED = "mix+"
"""What stands before a rule's name if replies are mixed before it."""
DEFAULT_RULES = (*BOARD_RULES, f"{MIXED}geometric-median")
KEPT = 0.9
"""The part of the return without an attack that a rule has to keep to count as tolerating it."""


@dataclass(frozen=True)
class BoardRun:
    """A finished run: a line of `runs.jsonl`."""

    attack: str
    rule: str
    seed: int
    settings: str
    """Digest of the scenario."""
    score: float
    """The mean final return of the honest clients."""


@dataclass(frozen=True)
class AttackBoard:
    """The finished runs of a board."""

    attacks: tuple[str, ...]
    rules: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[BoardRun, ...]

    def scores(self, attack: str, rule: str) -> list[float]:
        """List the scores of an attack against a rule, by seed."""
        return [run.score for run in self.runs if (run.attack, run.rule) == (attack, rule)]

    def mean(self, attack: str, rule: str) -> float:
        """Average an attack's scores over the seeds; NaN without a run."""
        scores = self.scores(attack, rule)
        return float(np.mean(scores)) if scores else float("nan")

    def worst(self, rule: str) -> float:
        """Find the lowest mean over all attacks."""
        return min(self.mean(attack, rule) for attack in self.attacks if attack != "none")

    @property
    def clean(self) -> float:
        """The highest mean of a rule when nobody attacks."""
        return max(self.mean("none", rule) for rule in self.rules)


def play_attacks(
    scenario: str,
    attacks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    watch: Callable[[BoardRun], None] = lambda run: None,
) -> AttackBoard:
    """Make the runs that have no line in the folder yet, write the table and the figure, and return the board.

    The arguments are those of `complete_board`.
    """
    out.mkdir(parents=True, exist_ok=True)
    board = complete_board(scenario, attacks, rules, seeds, out / RUNS, overrides, jobs, watch)
    write_atomic(out / f"{BOARD}.md", "```text\n" + "\n".join(board_lines(board)) + "\n```\n")
    write_drawings(out, [draw_board(board)])
    return board


def complete_board(
    scenario: str,
    attacks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    file: Path,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    watch: Callable[[BoardRun], None] = lambda run: None,
) -> AttackBoard:
    """Make the runs that have no line in a file yet, one seed after another, and return the board.

    scenario: a file or a name; the entries of `[[clients]]` with an attack are the hostile ones. jobs: processes, 1 for
    this one alone; by default one for each core. ValueError, before anything is run, for a mistake in the scenario or
    the names.
    """
    planned = _plan(scenario, attacks, rules, seeds, overrides)
    entries = Scenario.load(find_scenario(scenario), overrides).clients
    hostile = frozenset(name for entry in entries if entry.attack != "none" for name in entry.names)
    done = {run.settings for run in read_board_runs(file)}
    pending = [
        (attack, rule, seed, settings.dumps(), hostile)
        for attack, rule, seed, settings in planned
        if digest(settings) not in done
    ]
    for run in _play_all(pending, jobs or len(os.sched_getaffinity(0))):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(run)) + "\n")
        watch(run)
    return board_from_lines(scenario, attacks, rules, seeds, file, overrides)


def board_from_lines(
    scenario: str,
    attacks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    file: Path,
    overrides: Sequence[str] = (),
) -> AttackBoard:
    """Read the board of those seeds of which all runs have a line; the arguments are those of `complete_board`."""
    done = {run.settings: run for run in read_board_runs(file)}
    runs: list[BoardRun] = []
    finished: list[int] = []
    for seed in dict.fromkeys(seeds):
        found = [done.get(digest(settings)) for *_, settings in _plan(scenario, attacks, rules, [seed], overrides)]
        if all(found):
            runs += [run for run in found if run is not None]
            finished.append(seed)
    return AttackBoard(_with_none(attacks), tuple(dict.fromkeys(rules)), tuple(finished), tuple(runs))


def _plan(
    scenario: str, attacks: Sequence[str], rules: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[tuple[str, str, int, Scenario]]:
    """List attack, rule, seed and settings of each run of a board."""
    return [
        (attack, rule, seed, load_attacked(scenario, attack, rule, seed, overrides))
        for seed in dict.fromkeys(seeds)
        for attack in _with_none(attacks)
        for rule in dict.fromkeys(rules)
    ]


def _with_none(attacks: Sequence[str]) -> tuple[str, ...]:
    """Put `none` before the attacks."""
    return ("none", *(attack for attack in dict.fromkeys(attacks) if attack != "none"))


def load_attacked(scenario: str, attack: str, rule: str, seed: int, overrides: Sequence[str] = ()) -> Scenario:
    """Load a scenario with another attack, rule and seed, and as many tolerated clients as there are hostile ones."""
    if attack not in ATTACKS:
        raise ValueError(f"attack {attack}: is unknown; there are {', '.join(ATTACKS)}")
    source = find_scenario(scenario)
    given = Scenario.load(source, overrides)
    hostile = [entry for entry in given.clients if entry.attack != "none"]
    count, total = sum(entry.count for entry in hostile), sum(entry.count for entry in given.clients)
    if not hostile or count == total:
        raise ValueError(f'{source}: give the hostile entries of [[clients]] an attack, such as attack = "sign-flip"')
    name = rule.removeprefix(MIXED)
    changes = [f"merge.rule={name}", f"merge.mix={count if rule.startswith(MIXED) else 0}", f"seed={seed}"]
    if name in ("krum", "multi-krum"):
        changes.append(f"merge.byzantine={count}")
    if name == "trimmed-mean":
        changes.append(f"merge.fraction={min(count / total, 0.49):.4g}")
    attacked = [f"clients.{entry.name}.attack={attack}" for entry in hostile]
    return Scenario.load(source, [*overrides, *changes, *attacked])


def digest(scenario: Scenario) -> str:
    """Digest everything but the code that determines a run's result; settings at their defaults do not count, so that
    a new version with more settings takes up an older board.
    """
    given = scenario.model_dump(mode="json", exclude_defaults=True, exclude={"description"})
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def read_board_runs(path: Path) -> list[BoardRun]:
    """Read the finished runs of a board; a line that a killed process left unfinished is not one."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            runs.append(BoardRun(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return runs


def _play_all(pending: Sequence[tuple[str, str, int, str, frozenset[str]]], jobs: int) -> Iterator[BoardRun]:
    """Make runs, and yield each as soon as it has ended."""
    if jobs == 1 or len(pending) <= 1:
        yield from (_play(*each) for each in pending)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as workers:
        futures = [workers.submit(_play, *each) for each in pending]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _play(attack: str, rule: str, seed: int, text: str, hostile: frozenset[str]) -> BoardRun:
    """Make a run in this process, with one thread. hostile: the clients that do not count."""
    from grpo_fed.engines.start import run
    from grpo_fed.engines.threads import one_thread

    with one_thread():
        scenario = Scenario.loads(text)
        result = run(scenario, workers=0)
    scores = [client.after for name, client in result.clients.items() if name not in hostile]
    known = [score for score in scores if score is not None]
    if not known:
        raise RuntimeError(f"{attack} against {rule}, seed {seed}: no honest client could be evaluated")
    return BoardRun(attack, rule, seed, digest(scenario), float(np.mean(known)))


# The table and the figure --------------------------------------------------------------------------------------------

WIDTH = 8
"""Characters of a rule; beside 14 for an attack, seven rules fit into a terminal of 80 columns."""


def board_lines(board: AttackBoard) -> Iterator[str]:
    """Write the table: a line for each attack, then the worst attack and its part of the clean return."""
    heads = [rule.replace("geometric", "geom.").replace("+", "+-").split("-") for rule in board.rules]
    for row in range(max(map(len, heads))):
        yield _line("", [head[row] if row < len(head) else "" for head in heads])
    for attack in board.attacks:
        yield _line(attack, [f"{board.mean(attack, rule):.4g}" for rule in board.rules])
    if len(board.attacks) > 1:
        yield _line("worst", [f"{board.worst(rule):.4g}" for rule in board.rules])
        yield _line("of clean", [f"{board.worst(rule) / board.clean:.0%}" for rule in board.rules])
        kept = [rule for rule in board.rules if board.worst(rule) >= KEPT * board.clean]
        yield ""
        verdict = f"Within {1 - KEPT:.0%} of {board.clean:.4g}, the best return without an attack: "
        yield from textwrap.wrap(verdict + (", ".join(kept) or "none") + ".", 80, break_on_hyphens=False)
    yield f"Mean final return of the honest clients over {format_count(len(board.seeds), 'seed')}."


def _line(name: str, cells: Sequence[str]) -> str:
    return (f"{name:<14}" + "".join(f"{cell[:WIDTH]:>{WIDTH + 1}}" for cell in cells)).rstrip()


def draw_board(board: AttackBoard) -> Drawing:
    """Draw a map of the returns, attacks by rules."""
    values = np.array([[board.mean(attack, rule) for rule in board.rules] for attack in board.attacks])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(board.rules)), [rule.replace("+", "+\n").replace("-", "-\n") for rule in board.rules])
        axes.set_yticks(range(len(board.attacks)), board.attacks)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, size=8)

    seeds = format_count(len(board.seeds), "seed")
    caption = f"Mean final return of the honest clients over {seeds}, for each attack and merge rule."
    alt = "; ".join(
        f"{rule} keeps {board.worst(rule) / board.clean:.0%}" for rule in board.rules if len(board.attacks) > 1
    )
    height = 0.27 * len(board.attacks) + 0.9
    return make_drawing(BOARD, "Attacks and merge rules", caption, alt or caption, height, paint)
