"""The learning benchmark: its settings equal the peers', its seeds are independent, its page compares the two."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.utils import FloatSchedule

from benchmarks.learning import CASES, Case, make_scenario, read_runs, train_and_record
from benchmarks.peers import ALGORITHMS, SETTINGS, Setting
from benchmarks.report import format_page

TASKS = [case for case in CASES if case.suite == "tasks"]
ZOO = {(setting.algorithm, setting.budget, setting.task): setting for setting in SETTINGS}


def ours(seed: int, score: float, sampled: float | None = None) -> dict[str, Any]:
    return {
        "suite": "tasks",
        "name": "CartPole-v1/ppo",
        "budget": 100_000,
        "seed": seed,
        "score_deterministic": score,
        "score_sampled": score if sampled is None else sampled,
        "cpu_seconds": 4.0,
        "machine": "2-core CPU, x86_64",
        "versions": {"torch": "2.13.0"},
    }


def theirs(seed: int, score: float) -> dict[str, Any]:
    return {**ours(seed, score), "algorithm": "PPO", "task": "CartPole-v1", "cpu_seconds": 29.0}


def test_the_page_shows_which_side_is_better_and_its_scores() -> None:
    # The middle two of ours are 480 and 490; every one of the peer's is below every one of ours.
    text = format_page(
        [ours(seed, score) for seed, score in enumerate([470.0, 480, 490, 500])],
        [theirs(seed, score) for seed, score in enumerate([100.0, 200, 300, 400])],
    )
    row = next(line for line in text.splitlines() if line.startswith("| CartPole-v1"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3].startswith("485.0 [")
    assert cells[4].startswith("250.0 [")
    assert cells[5] == "1.00 [1.00, 1.00]"
    assert cells[6:] == ["3 of 4", "0 of 4", "4 / 4", "4 / 29"]
    assert "better in 2, level in 0 and worse in 0" in " ".join(text.split())
    assert "We are worse in none" in text


def test_the_page_lists_where_we_are_worse() -> None:
    text = format_page(
        [ours(seed, 100.0, sampled=500.0) for seed in range(3)], [theirs(seed, 500.0) for seed in range(3)]
    )
    where = "in CartPole-v1, ppo / PPO, 100,000 steps, the likeliest action."
    assert [line for line in text.splitlines() if line.startswith(("- Worse", "- Fewer"))] == [
        f"- Worse than the peer, 100.0 against 500.0, {where}",
        f"- Fewer seeds solve it, 0 of 3 against 3 of 3, {where}",
    ]
    assert "better in 0, level in 1 and worse in 1" in " ".join(text.split())


def test_a_row_without_a_peer_has_no_comparison() -> None:
    lines = [{**ours(seed, 1.0), "suite": "presets"} for seed in range(2)]
    assert "No row has a peer" in format_page(lines, [])


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in TASKS for peer in case.peers],
    ids=lambda each: getattr(each, "title", each),
)
def test_our_settings_equal_those_of_the_rl_zoo(case: Case, peer: str) -> None:
    peer_setting = ZOO[peer, case.budget, case.task]
    scenario = make_scenario(case, 1)
    samples = scenario.rollout.num_envs * scenario.rollout.horizon
    assert case.steps == samples
    mine = {
        "num_envs": scenario.rollout.num_envs,
        "n_steps": scenario.rollout.horizon,
        "gamma": scenario.objective.gamma,
        "gae_lambda": scenario.objective.gae_lambda,
        "ent_coef": scenario.objective.entropy,
        "max_grad_norm": scenario.objective.max_grad_norm,
        "batch_size": samples // scenario.objective.minibatches,
        "n_epochs": scenario.objective.epochs,
        "learning_rate": scenario.objective.learning_rate,
        "clip_range": scenario.objective.clip,
        "vf_coef": scenario.objective.value_coefficient,
        "n_critic_updates": scenario.objective.value_epochs,
        "cg_damping": scenario.trust.cg_damping,
        "target_kl": scenario.trust.target,
    }
    peers = peer_settings(peer_setting)
    assert {key: mine[key] for key in peers} == peers
    assert scenario.normalise.observations == scenario.normalise.rewards == peer_setting.normalize


def peer_settings(peer_setting: Setting) -> dict[str, Any]:
    """Collect the peer's hyperparameters with its defaults, without those that have no counterpart of ours."""
    defaults = {
        name: each.default for name, each in inspect.signature(ALGORITHMS[peer_setting.algorithm]).parameters.items()
    }
    every = {**defaults, **peer_setting.hyperparameters}
    schedules = {key: FloatSchedule(every[key])(1.0) for key in ("learning_rate", "clip_range") if key in every}
    known = {
        "A2C": ("n_steps", "gamma", "gae_lambda", "ent_coef", "max_grad_norm", "vf_coef"),
        "TRPO": ("n_steps", "gamma", "gae_lambda", "n_critic_updates", "cg_damping", "target_kl", "batch_size"),
        "PPO": ("n_steps", "gamma", "gae_lambda", "ent_coef", "max_grad_norm", "vf_coef", "batch_size", "n_epochs"),
    }[peer_setting.algorithm.removesuffix(" without gSDE")]
    return {"num_envs": peer_setting.num_envs, **{key: every[key] for key in known}, **schedules}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.suite}, {case.title}")
def test_every_case_makes_a_valid_scenario(case: Case) -> None:
    scenario = make_scenario(case, 3)
    assert scenario.rounds * scenario.steps >= case.budget
    assert not scenario.policy.same_start


def test_the_score_of_a_seed_does_not_depend_on_other_seeds(tmp_path: Path) -> None:
    case = replace(next(case for case in CASES if case.name == "CartPole-v1/ppo"), budget=512)
    first = train_and_record(case, [0, 1], tmp_path / "a.jsonl")
    (alone,) = train_and_record(case, [1], tmp_path / "b.jsonl")
    assert [run.seed for run in first] == [0, 1]
    assert (first[1].score_deterministic, first[1].score_sampled) == (alone.score_deterministic, alone.score_sampled)
    assert first[0].score_sampled != first[1].score_sampled
    assert alone.steps == 512
    assert read_runs(tmp_path / "a.jsonl") == first
    assert json.loads((tmp_path / "b.jsonl").read_text())["name"] == "CartPole-v1/ppo"
