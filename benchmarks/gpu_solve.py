"""Measure the time until clients have solved CartPole: ours together on a device, the peer's one by one on a core."""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec
from math import ceil
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_report import NUM_ENVS, Extent, Report, describe_machine, make_learner, time_call

SOLVED = 475.0
"""Mean return over `EPISODES` deterministic episodes from which CartPole counts as solved."""
EPISODES = 8
ZOO_HORIZON, ZOO_BUDGET = 32, 100_000
ZOO = {
    "rollout": {"num_envs": NUM_ENVS, "horizon": ZOO_HORIZON},
    "objective": {
        "preset": "ppo",
        "minibatches": 1,
        "epochs": 20,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "clip": 0.2,
        "clip_schedule": "linear",
    },
}
"""The rl-zoo's settings for PPO on CartPole, with our names; `measure_peer` has them with the peer's names."""
ZOO_BATCH = NUM_ENVS * ZOO_HORIZON
UPDATES = -(-ZOO_BUDGET // ZOO_BATCH)
SHARES = (0.5, 0.9, 0.95, 0.99, 1.0)
"""Shares of the clients whose time to solve is reported."""


def measure_solving(report: Report, extent: Extent, device: torch.device) -> None:
    """Train clients with the rl-zoo's settings until all have an evaluation return of 475, or the time is over."""
    clients = extent.solving
    start, learning = time.perf_counter(), 0.0
    learner = make_learner(clients, device, ZOO, seed=1)
    solved = np.full(clients, np.inf)
    """Seconds until each client had solved its task, with building and evaluations."""
    trained = np.full(clients, np.inf)
    """Seconds of learning until each client had solved its task."""
    steps = np.full(clients, np.inf)
    """Steps of each client until it had solved its task."""
    for update in range(extent.every, extent.updates + 1, extent.every):
        progress = (update - extent.every) / UPDATES, update / UPDATES
        learning += time_call(partial(learner.train, extent.every * ZOO_BATCH, *progress), device)
        returns = np.array([each.score for each in learner.evaluate(EPISODES, number=update)])
        elapsed = time.perf_counter() - start
        fresh = (returns >= SOLVED) & np.isinf(solved)
        solved[fresh], trained[fresh], steps[fresh] = elapsed, learning, update * ZOO_BATCH
        share = float(np.isfinite(solved).mean())
        text = (
            f"{update * ZOO_BATCH:,} steps each, {elapsed:.1f} s, {learning:.1f} of them learning:"
            f" {100 * share:.2f} % solved so far, mean return {returns.mean():.1f}"
        )
        report.add(
            "solve",
            text,
            steps=update * ZOO_BATCH,
            seconds=elapsed,
            learning=learning,
            solved=share,
            mean_return=float(returns.mean()),
        )
        if share == 1.0 or elapsed > extent.cap or not report.has_time(0):
            break
    total = int(learner.steps_done.sum())
    report.add("solve", f"{clients} clients made {total:,} steps, {total / learning:,.0f} a second", total=total)
    for share in SHARES:
        last = ceil(share * clients) - 1
        values = {"share": share} | {
            name: float(np.sort(each)[last]) if np.isfinite(np.sort(each)[last]) else None
            for name, each in (("seconds", solved), ("learning", trained), ("steps", steps))
        }
        if values["seconds"] is None:
            text = f"{100 * share:g} % of {clients} clients: not reached"
        else:
            text = (
                f"{100 * share:g} % of {clients} clients: {values['seconds']:.1f} s, {values['learning']:.1f} of them"
                f" learning, {values['steps']:,.0f} steps each"
            )
        report.add("solve", text, clients=clients, device=str(device), **values)
    learner.close()


def measure_peer(report: Report, extent: Extent, device: torch.device) -> None:
    """Measure the time of one client of stable-baselines3 on one core, with the same settings and evaluations."""
    if find_spec("stable_baselines3") is None:
        report.add("peer", "left out: stable_baselines3 is not installed here", left_out=True)
        return
    runs: list[dict[str, Any]] = []
    for seed in extent.seeds:
        if not report.has_time(median(run["seconds"] for run in runs) if runs else 0):
            break
        runs.append(train_peer(seed, extent))
        seconds, learning, steps = runs[-1]["seconds"], runs[-1]["learning"], runs[-1]["steps"]
        ending = "solved" if runs[-1]["solved"] else "not solved"
        text = f"seed {seed}: {ending} after {seconds:.1f} s, {learning:.1f} of them learning, {steps:,} steps"
        report.add("peer", text, seed=seed, **runs[-1])
    middle = median(run["learning"] for run in runs)
    cores = describe_machine(device)["cores"]
    hours = middle * extent.solving / cores / 3600
    text = (
        f"median of {len(runs)} seeds: {middle:.1f} s of learning; at that pace {extent.solving} clients, one after"
        f" another on each of {cores} cores, take {hours:.2f} h"
    )
    report.add("peer", text, median_learning=middle, cores=cores, hours=hours)


def train_peer(seed: int, extent: Extent) -> dict[str, Any]:
    """Train the peer until it has solved its task or its budget is used up."""
    from stable_baselines3 import PPO as PeerPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    start = time.perf_counter()
    played = make_vec_env("CartPole-v1", n_envs=NUM_ENVS, seed=10_000 + seed, env_kwargs={"render_mode": None})

    class StopWhenSolved(BaseCallback):
        """Evaluates after as many rollouts as our clients, and stops once the task is solved."""

        def __init__(self) -> None:
            super().__init__()
            self.rollouts, self.evaluating, self.solved = 0, 0.0, False

        def _on_rollout_start(self) -> None:
            if self.rollouts and self.rollouts % extent.every == 0 and not self.solved:
                start = time.perf_counter()
                score, _ = evaluate_policy(self.model, played, EPISODES, deterministic=True)
                self.evaluating += time.perf_counter() - start
                self.solved = float(score) >= SOLVED  # type: ignore[arg-type]
            self.rollouts += 1

        def _on_step(self) -> bool:
            return not self.solved and self.rollouts <= extent.updates

    model = PeerPPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=NUM_ENVS, seed=seed, env_kwargs={"render_mode": None}),
        n_steps=ZOO_HORIZON,
        batch_size=ZOO_BATCH,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        ent_coef=0.0,
        learning_rate=lambda remaining: 1e-3 * remaining,
        clip_range=lambda remaining: 0.2 * remaining,
        seed=seed,
        device="cpu",
    )
    callback = StopWhenSolved()
    model.learn(ZOO_BUDGET, callback=callback)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "learning": seconds - callback.evaluating,
        "steps": (callback.rollouts - 1) * ZOO_BATCH,
        "solved": callback.solved,
    }
