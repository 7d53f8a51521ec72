"""The tables of the benchmark of attacks, and which of its runs count, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.attacks import SCENARIO, format_costs, format_tables
from grpo_fed.reports.attack_board import AttackBoard, BoardRun, board_from_lines, digest, load_attacked

SCORES = {
    ("none", "mean"): (500.0, 480.0),
    ("none", "median"): (490.0, 476.0),
    ("ipm", "mean"): (10.0, 30.0),
    ("ipm", "median"): (450.0, 440.0),
    ("alie", "mean"): (300.0, 480.0),
    ("alie", "median"): (480.0, 470.0),
}


def test_a_rule_is_measured_by_its_worst_attack_and_by_what_it_costs_without_one() -> None:
    """The best clean mean is 490, of which the median keeps 445. Without an attack it costs 10 and 4."""
    attacks, rules, seeds = ("none", "ipm", "alie"), ("mean", "median"), (500, 501)
    runs = tuple(
        BoardRun(attack, rule, seed, "", score)
        for (attack, rule), scores in SCORES.items()
        for seed, score in zip(seeds, scores, strict=True)
    )
    board = AttackBoard(attacks, rules, seeds, runs)
    lines = list(format_tables(board))
    assert lines[0] == "Seeds 500, 501 of 500 to 509."
    assert lines[4:9] == [
        "| none | 490 (480) | 483 (476) |",
        "| ipm | 20 (10) | 445 (440) |",
        "| alie | 390 (300) | 475 (470) |",
        "| *lowest mean of an attack* | 20 | 445 |",
        "| *of 490, the best without an attack* | 4% | 91% |",
    ]
    assert lines[-1] == "Within 10% of that return over all attacks: `median`."
    assert list(format_costs(board))[-2:] == [
        "| `mean` | 490 (480) |  |",
        "| `median` | 483 (476) | -7.0 [-10.0, -4.0] |",
    ]
    nothing = AttackBoard(attacks, rules, (), ())
    assert not [*format_tables(nothing), *format_costs(nothing)]


def test_a_seed_counts_once_all_its_runs_are_there(tmp_path: Path) -> None:
    file = tmp_path / "attacks.jsonl"
    for seed, attacks in ((500, ("none", "ipm")), (501, ("none",))):
        for attack in attacks:
            scenario = load_attacked(SCENARIO, attack, "mean", seed)
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(BoardRun(attack, "mean", seed, digest(scenario), 1.0))) + "\n")
    board = board_from_lines(SCENARIO, ["ipm"], ["mean"], [500, 501], file)
    assert board.seeds == (500,)
    assert [(run.attack, run.seed) for run in board.runs] == [("none", 500), ("ipm", 500)]
