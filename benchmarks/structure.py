"""Measure who leaves what where the truth is planted, over learning rates, schedules, epochs and cases.

A case is a scenario in benchmarks/structures; structure_runs.py says which of its clients should leave which block.
*Found* is a client that should leave and has left by the end what it should. *Wrongly out* are the (client, block,
round) in which a client is out of a block that it should share. An *honest* client should leave nothing.

    python -m benchmarks.structure --part middle grid --jobs 2

Seeds are fixed: 200 to 209 in the middle of the grid, 200 to 202 elsewhere, 200 to 219 for the long runs. Every
finished run appends a JSON line to benchmarks/results/structure.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.structure_runs import CASES, Cell, StructureRun, Trial, make_runs, read_runs
from grpo_fed.runs.statistics import estimate, interquartile_mean

FILE = Path(__file__).parent / "results" / "structure.jsonl"
RATES = (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
SCHEDULES = ("linear", "constant")
MIDDLE = 2.5e-3
SEEDS = range(200, 210)
FEW_SEEDS = range(200, 203)
CARTS = tuple(case.name for case in CASES if case.name.startswith("cart"))
FAMILIES = (
    ("pendulum-turned", 1e-3, 10, "constant"),
    ("acrobot-swapped", 1e-3, 4, "linear"),
    ("points-contrary", 1e-3, 10, "constant"),
)
"""Cases of other families with their learning rate, epochs and schedule."""
PEERS = ("local", "fedavg", "clusters", "huber")
"""What is run beside `grpo`; huber is grpo with a threshold on distances, `chance_threshold`."""
FOUND, WRONG, HONEST = 0.95, 0.01, 0.01
"""Targets: planted clients found; (client, block, round) wrongly out and runs with an honest client out, at most."""


def plan_middle() -> Iterator[Trial]:
    """Plan the middle of the grid, with ten seeds."""
    for seed in SEEDS:
        yield from (Trial(Cell(case, MIDDLE, plan, 4), "grpo", seed) for plan in SCHEDULES for case in CARTS)


def plan_grid() -> Iterator[Trial]:
    """Plan all rates and schedules with four epochs."""
    for seed in FEW_SEEDS:
        cells = [Cell(case, rate, plan, 4) for rate in RATES for plan in SCHEDULES for case in CARTS]
        yield from (Trial(cell, "grpo", seed) for cell in cells)


def plan_epochs() -> Iterator[Trial]:
    """Plan all rates and schedules with ten epochs."""
    for seed in FEW_SEEDS:
        cells = [Cell(case, rate, plan, 10) for rate in RATES for plan in SCHEDULES for case in CARTS]
        yield from (Trial(cell, "grpo", seed) for cell in cells)


def plan_peers() -> Iterator[Trial]:
    """Plan the other methods in the middle of the grid."""
    cells = [Cell(case, MIDDLE, plan, 4) for plan in SCHEDULES for case in CARTS]
    yield from (Trial(cell, method, seed) for seed in FEW_SEEDS for method in PEERS for cell in cells)


def plan_returns() -> Iterator[Trial]:
    """Plan the other methods at all rates and schedules with four epochs."""
    cells = [Cell(case, rate, plan, 4) for rate in RATES for plan in SCHEDULES for case in CARTS]
    yield from (Trial(cell, method, seed) for seed in FEW_SEEDS for method in PEERS for cell in cells)


def plan_families() -> Iterator[Trial]:
    """Plan other tasks at half, once and twice their rate, and other methods at their rate."""
    for seed in FEW_SEEDS:
        for case, rate, epochs, plan in FAMILIES:
            yield from (Trial(Cell(case, rate * factor, plan, epochs), "grpo", seed) for factor in (1, 0.5, 2))
    for seed in FEW_SEEDS[:2]:
        for case, rate, epochs, plan in FAMILIES:
            yield from (Trial(Cell(case, rate, plan, epochs), method, seed) for method in PEERS[:3])


def plan_natural() -> Iterator[Trial]:
    """Plan natural steps instead of Adam's."""
    cases = ("cart-alike", "cart-swapped", "cart-permuted", "cart-poles")
    cells = [Cell(case, rate, "constant", 10, "natural") for rate in (3e-2, 1e-1) for case in cases]
    yield from (Trial(cell, "grpo", seed) for seed in FEW_SEEDS for cell in cells)


def plan_long() -> Iterator[Trial]:
    """Plan 200 rounds of identical clients."""
    for seed in range(200, 220):
        yield Trial(Cell("cart-alike", MIDDLE, SCHEDULES[(seed + 1) % 2], 4, rounds=200), "grpo", seed)


PARTS: Mapping[str, Callable[[], Iterator[Trial]]] = {
    "middle": plan_middle,
    "grid": plan_grid,
    "long": plan_long,
    "peers": plan_peers,
    "families": plan_families,
    "natural": plan_natural,
    "epochs": plan_epochs,
    "returns": plan_returns,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process with one thread")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    for part in arguments.part:
        make_runs(list(PARTS[part]()), arguments.results, arguments.jobs)
    print("\n".join(format_tables(read_runs(arguments.results))))


# Tables --------------------------------------------------------------------------------------------------------------


def format_tables(runs: Sequence[StructureRun]) -> Iterator[str]:
    """Write all tables of the runs that are finished."""
    carts = [run for run in runs if run.cell.case in CARTS and not run.cell.rounds and run.cell.step == "adam"]
    ours = [run for run in carts if run.method == "grpo"]
    if not ours:
        return
    middle = [run for run in ours if run.cell.rate == MIDDLE and run.cell.epochs == 4]
    yield f"**Carts, learning rate {MIDDLE:g}, 4 epochs**"
    yield ""
    yield from format_decisions(middle)
    for epochs in (4, 10):
        grid = [run for run in ours if run.cell.epochs == epochs]
        if grid:
            yield ""
            yield f"**Carts, {epochs} epochs**: found % / wrongly out %, {seeds_of(grid)}"
            yield ""
            yield from format_grid(grid)
    old = [run for run in carts if run.method == "huber" and run.cell.epochs == 4]
    if old:
        yield ""
        yield f"**Carts, 4 epochs, the old rule `huber`**: found % / wrongly out %, {seeds_of(old)}"
        yield ""
        yield from format_grid(old)
    at_middle = [run for run in carts if run.cell.rate == MIDDLE and run.cell.epochs == 4]
    yield ""
    yield "**Returns of the carts** at the same settings, by method"
    yield ""
    yield from format_returns(at_middle)
    others = [run for run in runs if run.cell.case not in CARTS]
    if others:
        yield ""
        yield "**Other tasks**"
        yield ""
        yield from format_decisions([run for run in others if run.method == "grpo"])
        yield ""
        yield from format_returns(others)
    natural = [run for run in runs if run.cell.step != "adam"]
    if natural:
        yield ""
        yield "**Carts with natural steps**"
        yield ""
        yield from format_decisions(natural)
    long = [run for run in runs if run.cell.rounds]
    if long:
        yield ""
        yield from format_long(long)
    for method in ("grpo", *PEERS[2:]):
        yield ""
        yield from format_low_returns([run for run in carts if run.cell.epochs == 4], method)
    missed = list(list_misses([run for run in runs if run.method == "grpo" and not run.cell.rounds]))
    yield ""
    yield f"**Cells that miss a target** ({FOUND:.0%} found, {WRONG:.0%} wrongly out, no honest client out in 99 %):"
    yield ""
    yield from missed or ["- none"]


def format_decisions(runs: Sequence[StructureRun]) -> Iterator[str]:
    """Write who was found and who was wrongly out, for each cell."""
    yield "| case | rate | schedule | found | in rounds | wrongly out | runs with an honest client out | runs |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for cell, of_cell in by_cell(runs).items():
        found, rounds = found_share(of_cell)
        yield (
            f"| {cell.case} | {cell.rate:g} | {cell.schedule} | {'' if found is None else f'{found:.0%}'} |"
            f" {'' if not rounds else f'{median(rounds):g}'} | {wrong_share(of_cell):.1%} |"
            f" {sum(run.honest_out() for run in of_cell)} | {len(of_cell)} |"
        )


def format_grid(runs: Sequence[StructureRun]) -> Iterator[str]:
    """Write a row for each case and a column for each rate and schedule."""
    columns = sorted(
        {(run.cell.rate, run.cell.schedule) for run in runs}, key=lambda each: (each[1] != "linear", each[0])
    )
    yield f"| case | {' | '.join(f'{rate:g} {schedule}' for rate, schedule in columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for case in CARTS:
        cells = []
        for column in columns:
            of_cell = [run for run in runs if run.cell.case == case and (run.cell.rate, run.cell.schedule) == column]
            found = found_share(of_cell)[0] if of_cell else None
            first = "" if found is None else f"{found:.0%} / ".replace("%", "")
            cells.append(f"{first}{100 * wrong_share(of_cell):.1f}" if of_cell else "")
        yield f"| {case} | {' | '.join(cells)} |"


def format_returns(runs: Sequence[StructureRun]) -> Iterator[str]:
    """Write the returns of the clients with something planted and of the others, evaluated after the last round.

    Only seeds that all methods have count.
    """
    methods = [method for method in ("grpo", *PEERS) if any(run.method == method for run in runs)]
    seeds = sorted(set.intersection(*({run.seed for run in runs if run.method == method} for method in methods)))
    yield f"| case | rate | schedule | clients | {' | '.join(methods)} |"
    yield "| --- | --- | --- | --- |" + " --- |" * len(methods)
    for cell, of_cell in by_cell(runs).items():
        if {run.method for run in of_cell} != set(methods):
            continue
        for planted in (False, True):
            texts = []
            for method in methods:
                scores = [
                    [score for client, score in run.scores.items() if (client in run.planted) == planted]
                    for run in of_cell
                    if run.method == method and run.seed in seeds
                ]
                texts.append(format_estimate(np.array(scores)) if scores and scores[0] else "")
            if any(texts):
                clients = "planted" if planted else "others"
                yield f"| {cell.case} | {cell.rate:g} | {cell.schedule} | {clients} | {' | '.join(texts)} |"


def format_long(runs: Sequence[StructureRun]) -> Iterator[str]:
    """Write how many of the identical clients ever left something in long runs."""
    pairs = {(run.seed, client, block) for run in runs for client, block in run.out}
    total = sum(len(run.scores) * run.groups for run in runs)
    returned = sum(not leaves for run in runs for *_, leaves in run.moves)
    worst, played = min(min(run.scores.values()) for run in runs), np.mean([run.played for run in runs])
    yield (
        f"**Six identical carts, {runs[0].rounds} rounds, {len(runs)} seeds**: {len(pairs)} of {total} pairs of client"
        f" and block ever left ({len(pairs) / total:.1%}), {returned} times a client came back; the worst final return"
        f" is {worst:.0f}; {played:.0f} episodes a run were played to compare."
    )


def format_low_returns(runs: Sequence[StructureRun], ours: str) -> Iterator[str]:
    """Count where the returns of a method are below those of the better of `local` and `fedavg`: intervals lie apart.

    For `grpo` they are listed too.
    """
    methods, total, low = (ours, *PEERS[:2]), 0, list[str]()
    for cell, of_cell in by_cell(runs).items():
        seeds = set.intersection(*({run.seed for run in of_cell if run.method == method} for method in methods))
        planted_of = {run.seed: run.planted for run in of_cell if run.method == ours}
        for planted in (False, True) if seeds else ():
            found = {}
            for method in methods:
                scores = [
                    [score for client, score in run.scores.items() if (client in planted_of[run.seed]) == planted]
                    for run in of_cell
                    if run.method == method and run.seed in seeds
                ]
                if scores[0]:
                    found[method] = estimate(interquartile_mean, np.array(scores), generator=np.random.default_rng(0))
            if not found:
                continue
            total += 1
            if found[ours].high < max((found[method] for method in PEERS[:2]), key=lambda each: each.value).low:
                texts = (f"{name} {each.value:.0f} [{each.low:.0f}, {each.high:.0f}]" for name, each in found.items())
                who = "planted" if planted else "others"
                low.append(f"- {cell.case}, rate {cell.rate:g}, {cell.schedule}, {who}: {', '.join(texts)}")
    yield (
        f"**Returns of `{ours}` over the whole grid**, 4 epochs, seeds that all three have: in {total - len(low)} of"
        f" {total} (cell, kind of client) its interval reaches that of the better of `local` and `fedavg`."
        f"{' It lies below in' if low and ours == 'grpo' else ''}"
    )
    if low and ours == "grpo":
        yield ""
        yield from low


def list_misses(runs: Sequence[StructureRun]) -> Iterator[str]:
    """List the cells that miss a target of decisions."""
    for cell, of_cell in by_cell(runs).items():
        found, wrong = found_share(of_cell)[0], wrong_share(of_cell)
        honest = sum(run.honest_out() for run in of_cell)
        if (found is not None and found < FOUND) or wrong > WRONG or honest > HONEST * len(of_cell):
            text = "" if found is None else f"found {found:.0%}, "
            step = "" if cell.step == "adam" else f", {cell.step} steps"
            yield (
                f"- {cell.case}, rate {cell.rate:g}, {cell.schedule}, {cell.epochs} epochs{step}: {text}wrongly out"
                f" {wrong:.1%}, an honest client out in {honest} of {len(of_cell)} runs"
            )


# Measures ------------------------------------------------------------------------------------------------------------


def by_cell(runs: Sequence[StructureRun]) -> dict[Cell, list[StructureRun]]:
    """Collect the runs of each cell, in the order of the cases."""
    order = [case.name for case in CASES]
    cells: dict[Cell, list[StructureRun]] = {}
    for run in sorted(runs, key=lambda run: (order.index(run.cell.case), run.cell.schedule != "linear", run.cell.rate)):
        cells.setdefault(run.cell, []).append(run)
    return cells


def found_share(runs: Sequence[StructureRun]) -> tuple[float | None, list[int]]:
    """Compute the share of the planted clients that were found, None without any, and each one's rounds until then."""
    found = [rounds for run in runs for rounds in run.found().values()]
    rounds = [number for number in found if number is not None]
    return (len(rounds) / len(found) if found else None), rounds


def wrong_share(runs: Sequence[StructureRun]) -> float:
    """Compute the share of (client, block, round) that were wrongly out."""
    counts = [run.wrongly_out() for run in runs]
    return sum(count for count, _ in counts) / max(1, sum(total for _, total in counts))


def seeds_of(runs: Sequence[StructureRun]) -> str:
    """Say how many seeds the runs have."""
    counts = sorted({len(of_cell) for of_cell in by_cell(runs).values()})
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"


def format_estimate(scores: np.ndarray) -> str:
    """Write the interquartile mean of scores [seed, client] with its interval."""
    result = estimate(interquartile_mean, scores, generator=np.random.default_rng(0))
    return f"{result.value:.0f} [{result.low:.0f}, {result.high:.0f}]"


if __name__ == "__main__":
    main()
