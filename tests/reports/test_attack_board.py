"""The board of attacks: what it plays, what it repeats, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo_fed.reports.attack_board import (
    ATTACKS,
    DEFAULT_RULES,
    AttackBoard,
    BoardRun,
    board_lines,
    digest,
    load_attacked,
    play_attacks,
)

SCORES = {("none", "mean"): 100.0, ("none", "median"): 98.0, ("ipm", "mean"): 12.0, ("ipm", "median"): 91.0}


def finished(attack: str, rule: str, seed: int = 0) -> BoardRun:
    scenario = load_attacked("hostile", attack, rule, seed)
    return BoardRun(attack, rule, seed, digest(scenario), SCORES.get((attack, rule), 50.0) + seed)


def test_a_rule_is_told_how_many_are_hostile() -> None:
    assert load_attacked("hostile", "alie", "trimmed-mean", 3).merge.fraction == 0.3
    assert load_attacked("hostile", "alie", "multi-krum", 3).merge.byzantine == 3
    mixed = load_attacked("hostile", "alie", "mix+mean", 3)
    assert (mixed.merge.rule, mixed.merge.mix, mixed.seed) == ("mean", 3, 3)
    assert mixed.proximity.over == "median"
    assert [entry.attack for entry in mixed.clients] == ["none", "alie"]


def test_a_scenario_without_hostile_clients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give the hostile entries of .* an attack"):
        load_attacked("contrary", "alie", "mean", 0)
    with pytest.raises(ValueError, match="attack ali: is unknown"):
        load_attacked("hostile", "ali", "mean", 0)


def test_finished_runs_are_not_repeated_and_the_table_is_by_hand(tmp_path: Path) -> None:
    """Two seeds, the second one point better: the median keeps 91.5 of 100.5, and the mean 12.5."""
    runs = [finished(attack, rule, seed) for attack, rule in SCORES for seed in (0, 1)]
    torn = json.dumps(asdict(runs[0]))[:20]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs) + torn)
    played: list[BoardRun] = []
    board = play_attacks("hostile", ["ipm"], ["mean", "median"], [0, 1], tmp_path, watch=played.append)
    assert not played
    lines = list(board_lines(board))
    assert lines[0].split() == ["mean", "median"]
    assert [line.split() for line in lines[1:4]] == [
        ["none", "100.5", "98.5"],
        ["ipm", "12.5", "91.5"],
        ["worst", "12.5", "91.5"],
    ]
    assert lines[4].split()[-2:] == ["12%", "91%"]
    assert "without an attack: median." in lines[6]
    assert (tmp_path / "attack-board.md").read_text().count("\n") == len(lines) + 2
    assert (tmp_path / "attack-board.png").stat().st_size > 1000


def test_the_whole_board_fits_into_80_columns() -> None:
    runs = tuple(BoardRun(attack, rule, 0, "", 1e9) for attack in ATTACKS for rule in DEFAULT_RULES)
    assert max(map(len, board_lines(AttackBoard(ATTACKS, DEFAULT_RULES, (0,), runs)))) <= 80


def test_a_run_of_the_board(tmp_path: Path) -> None:
    small = ["rounds=1", "steps=64", "policy.hidden=[4]", "rollout.num_envs=4", "rollout.horizon=16"]
    small += ["objective.epochs=1", "objective.minibatches=1", "evaluate.episodes=1", "evaluate.step_limit=20"]
    board = play_attacks("hostile", ["none"], ["mix+median"], [0], tmp_path, small, jobs=1)
    (run,) = board.runs
    assert 0 < run.score <= 20
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == asdict(run)
