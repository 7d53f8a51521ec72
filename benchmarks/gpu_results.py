"""Collect the runs of benchmarks/gpu.py in one file, and make the tables of them that benchmarks/RESULTS.md shows.

    python -m benchmarks.gpu_results gpu.jsonl
    python -m benchmarks.report

appends the lines of a run to benchmarks/results/gpu.jsonl, each with the number of the run, and writes the page.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import BATCH

FILE = Path(__file__).parent / "results" / "gpu.jsonl"
Line = Mapping[str, Any]
"""One result of one run: its `run`, its `part`, and the values that the part reported."""

NOTES = {
    1: """In this run the learner summed the steps of all clients once for each client, which is quadratic in the number
    of clients. It is most of "rest" in the table of speeds, and slows down 1,024 clients and more. It has been removed
    since. The driver was 580.159.04.""",
    2: """With the quadratic loop removed and the resets of many episodes made together. All 2,048 carts were solved
    after 128 seconds, while one client of stable-baselines3 took a median of 6.2 seconds in run 1. The other parts were
    not run again. Here 64 and 256 clients are slower than in run 1, environments and updates alike; the machine is
    shared, and the reason was not looked into.""",
}
"""What a reader has to know about a run, by its number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="the file that `python -m benchmarks.gpu --out` wrote in one run")
    parser.add_argument("--file", type=Path, default=FILE, help="the file that collects all runs; default: %(default)s")
    arguments = parser.parse_args()
    number = append_run(read_lines(arguments.lines), arguments.file)
    print(f"run {number} was added to {arguments.file}")


def append_run(lines: Sequence[Line], file: Path) -> int:
    """Append the lines of one run to the file of all runs; returns the number that the run got."""
    number = 1 + max((line["run"] for line in read_lines(file)), default=0)
    with file.open("a") as out:
        out.writelines(json.dumps({"run": number, **line}) + "\n" for line in lines)
    return number


def read_lines(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def format_tables(results: Sequence[Line]) -> Iterator[str]:
    """Write the tables of every run, the first run first."""
    tables = (format_predictions, format_speeds, format_solving, format_graphs)
    for place, number in enumerate(sorted({line["run"] for line in results})):
        run = [line for line in results if line["run"] == number]
        yield f"\n## Run {number}" if place else f"## Run {number}"
        for text in (describe_machine(run), NOTES.get(number, "")):
            if text:
                yield "\n" + textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
        for table in tables:
            if rows := list(table(run)):
                yield "\n" + "\n".join(rows)


def describe_machine(run: Sequence[Line]) -> str:
    (machine,) = select_lines(run, "machine")
    return (
        f"{machine['device']}, {machine['cores']} CPU cores ({machine['cpu']}) of which one thread is used, Python"
        f" {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}."
    )


def select_lines(run: Sequence[Line], part: str, *keys: str) -> list[Line]:
    """Select the lines of a part that have these keys."""
    return [line for line in run if line["part"] == part and all(key in line for key in keys)]


def format_predictions(run: Sequence[Line]) -> Iterator[str]:
    """For each part, what was predicted before the first measurement, and what was measured."""
    yield from format_head("part", "predicted", "measured")
    for line in select_predictions(run):
        measured = OUTCOMES[line["part"]](run) if has_results(run, line["part"]) else "no time was left"
        yield f"| {line['part']} | {line['expected']} | {measured} |"


def select_predictions(run: Sequence[Line]) -> list[Line]:
    return [line for line in run if "expected" in line]


def has_results(run: Sequence[Line], part: str) -> bool:
    ignored = ("expected", "left_out", "error")
    return any(line["part"] == part and not any(key in line for key in ignored) for line in run)


def describe_numbers(run: Sequence[Line]) -> str:
    compared = select_lines(run, "numbers", "same_actions")
    parts = []
    for name in dict.fromkeys(line["name"] for line in compared):
        rounds = [line for line in compared if line["name"] == name]
        gap, same = max(line["max_abs"] for line in rounds), min(line["same_actions"] for line in rounds)
        parts.append(
            f"{name}: parameters differ from the CPU's by {gap:.1e} at most, {100 * same:g} % of actions equal"
        )
    return "; ".join(parts)


def describe_speeds(run: Sequence[Line]) -> str:
    on_device, on_cpu = select_speeds(run)
    biggest = max(on_device, key=lambda line: line["clients"])
    off_device = [1 - share_of_round(line, "policy", "batch", "update") for line in on_device if line["clients"] >= 256]
    text = f"{format_range([line['steps_per_second'] / 1000 for line in on_device])} thousand steps/s on the device"
    if on_cpu:
        text += f", {format_range([line['steps_per_second'] / 1000 for line in on_cpu])} on the CPU"
    if updates := [
        slow["spent"]["update"] / fast["spent"]["update"]
        for fast in on_device
        for slow in on_cpu
        if fast["clients"] == slow["clients"]
    ]:
        text += f"; the CPU's update takes {format_range(updates)} times as long"
    if off_device:
        text += f"; from 256 clients on {format_range([100 * each for each in off_device])} % of a round are on the CPU"
    if biggest["memory_mb"] is not None:
        text += f"; {biggest['memory_mb'] / 1000:.1f} GB at {biggest['clients']:,} clients"
    return text


def describe_solving(run: Sequence[Line]) -> str:
    last = select_lines(run, "solve", "mean_return")[-1]
    parts = [
        f"{100 * line['share']:g} % after {line['steps'] / 1000:.0f} thousand steps"
        if line["steps"] is not None
        else f"{100 * line['share']:g} % not reached"
        for line in select_lines(run, "solve", "share")
    ]
    return (
        f"{', '.join(parts)}; {100 * last['solved']:.1f} % when the benchmark stopped after {last['seconds']:.0f} s,"
        f" {last['seconds'] - last['learning']:.0f} of them for evaluation"
    )


def describe_peer(run: Sequence[Line]) -> str:
    seeds, (total,) = select_lines(run, "peer", "seed"), select_lines(run, "peer", "hours")
    learning = [line["learning"] for line in seeds]
    (clients, *_) = [line["clients"] for line in select_lines(run, "solve", "share")] or [2048]
    return (
        f"{min(learning):.1f} to {max(learning):.1f} s of learning, median {total['median_learning']:.1f} of"
        f" {len(seeds)} seeds; at that pace {clients:,} of them on {total['cores']} cores take"
        f" {60 * total['hours']:.0f} minutes ({total['hours']:.2f} h)"
    )


def describe_profile(run: Sequence[Line]) -> str:
    parts = []
    for line in select_lines(run, "profile", "launches"):
        products = sum(row["microseconds"] for row in line["top"] if "gem" in row["kernel"])
        tanh = sum(row["microseconds"] for row in line["top"] if "tanh" in row["kernel"])
        parts.append(
            f"{line['name']}: {line['launches']:.0f} launches, {line['copies']:.1f} copies,"
            f" {line['microseconds'] / 1000:.2f} ms on the device, of its longest kernels matrix products are"
            f" {100 * products / line['microseconds']:.0f} % and tanh without its slope"
            f" {100 * tanh / line['microseconds']:.0f} %"
        )
    return "; ".join(parts)


def describe_graphs(run: Sequence[Line]) -> str:
    return "; ".join(
        f"a {line['what']} of {line['clients']:,} clients takes {100 * line['graph'] / line['eager']:.0f} % of the time"
        for line in sorted(select_lines(run, "graphs", "graph"), key=lambda line: (line["what"], line["clients"]))
    )


OUTCOMES: Mapping[str, Callable[[Sequence[Line]], str]] = {
    "numbers": describe_numbers,
    "speed": describe_speeds,
    "solve": describe_solving,
    "peer": describe_peer,
    "profile": describe_profile,
    "graphs": describe_graphs,
    "cpu": lambda _: "see the rows of the CPU in the table of speeds",
}
"""What was measured in each part, in words."""


def select_speeds(run: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The lines of speeds by the number of clients: on the device, and on the CPU where the device is another."""
    timed = sorted(select_lines(run, "speed", "spent"), key=lambda line: line["clients"])
    on_device = [line for line in timed if line["device"] != "cpu"] or timed
    return on_device, [line for line in timed if line not in on_device]


def share_of_round(line: Line, *parts: str) -> float:
    """The share of a round that is spent on these parts."""
    return float(sum(line["spent"][part] for part in parts) / line["watched"])


def format_range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def format_speeds(run: Sequence[Line]) -> Iterator[str]:
    """Steps per second by the number of clients, and the seconds of a round by what they were spent on."""
    on_device, on_cpu = select_speeds(run)
    if not on_device:
        return
    yield f"Speed (a round is {BATCH:,} steps of each client; seconds of one round by what they are spent on):\n"
    parts = list(on_device[0]["spent"])
    yield from format_head("clients", "device", "steps/s", "seconds a round", *parts, "peak MB")
    for line in (*on_device, *on_cpu):
        seconds = [f"{line['spent'][part]:.3f}" for part in parts]
        memory = "" if line["memory_mb"] is None else f"{line['memory_mb']:,.0f}"
        device = f"{line['device']}, {line['threads']} threads" if line["threads"] > 1 else line["device"]
        cells = [f"{line['clients']:,}", device, f"{line['steps_per_second']:,.0f}", f"{line['watched']:.3f}"]
        yield f"| {' | '.join([*cells, *seconds, memory])} |"


def format_solving(run: Sequence[Line]) -> Iterator[str]:
    """How many clients had solved their task after how many steps and seconds."""
    evaluations = select_lines(run, "solve", "mean_return")
    if not evaluations:
        return
    yield "Time to solve (evaluation return of 475), all clients together on the device:\n"
    yield from format_head("steps of each client", "seconds", "of them learning", "solved", "mean return")
    for line in evaluations:
        yield (
            f"| {line['steps']:,} | {line['seconds']:.1f} | {line['learning']:.1f} | {100 * line['solved']:.1f} % |"
            f" {line['mean_return']:.1f} |"
        )


def format_graphs(run: Sequence[Line]) -> Iterator[str]:
    """Milliseconds with and without CUDA graphs."""
    graphs = select_lines(run, "graphs", "graph")
    if not graphs:
        return
    yield "CUDA graphs:\n"
    yield from format_head("clients", "what", "ms as it is", "ms as a graph", "ratio", "largest difference")
    for line in graphs:
        yield (
            f"| {line['clients']:,} | {line['what']} | {line['eager']:.3f} | {line['graph']:.3f} |"
            f" {line['eager'] / line['graph']:.2f} | {line['difference']:g} |"
        )


def format_head(*names: str) -> Iterator[str]:
    """The head of a table."""
    yield f"| {' | '.join(names)} |"
    yield f"{'| --- ' * len(names)}|"


if __name__ == "__main__":
    main()
