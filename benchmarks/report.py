"""Write benchmarks/RESULTS.md from what the other benchmarks have measured.

Learning beside stable-baselines3 comes first (learning.py, peers.py), then the federation (federation.py, merges.py,
structure.py, scarce.py) and a GPU (gpu.py). It can be called again whenever more runs are done; benchmarks without a
run are left out:

    python -m benchmarks.report

prints the page, too.
"""

import argparse
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import federation, gpu_results, merges, scarce, structure
from benchmarks.learning import CASES, RESULTS, THRESHOLDS, Case
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean, probability_of_improvement

PEERS = RESULTS.with_name("peers.jsonl")
PAGE = Path(__file__).parent / "RESULTS.md"
WAYS = {"score_deterministic": "the likeliest action", "score_sampled": "sampled actions"}
"""Of choosing actions in the evaluation: a result line's key, and in words."""
SUITES = {
    "tasks": (
        "Same settings as the peer",
        "The rl-zoo's settings for both sides, as far as we have the knob.",
    ),
    "presets": (
        "Presets as they come",
        "Every preset with its own values and 8 environments; the peer's runs have settings tuned for this task.",
    ),
    "groups": (
        "Groups of episodes from one start state",
        "16 episodes an update in groups of 4, no critic; PPO with its critic stands beside as the measure.",
    ),
}

CHAPTERS = {
    "federation": (
        "A federation, beside Flower's Ray simulation",
        """Seconds are by the clock, medians of the repetitions' medians over rounds, contestants taking turns. The peer
        is Flower's FedAvg over stable-baselines3's PPO on one Ray actor for each core, with the same networks,
        environments and updates; *in turn* are our own clients, trained one after another in one process. A ratio is
        how many times as long the other takes. Idle clients answer 100 KB with 100 KB and do nothing else.""",
        "python -m benchmarks.federation --repetitions 5",
    ),
    "merges": (
        "What merging costs",
        """The mean takes replies one after another and keeps one model, so its memory does not grow with the clients;
        it is held against copying the same bytes once. Huber compares clients, and is held against the mean.""",
        "python -m benchmarks.merges --clients 1000 --rounds 5",
    ),
    "structure": (
        "Structure is found",
        """Six carts, two of them with swapped actions (scenarios/contrary.toml). A cell is the interquartile mean, over
        seeds and clients, of returns with its 95 % bootstrap interval: played with the likeliest actions after the last
        round, and of the training episodes of the last third. Planted is that the two contrary clients leave the actor;
        the counts are of rounds, clients and groups in the last third.""",
        "python -m benchmarks.structure --seeds 5",
    ),
    "scarce": (
        "Scarce samples",
        """Six carts with poles of 0.1 to 0.9 (scenarios/poles.toml): 15,360 steps each as the scenario has them
        (learning rate 0.005, 4 epochs, 60 rounds of one batch), with one thing changed, and four times as many. A run
        counts by its mean return over all rounds and clients, of training episodes, and of the episodes played at 15
        points on the way; differences are of pairs with the same seed, with 95 % bootstrap intervals. The scenario was
        chosen on the seeds 100 to 107; those here, 200 to 209, were fixed before any of them was run.""",
        "python -m benchmarks.scarce --seeds 10",
    ),
    "gpu": (
        "A GPU",
        """One learner of K carts (`grpo_fed/CartPole-v1`) on a GPU: networks, losses and updates of all clients are
        computed there, while the environments are stepped on one core of the CPU. That core is the limit: with many
        clients most of a round is environments and bookkeeping, and a faster GPU would change little. *Predicted* was
        written down before the first measurement. For the time to solve, every client has a policy of its own and the
        rl-zoo's settings, and the benchmark stops after 150 s whether all clients have solved their task or not. The
        peer is one client of stable-baselines3 with the same settings on one core of the same machine. Compare its
        time for as many clients on all cores with ours, which uses one core and the GPU.""",
        "python -m benchmarks.gpu --out gpu.jsonl\npython -m benchmarks.gpu_results gpu.jsonl",
    ),
}
"""Of the federation's benchmarks: title, what it shows, and how it is run."""

READING = """A cell is the interquartile mean, over seeds, of the final policy's mean return in 50 episodes, with its
95 % bootstrap interval; both sides play from the same start states. *Better* is the chance that a seed of ours beats
one of the peer's, 0.5 for level, with its interval. *Solved* counts the seeds that reach the task's threshold. The page
is written by `python -m benchmarks.report`: do not edit it."""

Line = Mapping[str, Any]
"""One run, ours or the peer's."""


@dataclass(frozen=True)
class Comparison:
    """One row: a case's runs and those of a peer."""

    case: Case
    peer: str
    """Its algorithm; empty where there is no peer, or none of its runs are done."""
    ours: Sequence[Line]
    theirs: Sequence[Line]

    @property
    def title(self) -> str:
        return f"{self.case.task}, {self.algorithms}, {self.case.budget:,} steps"

    @property
    def algorithms(self) -> str:
        return both(self.case.preset, self.peer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=RESULTS)
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    text = page(read_lines(arguments.ours), read_lines(arguments.peers)) + federated()
    arguments.page.write_text(text)
    print(text)


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def page(ours: Sequence[Line], peers: Sequence[Line]) -> str:
    """The whole page."""
    found = list(comparisons(CASES, ours, peers))
    parts = ["# Learning, beside stable-baselines3\n", fill(f"{verdict(found)} {READING}")]
    for suite, (title, text) in SUITES.items():
        rows = [row for row in found if row.case.suite == suite]
        if not rows:
            continue
        parts.append(f"## {title}\n\n{fill(text)}")
        parts.extend(f"Playing {words}:\n\n{table(rows, key)}\n" for key, words in WAYS.items())
        parts.append("\n".join(["### To know", "", *remarks(rows)]) + "\n")
    parts.append(footnotes(ours, peers))
    return "\n".join(parts)


def federated() -> str:
    """Chapters of the federation's benchmarks, as far as they have been run, with the tables of their own modules."""
    merged = json.loads(merges.FILE.read_text()) if merges.FILE.exists() else None
    chapters = {
        "federation": federation.lines(federation.read(federation.FILE)),
        "merges": iter(()) if merged is None else merges.lines(merged),
        "structure": structure.lines(structure.finished()),
        "scarce": scarce.lines(scarce.finished()),
        "gpu": gpu_results.lines(gpu_results.read_lines(gpu_results.FILE)),
    }
    made = [chapter(*CHAPTERS[name], list(lines)) for name, lines in chapters.items()]
    return "".join(f"\n{text}" for text in made if text)


def chapter(title: str, text: str, command: str, lines: Sequence[str]) -> str:
    """A benchmark's tables with what they are of; nothing where there is nothing in them."""
    if not lines:
        return ""
    return "\n".join([f"# {title}\n", fill(text), *lines, "", f"```\n{command}\n```", ""])


def verdict(rows: Sequence[Comparison]) -> str:
    """The result in a sentence."""
    chances = [
        improvement(*(scores(side, key) for side in (row.ours, row.theirs)))
        for row in rows
        for key in WAYS
        if row.case.suite == "tasks" and row.theirs
    ]
    better, worse = sum(each.low > 0.5 for each in chances), sum(each.high < 0.5 for each in chances)
    level = len(chances) - better - worse
    return (
        f"With the same settings and budget, in {len(chances)} comparisons (a task, an algorithm, a way of playing), we"
        f" are better in {better}, level in {level} and worse in {worse}, by the interval of *better*."
    )


def fill(text: str) -> str:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def comparisons(cases: Iterable[Case], ours: Sequence[Line], peers: Sequence[Line]) -> Iterator[Comparison]:
    """Every case of which something is done, in the table's order."""
    mine, others = defaultdict(list), defaultdict(list)
    for line in ours:
        mine[line["suite"], line["name"], line["budget"]].append(line)
    for line in peers:
        others[line["algorithm"], line["task"], line["budget"]].append(line)
    for case in cases:
        if not (runs := mine[case.suite, case.name, case.budget]):
            continue
        found = {peer: lines for peer in case.peers if (lines := others[peer, case.task, case.budget])}
        for peer, lines in found.items() or [("", [])]:
            yield Comparison(case, peer, runs, lines)


def table(rows: Sequence[Comparison], key: str) -> str:
    """A row for each comparison, with empty cells where there is no peer."""
    head = "| task | ours / peer | steps | ours | peer | better | solved, ours | solved, peer | seeds | CPU s a seed |"
    return "\n".join([head, "| --- " * head.count(" | ") + "| --- |", *(table_row(row, key) for row in rows)])


def table_row(row: Comparison, key: str) -> str:
    ours, theirs = scores(row.ours, key), scores(row.theirs, key)
    cells = [
        row.case.task,
        row.algorithms,
        f"{row.case.budget:,}",
        mean_cell(ours),
        mean_cell(theirs),
        better_cell(ours, theirs),
        solved_cell(row.case.task, ours),
        solved_cell(row.case.task, theirs),
        both(str(len(ours)), str(len(theirs)) if len(theirs) else ""),
        both(seconds_cell(row.ours), seconds_cell(row.theirs)),
    ]
    return f"| {' | '.join(cells)} |"


def both(ours: str, theirs: str) -> str:
    """What is said of us, and of the peer where there is one."""
    return f"{ours} / {theirs}" if theirs else ours


def scores(lines: Sequence[Line], key: str) -> np.ndarray:
    """[S, 1], in the order of the seeds."""
    return np.array([line[key] for line in sorted(lines, key=lambda line: line["seed"])])[:, None]


def mean_cell(array: np.ndarray) -> str:
    return interval(estimate(interquartile_mean, array, generator=np.random.default_rng(0)), 1) if array.size else ""


def better_cell(ours: np.ndarray, theirs: np.ndarray) -> str:
    return interval(improvement(ours, theirs), 2) if theirs.size else ""


def improvement(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """The chance that we beat the peer."""
    return estimate(probability_of_improvement, ours, theirs, generator=np.random.default_rng(0))


def interval(found: Estimate, digits: int) -> str:
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def solved_cell(task: str, array: np.ndarray) -> str:
    if task not in THRESHOLDS or not array.size:
        return ""
    return f"{(array >= THRESHOLDS[task]).sum()} of {len(array)}"


def seconds_cell(lines: Sequence[Line]) -> str:
    return f"{np.median([line['cpu_seconds'] for line in lines]):.0f}" if lines else ""


def remarks(rows: Sequence[Comparison]) -> Iterator[str]:
    """Where the two sides are not alike, and where we are worse."""
    compared = [row for row in rows if row.theirs]
    if not compared:
        yield "- Nobody is compared with here."
        return
    yield from dict.fromkeys(f"- {row.case.title}: {row.case.remark}." for row in compared if row.case.remark)
    told = [
        f"- {said} in {row.title}, {words}."
        for row in compared
        for key, words in WAYS.items()
        for said in shortfalls(row.case.task, scores(row.ours, key), scores(row.theirs, key))
    ]
    yield from told or ["- We are worse in none of the rows that have a peer."]


def shortfalls(task: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[str]:
    """In words: the chance that we are better surely below one half, and fewer of the seeds at the threshold."""
    if improvement(ours, theirs).high < 0.5:
        mine, peers = float(interquartile_mean(ours)), float(interquartile_mean(theirs))
        yield f"Worse than the peer, {mine:.1f} against {peers:.1f},"
    threshold = THRESHOLDS.get(task)
    if threshold is not None and (ours >= threshold).mean() < (theirs >= threshold).mean():
        yield f"Fewer seeds solve it, {solved_cell(task, ours)} against {solved_cell(task, theirs)},"


def footnotes(ours: Sequence[Line], peers: Sequence[Line]) -> str:
    """Thresholds, commands, versions."""
    thresholds = ", ".join(f"{task} {value:g}" for task, value in THRESHOLDS.items())
    machines = sorted({line["machine"] for line in ours})
    how = f"""Thresholds: {thresholds}. CPU seconds are a seed's processor time of training, one thread; ours is its
        share of a fleet in which the seeds of a row train together."""
    what = f"Machine: {'; '.join(machines)}. Versions: {versions([*ours, *peers])}."
    return f"""## How

{fill(how)}
```
python -m benchmarks.peers --seeds 10
python -m benchmarks.learning --seeds 10
python -m benchmarks.report
```

{fill(what)}"""


def versions(lines: Iterable[Line]) -> str:
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for name, number in line["versions"].items():
            found[name].add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in sorted(found.items()))


if __name__ == "__main__":
    main()
