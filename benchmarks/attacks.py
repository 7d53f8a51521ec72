"""Play all attacks against the merge rules: seven carts and three hostile clients (scenarios/hostile.toml).

The rules have uniform weights and `proximity.over = "median"`, and know that three clients may be hostile. In the rows
`none` all ten are honest. What a rule costs when nobody attacks is seen after 6 of the 20 rounds, when carts still
learn: in the end they all reach the most that there is. Seeds were fixed beforehand, 500 to 509; a seed counts once all
of its attacks have been played against all rules.

    python -m benchmarks.attacks --seeds 10 --jobs 1

makes the runs that are missing, one seed after another, and prints the tables. Every run appends a JSON line to
benchmarks/results/attacks.jsonl. A run takes 5 to 10 s on a core, a seed with its 119 runs about a quarter of an hour.
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
from grpo_fed.runs.statistics import estimate

FILE = Path(__file__).parent / "results" / "attacks.jsonl"
SCENARIO = "hostile"
SEEDS = tuple(range(500, 510))
SHORT = ("rounds=6",)
"""The settings with which rules are compared where nobody attacks."""
CONTROL = "mean"
"""The rule with which others are compared where nobody attacks."""


def main() -> None:
    """Make missing runs of the first seeds, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many of {SEEDS[0]} to {SEEDS[-1]}")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    seeds = SEEDS[: arguments.seeds]
    complete_board(SCENARIO, ["none"], DEFAULT_RULES, seeds, FILE, SHORT, arguments.jobs, _show)
    complete_board(SCENARIO, ATTACKS, DEFAULT_RULES, seeds, FILE, (), arguments.jobs, _show)
    print("\n".join(read_tables()))


def _show(run: BoardRun) -> None:
    print(f"{run.attack} against {run.rule}, seed {run.seed}: {run.score:.4g}", flush=True)


def read_tables() -> Iterator[str]:
    """Write the tables of those seeds whose runs are all there."""
    yield from format_tables(board_from_lines(SCENARIO, ATTACKS, DEFAULT_RULES, SEEDS, FILE))
    yield from format_costs(board_from_lines(SCENARIO, ["none"], DEFAULT_RULES, SEEDS, FILE, SHORT))


def format_tables(board: AttackBoard) -> Iterator[str]:
    """Write returns by attack and rule, and what is left of the clean return."""
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
    yield ""
    kept = [f"`{rule}`" for rule, share in zip(board.rules, shares, strict=True) if share >= KEPT]
    yield f"Within {1 - KEPT:.0%} of that return over all attacks: {', '.join(kept) or 'no rule'}."


def format_costs(board: AttackBoard) -> Iterator[str]:
    """Write what each rule reaches without an attack, and how much more than the control."""
    if not board.seeds:
        return
    yield ""
    yield f"Without an attack, after 6 rounds; seeds {', '.join(map(str, board.seeds))}:"
    yield ""
    yield f"| rule | return | more than `{CONTROL}` |"
    yield "| --- | --- | --- |"
    control = np.array(board.scores("none", CONTROL))
    for rule in board.rules:
        scores = board.scores("none", rule)
        gain = "" if rule == CONTROL or len(scores) < 2 else _interval(np.array(scores) - control)
        yield f"| `{rule}` | {_cell(scores)} | {gain} |"


def _cell(scores: list[float]) -> str:
    """Write the mean of seeds, and the lowest of them."""
    return f"{np.mean(scores):.0f} ({min(scores):.0f})"


def _interval(gains: np.ndarray) -> str:
    """Write the mean of differences by seed, [S], with its interval."""
    gain = estimate(_seeds_mean, gains[:, None], generator=np.random.default_rng(0))
    return f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


def _seeds_mean(gains: np.ndarray) -> np.ndarray:
    """Average over seeds, [..., S, 1] -> [...]."""
    return gains.mean(axis=(-2, -1))


if __name__ == "__main__":
    main()
