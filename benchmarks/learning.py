"""Train our clients with the peers' settings and budgets, and score the final policies in the same way.

Three suites: `tasks` has the rl-zoo's settings, as benchmarks/peers.py has them; `presets` every preset with its
defaults on CartPole; `groups` the critic-free presets with groups of episodes from one start state. The seeds of a case
are the clients of one learner, each with its own initial parameters and random streams, so that ten of them train as
one stacked computation and yet are independent runs. A finished learner appends a JSON line for each seed to
benchmarks/results/ours.jsonl, and a seed that has a line is skipped; delete lines to train seeds again:

    python -m benchmarks.learning --suite tasks --seeds 10 --workers 1
"""

import os

# Set before torch and numpy are loaded: one thread a process, since the matrices are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from grpo_fed.policy.base import Policy
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_tasks

RESULTS = Path(__file__).parent / "results" / "ours.jsonl"
SUITES = ("tasks", "presets", "groups")
EVALUATION_EPISODES = 50
EVALUATION_SEED = 10_000
"""The peers have the same seed, so both are evaluated from the same start states."""
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "Pendulum-v1": -200.0, "LunarLander-v3": 200.0}
"""The mean return at which a task counts as solved."""

Sections = Mapping[str, Mapping[str, Any]]
"""A scenario's tables."""


@dataclass(frozen=True)
class Case:
    """One comparison: what is trained with several seeds, and the peer's algorithms that it is compared with."""

    suite: str
    preset: str
    task: str
    """A gymnasium id."""
    budget: int
    """Environment steps asked for; rounded up to whole rounds."""
    sections: Sections = field(default_factory=dict)
    """Values that differ from the preset."""
    steps: int = 2048
    """Environment steps of a round: with the peers' settings one rollout, else the scenario's default."""
    peers: tuple[str, ...] = ()
    """Algorithms of the peer's runs on the same task with the same budget."""
    remark: str = ""
    """A difference that a reader of the comparison must know."""
    by_default: bool = True
    """Whether it runs when no cases are named."""

    @property
    def name(self) -> str:
        return f"{self.task}/{self.preset}"

    @property
    def title(self) -> str:
        return f"{self.task}, {self.preset}, {self.budget:,} steps"

    @property
    def rounds(self) -> int:
        return -(-self.budget // self.steps)


def make_zoo_case(
    preset: str, task: str, budget: int, num_envs: int, horizon: int, *, peers: tuple[str, ...] = ("PPO",), **more: Any
) -> Case:
    """Make a case with the rl-zoo's settings. A round is one rollout, as the peer's schedules need."""
    sections: dict[str, Any] = {"rollout": {"num_envs": num_envs, "horizon": horizon}}
    for section in ("policy", "normalise", "objective", "trust"):
        if section in more:
            sections[section] = more.pop(section)
    return Case("tasks", preset, task, budget, sections, num_envs * horizon, peers=peers, **more)


BOTH = {"observations": True, "rewards": True}
NO_PROMPTS = {"group": {"equal": "skip"}}
"""What `dapo` needs, whose other prompts no environment has."""
GROUPS = {"rollout": {"num_envs": 16}, "group": {"by": "start", "size": 4}}

# The first rows are those of benchmarks/peers.py with our names; we set the number of minibatches, not their size.
CASES = (
    make_zoo_case(
        "ppo",
        "CartPole-v1",
        100_000,
        8,
        32,
        objective={
            "minibatches": 1,
            "epochs": 20,
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "clip": 0.2,
            "clip_schedule": "linear",
        },
    ),
    make_zoo_case(
        "ppo",
        "Pendulum-v1",
        100_000,
        4,
        1024,
        peers=("PPO", "PPO without gSDE"),
        objective={"minibatches": 64, "epochs": 10, "gamma": 0.9, "gae_lambda": 0.95, "learning_rate": 1e-3},
        remark="the rl-zoo explores with gSDE, we with a plain Gaussian, as the peer without gSDE does",
    ),
    make_zoo_case(
        "ppo",
        "Acrobot-v1",
        300_000,
        16,
        256,
        normalise=BOTH,
        objective={"minibatches": 64, "epochs": 4, "gamma": 0.99, "gae_lambda": 0.94},
    ),
    make_zoo_case(
        "a2c", "CartPole-v1", 100_000, 8, 5, peers=("A2C",), remark="the peer's optimiser is RMSprop, ours is Adam"
    ),
    make_zoo_case(
        "trpo",
        "CartPole-v1",
        100_000,
        2,
        512,
        peers=("TRPO",),
        objective={"minibatches": 2, "value_epochs": 20, "gae_lambda": 0.98, "learning_rate": 1e-3},
        trust={"cg_damping": 1e-3},
    ),
    make_zoo_case(
        "a2c", "CartPole-v1", 500_000, 8, 5, peers=("A2C",), remark="the peer's optimiser is RMSprop, ours is Adam"
    ),
    make_zoo_case(
        "ppo",
        "LunarLander-v3",
        1_000_000,
        16,
        1024,
        objective={"minibatches": 256, "epochs": 4, "gamma": 0.999, "gae_lambda": 0.98, "entropy": 0.01},
    ),
    make_zoo_case(
        "ppo",
        "HalfCheetah-v5",
        1_000_000,
        1,
        512,
        by_default=False,
        policy={"hidden": [256, 256], "activation": "relu", "log_std": -2.0, "orthogonal": False},
        normalise=BOTH,
        objective={
            "minibatches": 8,
            "epochs": 20,
            "gamma": 0.98,
            "gae_lambda": 0.92,
            "learning_rate": 2.0633e-05,
            "entropy": 0.000401762,
            "clip": 0.1,
            "max_grad_norm": 0.8,
            "value_coefficient": 0.58096,
        },
    ),
    *(
        Case("presets", preset, "CartPole-v1", 100_000, NO_PROMPTS if preset == "dapo" else {}, peers=peers)
        for preset, peers in {**dict.fromkeys(PRESETS, ()), "a2c": ("A2C",), "trpo": ("TRPO",)}.items()
    ),
    *(
        Case("groups", preset, task, 100_000, GROUPS)
        for task in ("CartPole-v1", "grpo_fed/PointMass-v0")
        for preset in ("grpo", "dr-grpo", "rloo")
    ),
    # With a critic, to measure what is lost without one.
    Case("groups", "ppo", "grpo_fed/PointMass-v0", 100_000),
)


@dataclass(frozen=True)
class Run:
    """One finished training run: a line of the results file."""

    suite: str
    name: str
    task: str
    preset: str
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
    """Wall time of training its learner, divided by the learner's seeds."""
    cpu_seconds: float
    """Processor time of the same, which depends less on other work on the machine."""
    together: int
    """Number of seeds in the learner."""
    machine: str
    versions: dict[str, str]
    """Versions of the packages that a score or a time depends on."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.suite, self.name, self.budget, self.seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be repeated; default: all three")
    parser.add_argument("--only", help="comma-separated names such as CartPole-v1/ppo; default: all but HalfCheetah-v5")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, counted from 0")
    parser.add_argument("--together", type=int, default=10, help="largest number of seeds in one learner")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, with one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    done = {run.key for run in read_runs(arguments.results)}
    pending = []
    for case in choose_cases(arguments.suite or SUITES, arguments.only):
        seeds = [seed for seed in range(arguments.seeds) if (case.suite, case.name, case.budget, seed) not in done]
        pending += [(case, seeds[i : i + arguments.together]) for i in range(0, len(seeds), arguments.together)]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, so that a worker sets the number of its threads before any thread starts.
    workers = ProcessPoolExecutor(
        arguments.workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with workers:
        for future in as_completed([workers.submit(train_and_record, *each, arguments.results) for each in pending]):
            for run in future.result():
                print(
                    f"{run.suite} {run.name} seed {run.seed}: {run.steps} steps, {run.seconds} s, "
                    f"deterministic {run.score_deterministic:.1f}, sampled {run.score_sampled:.1f}",
                    flush=True,
                )


def choose_cases(suites: Iterable[str], names: str | None) -> list[Case]:
    """Choose the suites' cases with these names, in the table's order; without names, those that run by default."""
    rows = [case for case in CASES if case.suite in set(suites)]
    if names is None:
        return [case for case in rows if case.by_default]
    wanted, known_names = set(names.split(",")), {case.name for case in rows}
    if unknown := wanted - known_names:
        raise ValueError(f"--only: no case {sorted(unknown)}; there are {sorted(known_names)}")
    return [case for case in rows if case.name in wanted]


def read_runs(results: Path) -> list[Run]:
    """Read all runs of a results file."""
    if not results.exists():
        return []
    return [Run(**json.loads(line)) for line in results.read_text().splitlines()]


def train_and_record(case: Case, seeds: Sequence[int], results: Path) -> list[Run]:
    """Train and append the lines. The worker writes them, so that a failing learner loses no other learner's lines."""
    runs = train_and_score(case, seeds)
    with results.open("a") as file:
        file.writelines(json.dumps(asdict(run)) + "\n" for run in runs)
    return runs


def train_and_score(case: Case, seeds: Sequence[int]) -> list[Run]:
    """Train some seeds and score them. A seed's run does not depend on the other seeds."""
    scenario = make_scenario(case, len(seeds))
    learner = StackedLearner(resolve_tasks(scenario), scenario, seeds)
    start, cpu_start = time.perf_counter(), time.process_time()
    for number in range(scenario.rounds):
        learner.train(scenario.steps, number / scenario.rounds, (number + 1) / scenario.rounds)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    learner.close()
    return [
        Run(
            suite=case.suite,
            name=case.name,
            task=case.task,
            preset=case.preset,
            budget=case.budget,
            seed=seed,
            steps=int(learner.steps_done[client]),
            score_deterministic=score_policy(learner, client, deterministic=True),
            score_sampled=score_policy(learner, client, deterministic=False),
            seconds=round(seconds / len(seeds), 2),
            cpu_seconds=round(cpu_seconds / len(seeds), 2),
            together=len(seeds),
            machine=describe_machine(),
            versions=installed_versions(),
        )
        for client, seed in enumerate(seeds)
    ]


def make_scenario(case: Case, clients: int) -> Scenario:
    """Make the scenario of a case with `clients` clients, each with its own initial parameters."""
    sections = {name: dict(values) for name, values in case.sections.items()}
    sections["policy"] = {**sections.get("policy", {}), "same_start": False}
    sections["objective"] = {**sections.get("objective", {}), "preset": case.preset}
    return Scenario.model_validate(
        {
            "name": "benchmark",
            "rounds": case.rounds,
            "steps": case.steps,
            "device": "cpu",
            "clients": [{"name": "seed", "env": case.task, "count": clients}],
            **sections,
        }
    )


def score_policy(learner: StackedLearner, client: int, deterministic: bool) -> float:
    """Compute the mean return of the evaluation episodes in plain gymnasium environments, stepped as the peers' are."""
    task, policy, normaliser = learner.tasks[client], learner.policy, learner.observation_normaliser
    actor = Actor(policy, learner.parameters[client : client + 1])
    rng = generator(EVALUATION_SEED, Purpose.EVALUATION)
    environments = [gymnasium.make(task.env, **task.kwargs) for _ in range(EVALUATION_EPISODES)]
    observations = np.stack(
        [environment.reset(seed=EVALUATION_SEED + i)[0] for i, environment in enumerate(environments)]
    )
    returns = np.zeros(EVALUATION_EPISODES)
    running = np.ones(EVALUATION_EPISODES, dtype=bool)
    while running.any():
        raw = observations.astype(np.float32)
        seen = raw if normaliser is None else normaliser.apply_one(client, raw)
        actions = choose_actions(policy, task, actor(seen[None]), None if deterministic else rng)
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = environments[i].step(actions[i])
            returns[i] += reward
            running[i] = not (terminated or truncated)
    for environment in environments:
        environment.close()
    return float(returns.mean())


def choose_actions(
    policy: Policy, task: GymTask, distributions: np.ndarray, rng: np.random.Generator | None
) -> np.ndarray:
    """Choose actions as gymnasium takes them from distribution parameters [1, E, M]; the mode without a generator."""
    distribution = policy.distribution
    if rng is None:
        actions = distribution.mode(distributions)[0]
    else:
        actions = distribution.sample(distributions, distribution.draw_noise(rng, distributions.shape[:2]))[0]
    if task.action.kind == "categorical":
        return actions[:, 0].astype(int)
    return np.clip(actions, task.action.low, task.action.high).astype(np.float32)


def describe_machine() -> str:
    return f"{os.cpu_count()}-core CPU, {platform.machine()}"


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in ("grpo-fed", "torch", "gymnasium", "numpy")}


if __name__ == "__main__":
    main()
