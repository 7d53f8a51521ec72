"""Train stable-baselines3 with the rl-zoo's tuned settings, and score the final policies.

Every finished run appends a JSON line to benchmarks/results/peers.jsonl, and a run that has a line is skipped, so the
command may be interrupted and repeated:

    python -m benchmarks.peers --tasks CartPole-v1,Acrobot-v1 --seeds 10 --workers 1

A score is the mean undiscounted return of 50 episodes with fixed seeds, under the final policy, with frozen
observation statistics and raw rewards.
"""

import os

# Set before torch and numpy are loaded: one thread a process, since the matrices are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

PEER = "stable-baselines3"
ALGORITHMS = {"PPO": PPO, "PPO without gSDE": PPO, "A2C": A2C, "TRPO": TRPO}
EVALUATION_EPISODES = 50
EVALUATION_SEED = 10_000

Key = tuple[str, str, str, int]
"""The peer, algorithm, task and budget; with a seed, they identify a run."""


@dataclass(frozen=True)
class Setting:
    """One row of the rl-zoo: the peer's settings for one task."""

    algorithm: str
    """A key of ALGORITHMS."""
    task: str
    """A gymnasium id."""
    budget: int
    """Environment steps asked for; the peer rounds it up to whole rollouts."""
    num_envs: int
    hyperparameters: dict[str, Any]
    """Keyword arguments of the peer's constructor; the others keep the peer's defaults, as in the zoo."""
    normalize: bool = False
    """Whether VecNormalize normalises observations and rewards with this gamma: the zoo's `normalize: true`."""
    by_default: bool = True
    """Whether it runs when no tasks are named."""

    @property
    def key(self) -> Key:
        return PEER, self.algorithm, self.task, self.budget


@dataclass(frozen=True)
class Linear:
    """The zoo's `lin_` schedule: from `initial` to 0 as the remaining share of training goes from 1 to 0."""

    initial: float

    def __call__(self, remaining: float) -> float:
        return remaining * self.initial


# DLR-RM/rl-baselines3-zoo, hyperparams/ppo.yml, a2c.yml and trpo.yml. The order is the order of the runs.
SETTINGS = (
    Setting(
        "PPO",
        "CartPole-v1",
        budget=100_000,
        num_envs=8,
        hyperparameters={
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "ent_coef": 0.0,
            "learning_rate": Linear(0.001),
            "clip_range": Linear(0.2),
        },
    ),
    Setting(
        "PPO",
        "Pendulum-v1",
        budget=100_000,
        num_envs=4,
        hyperparameters={
            "n_steps": 1024,
            "gae_lambda": 0.95,
            "gamma": 0.9,
            "n_epochs": 10,
            "ent_coef": 0.0,
            "learning_rate": 1e-3,
            "clip_range": 0.2,
            "use_sde": True,
            "sde_sample_freq": 4,
        },
    ),
    # Not in the zoo: shows the effect of gSDE, which we do not have.
    Setting(
        "PPO without gSDE",
        "Pendulum-v1",
        budget=100_000,
        num_envs=4,
        hyperparameters={
            "n_steps": 1024,
            "gae_lambda": 0.95,
            "gamma": 0.9,
            "n_epochs": 10,
            "ent_coef": 0.0,
            "learning_rate": 1e-3,
            "clip_range": 0.2,
        },
    ),
    Setting(
        "PPO",
        "Acrobot-v1",
        budget=300_000,  # The zoo's is 1,000,000: cut to save time, for the peer and for us.
        num_envs=16,
        normalize=True,
        hyperparameters={"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4, "ent_coef": 0.0},
    ),
    # A2C with PPO's budget here and with the zoo's below: its learning rate is constant, so nothing else changes.
    Setting("A2C", "CartPole-v1", budget=100_000, num_envs=8, hyperparameters={"ent_coef": 0.0}),
    Setting(
        "TRPO",
        "CartPole-v1",
        budget=100_000,
        num_envs=2,
        hyperparameters={
            "n_steps": 512,
            "batch_size": 512,
            "cg_damping": 1e-3,
            "gae_lambda": 0.98,
            "gamma": 0.99,
            "learning_rate": 1e-3,
            "n_critic_updates": 20,
        },
    ),
    Setting("A2C", "CartPole-v1", budget=500_000, num_envs=8, hyperparameters={"ent_coef": 0.0}),
    Setting(
        "PPO",
        "LunarLander-v3",
        budget=1_000_000,
        num_envs=16,
        hyperparameters={
            "n_steps": 1024,
            "batch_size": 64,
            "gae_lambda": 0.98,
            "gamma": 0.999,
            "n_epochs": 4,
            "ent_coef": 0.01,
        },
    ),
    Setting(
        "PPO",
        "HalfCheetah-v5",  # The zoo's row is HalfCheetah-v4's.
        budget=1_000_000,
        num_envs=1,
        normalize=True,
        by_default=False,
        hyperparameters={
            "batch_size": 64,
            "n_steps": 512,
            "gamma": 0.98,
            "learning_rate": 2.0633e-05,
            "ent_coef": 0.000401762,
            "clip_range": 0.1,
            "n_epochs": 20,
            "gae_lambda": 0.92,
            "max_grad_norm": 0.8,
            "vf_coef": 0.58096,
            "policy_kwargs": {
                "log_std_init": -2,
                "ortho_init": False,
                "activation_fn": torch.nn.ReLU,
                "net_arch": {"pi": [256, 256], "vf": [256, 256]},
            },
        },
    ),
)


@dataclass(frozen=True)
class Run:
    """One finished training run: a line of the results file."""

    peer: str
    algorithm: str
    task: str
    budget: int
    """Environment steps asked for."""
    seed: int
    steps: int
    """Environment steps taken."""
    score_deterministic: float
    """Mean return with each action the distribution's mode."""
    score_sampled: float
    """Mean return with actions sampled as in training."""
    seconds: float
    """Wall time of training, without making the environments and without evaluation."""
    cpu_seconds: float
    """Processor time of the same, which depends less on other work on the machine."""
    versions: dict[str, str]
    """Versions of the packages that a score or a time depends on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", help="comma-separated gymnasium ids; default: all but HalfCheetah-v5")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, counted from 0")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, with one thread each")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "peers.jsonl")
    arguments = parser.parse_args()
    chosen = choose_settings(arguments.tasks)
    done = read_finished_runs(arguments.results)
    pending = [
        (setting, seed) for setting in chosen for seed in range(arguments.seeds) if (setting.key, seed) not in done
    ]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, so that a worker sets the number of its threads before any thread starts.
    workers = ProcessPoolExecutor(
        arguments.workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with workers:
        for future in as_completed([workers.submit(train_and_record, *run, arguments.results) for run in pending]):
            run = future.result()
            print(
                f"{run.algorithm} {run.task} seed {run.seed}: {run.steps} steps, {run.seconds} s, "
                f"deterministic {run.score_deterministic:.1f}, sampled {run.score_sampled:.1f}",
                flush=True,
            )


def choose_settings(tasks: str | None) -> list[Setting]:
    """Choose the rows of the named tasks, in the table's order; without names, those that run by default."""
    if tasks is None:
        return [setting for setting in SETTINGS if setting.by_default]
    names, known = set(tasks.split(",")), {setting.task for setting in SETTINGS}
    if unknown := names - known:
        raise ValueError(f"--tasks: no settings for {sorted(unknown)}; there are some for {sorted(known)}")
    return [setting for setting in SETTINGS if setting.task in names]


def read_finished_runs(results: Path) -> set[tuple[Key, int]]:
    """Read the key and the seed of every run that has a line."""
    if not results.exists():
        return set()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {((line["peer"], line["algorithm"], line["task"], line["budget"]), line["seed"]) for line in lines}


def train_and_record(setting: Setting, seed: int, results: Path) -> Run:
    """Train and append the line. The worker writes it, so that a failing run loses no other run's line."""
    run = train_and_score(setting, seed)
    with results.open("a") as file:
        file.write(json.dumps(asdict(run)) + "\n")
    return run


def train_and_score(setting: Setting, seed: int) -> Run:
    """Make one run and score it; the same seed gives the same scores."""
    environments = make_training_environments(setting, seed)
    model = ALGORITHMS[setting.algorithm]("MlpPolicy", environments, seed=seed, device="cpu", **setting.hyperparameters)
    start, cpu_start = time.perf_counter(), time.process_time()
    model.learn(setting.budget)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    run = Run(
        peer=PEER,
        algorithm=setting.algorithm,
        task=setting.task,
        budget=setting.budget,
        seed=seed,
        steps=model.num_timesteps,
        score_deterministic=score_policy(model, setting.task, deterministic=True),
        score_sampled=score_policy(model, setting.task, deterministic=False),
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu_seconds, 2),
        versions=installed_versions(),
    )
    environments.close()
    return run


def make_training_environments(setting: Setting, seed: int) -> VecEnv:
    """Make environments as the zoo does, but with render_mode None instead of rgb_array, which would cost time."""
    environments = make_vec_env(setting.task, n_envs=setting.num_envs, seed=seed, env_kwargs={"render_mode": None})
    if not setting.normalize:
        return environments
    return VecNormalize(environments, gamma=setting.hyperparameters["gamma"])


def score_policy(model: OnPolicyAlgorithm, task: str, deterministic: bool) -> float:
    """Compute the mean return of the evaluation episodes, stepped together so that the policy sees one batch."""
    set_random_seed(EVALUATION_SEED)
    normalizer = model.get_vec_normalize_env()
    environments = [gymnasium.make(task) for _ in range(EVALUATION_EPISODES)]
    observations = np.stack(
        [environment.reset(seed=EVALUATION_SEED + i)[0] for i, environment in enumerate(environments)]
    )
    returns = np.zeros(EVALUATION_EPISODES)
    running = np.ones(EVALUATION_EPISODES, dtype=bool)
    step = 0
    while running.any():
        if model.use_sde and step % model.sde_sample_freq == 0:
            model.policy.reset_noise(EVALUATION_EPISODES)
        seen = observations if normalizer is None else normalizer.normalize_obs(observations)
        actions, _ = model.predict(seen, deterministic=deterministic)
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = environments[i].step(actions[i])
            returns[i] += reward
            running[i] = not (terminated or truncated)
        step += 1
    for environment in environments:
        environment.close()
    return float(returns.mean())


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "numpy")}


if __name__ == "__main__":
    main()
