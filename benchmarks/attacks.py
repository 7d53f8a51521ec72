"""Play all attacks against the merge rules: seven carts and three hostile clients (scenarios/hostile.toml).

The rules have uniform weights and `proximity.over = "median"`, and know that three clients may be hostile. In the rows
`none` all ten are honest, which shows what a rule costs when nobody attacks. Seeds were fixed beforehand, 500 to 509; a
seed counts once all of its attacks have been played against all rules.

    python -m benchmarks.attacks --seeds 10 --jobs 1

makes the runs that are missing, one seed after another, and prints the tables. Every run appends a JSON line to
benchmarks/results/attacks.jsonl. A run takes 5 to 10 s on a core, a seed with its 112 runs about a quarter of an hour.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from grpo_fed.reports.attack_board import (
    ATTACKS,
    DEFAULT_RULES,
    KEPT,
    AttackBoard,
    BoardRun,
    board_from_lines,
    complete_board,
)
from grpo_fed.runs.statistics import Estimate, estimate

FILE = Path(__file__).parent / "results" / "attacks.jsonl"
SCENARIO = "hostile"
SEEDS = tuple(range(500, 510))
CONTROL = "mean"
"""The rule with which others are compared where nobody attacks."""


def main() -> None:
    """Make missing runs of the first seeds, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many of {SEEDS[0]} to {SEEDS[-1]}")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    seeds = SEEDS[: arguments.seeds]
    complete_board(SCENARIO, ATTACKS, DEFAULT_RULES, seeds, FILE, jobs=arguments.jobs, watch=_show)
    print("\n".join(format_tables(read_board())))


def _show(run: BoardRun) -> None:
    print(f"{run.attack} against {run.rule}, seed {run.seed}: {run.score:.4g}", flush=True)


def read_board() -> AttackBoard:
    """Read the seeds whose runs are all there."""
    return board_from_lines(SCENARIO, ATTACKS, DEFAULT_RULES, SEEDS, FILE)


def format_tables(board: AttackBoard) -> Iterator[str]:
    """Write returns by attack and rule, what is left of the clean return, and what a rule costs without an attack."""
    if not board.seeds:
        return
    yield f"Seeds {', '.join(map(str, board.seeds))} of {SEEDS[0]} to {SEEDS[-1]}."
    yield ""
    yield f"| attack | {' | '.join(f'`{rule}`' for rule in board.rules)} |"
    yield f"| --- |{' --- |' * len(board.rules)}"
    for attack in board.attacks:
        yield f"| {attack} | {' | '.join(_cell(board.scores(attack, rule)) for rule in board.rules)} |"
    yield f"| *lowest mean of an attack* | {' | '.join(f'{board.worst(rule):.0f}' for rule in board.rules)} |"
    shares = [board.worst(rule) / board.clean for rule in board.rules]
    yield f"| *of {board.clean:.0f}, the best without an attack* | {' | '.join(f'{share:.0%}' for share in shares)} |"
    yield f"| *more than `{CONTROL}` without an attack* | {' | '.join(map(_cost, _differences(board)))} |"
    yield ""
    kept = [f"`{rule}`" for rule, share in zip(board.rules, shares, strict=True) if share >= KEPT]
    yield f"Within {1 - KEPT:.0%} of that return over all attacks: {', '.join(kept) or 'no rule'}."


def _cell(scores: list[float]) -> str:
    """Write the mean of seeds, and the lowest of them."""
    return f"{np.mean(scores):.0f} ({min(scores):.0f})"


def _differences(board: AttackBoard) -> Iterator[Estimate | None]:
    """Estimate what each rule gains over the control without an attack, seed by seed."""
    control = np.array(board.scores("none", CONTROL))
    for rule in board.rules:
        gains = np.array(board.scores("none", rule)) - control
        few = rule == CONTROL or len(gains) < 2
        yield None if few else estimate(_seeds_mean, gains[:, None], generator=np.random.default_rng(0))


def _seeds_mean(gains: np.ndarray) -> np.ndarray:
    """Average over seeds, [..., S, 1] -> [...]."""
    return gains.mean(axis=(-2, -1))


def _cost(gain: Estimate | None) -> str:
    return "" if gain is None else f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


if __name__ == "__main__":
    main()
