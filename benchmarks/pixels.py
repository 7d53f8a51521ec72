"""Train networks for pictures and networks with a memory beside stable-baselines3's, with equal budgets and seeds.

Pictures: `grpo_fed/Catch-v0`, our `policy.kind = "cnn"` beside PPO with `CnnPolicy`. Both have the Nature encoder, one
layer of 64 units behind it for actor and critic, PPO's same hyperparameters, and the same vector environment of 16
copies, 24,576 steps. Memory: `grpo_fed/CartPole-v1` without velocities, our `policy.memory = "gru"` beside the LSTMs of
sb3-contrib's RecurrentPPO; both with 64 units and one hidden layer of 64 for actor and critic each.

    python -m benchmarks.pixels

Every run is a process of its own with one thread, contestants taking turns, and appends a JSON line to
benchmarks/results/pixels.jsonl; a run that has a line is skipped. A score is the mean return of 100 episodes under the
final policy, with its likeliest actions. The seeds, 1400 to 1404, were fixed beforehand.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.learning import describe_machine
from grpo_fed.rl.make import make_learner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.resolve import resolve_tasks

FILE = RESULTS / "pixels.jsonl"
SEEDS = range(1400, 1405)
EPISODES = 100
PARTS = ("pictures", "memory")
CONTESTANTS = ("grpo_fed", "stable-baselines3")

COPIES = {"pictures": 16, "memory": 8}
HORIZON = {"pictures": 64, "memory": 128}
STEPS = {"pictures": 24_576, "memory": 24_576}
MINIBATCHES = {"pictures": 8, "memory": 4}
EPOCHS = {"pictures": 4, "memory": 10}
RATE = {"pictures": 1e-3, "memory": 1e-3}
GAMMA, LAMBDA = {"pictures": 0.95, "memory": 0.98}, {"pictures": 0.9, "memory": 0.9}
ENTROPY = {"pictures": 0.01, "memory": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "pictures": ("grpo_fed/Catch-v0", {}),
    "memory": ("grpo_fed/CartPole-v1", {"hide_velocities": True}),
}
POLICIES = {
    "pictures": 'kind = "cnn"\nhidden = [64]\nactivation = "relu"\ntorso = "shared"',
    "memory": 'memory = "gru"\nunits = 64\nhidden = [64]',
}


@dataclass(frozen=True)
class PixelRun:
    """One finished run: a line of the results file."""

    part: str
    contestant: str
    seed: int
    steps: int
    score: float
    """Mean return of the evaluation."""
    cpu_seconds: float
    """Processor time of the training alone."""
    parameters: int
    machine: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--one", nargs=3, metavar=("PART", "CONTESTANT", "SEED"), help="make one run in this process")
    arguments = parser.parse_args()
    if arguments.one:
        part, contestant, seed = arguments.one
        run = make_run(part, contestant, int(seed))
        with arguments.results.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(f"{part} {contestant} {seed}: {run.score:.2f}, {run.cpu_seconds:.1f} s", flush=True)
        return
    done = {(run.part, run.contestant, run.seed) for run in read_runs(arguments.results)}
    for part in arguments.parts.split(","):
        for seed in SEEDS:
            for contestant in CONTESTANTS:
                if (part, contestant, seed) not in done:
                    command = [sys.executable, "-m", "benchmarks.pixels", "--results", str(arguments.results)]
                    subprocess.run([*command, "--one", part, contestant, str(seed)], check=True)
    print("\n".join(format_table(read_runs(arguments.results))))


def make_run(part: str, contestant: str, seed: int) -> PixelRun:
    """Train one contestant, and score its final policy."""
    torch.set_num_threads(1)
    score, seconds, parameters = (_train_ours if contestant == "grpo_fed" else _train_peer)(part, seed)
    return PixelRun(
        part, contestant, seed, STEPS[part], round(score, 3), round(seconds, 2), parameters, describe_machine()
    )


def scenario_of(part: str, seed: int) -> Scenario:
    """Make the scenario of our contestant."""
    env, kwargs = FAMILIES[part]
    client = {"name": "learner", "env": env, "kwargs": kwargs}
    text = f'name = "pixels"\nsteps = {STEPS[part]}\nseed = {seed}\ndevice = "cpu"\n[policy]\n{POLICIES[part]}\n'
    objective = {
        "gamma": GAMMA[part],
        "gae_lambda": LAMBDA[part],
        "learning_rate": RATE[part],
        "epochs": EPOCHS[part],
        "minibatches": MINIBATCHES[part],
        "entropy": ENTROPY[part],
    }
    text += "[objective]\n" + "".join(f"{key} = {value}\n" for key, value in objective.items())
    text += f"[rollout]\nnum_envs = {COPIES[part]}\nhorizon = {HORIZON[part]}\n[[clients]]\n"
    text += f'name = "{client["name"]}"\nenv = "{env}"\n'
    text += "".join(f"kwargs.{key} = {str(value).lower()}\n" for key, value in kwargs.items())
    return Scenario.loads(text)


def _train_ours(part: str, seed: int) -> tuple[float, float, int]:
    """Return the score, the processor time and the number of parameters of our contestant."""
    scenario = scenario_of(part, seed)
    learner = make_learner(resolve_tasks(scenario), scenario)
    start = time.process_time()
    learner.train(STEPS[part])
    seconds = time.process_time() - start
    (evaluation,) = learner.evaluate(EPISODES)
    learner.close()
    return evaluation.score, seconds, learner.policy.layout.size


def _train_peer(part: str, seed: int) -> tuple[float, float, int]:
    """Return the same of stable-baselines3."""
    env = FamilyVecEnv(part, COPIES[part], seed)
    common: dict[str, Any] = {
        "n_steps": HORIZON[part],
        "batch_size": COPIES[part] * HORIZON[part] // MINIBATCHES[part],
        "n_epochs": EPOCHS[part],
        "learning_rate": RATE[part],
        "gamma": GAMMA[part],
        "gae_lambda": LAMBDA[part],
        "ent_coef": ENTROPY[part],
        "seed": seed,
        "device": "cpu",
    }
    if part == "pictures":
        model: Any = PPO("CnnPolicy", env, policy_kwargs={"features_extractor_kwargs": {"features_dim": 64}}, **common)
    else:
        layers = {"net_arch": {"pi": [64], "vf": [64]}, "lstm_hidden_size": 64}
        model = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=layers, **common)
    start = time.process_time()
    model.learn(STEPS[part])
    seconds = time.process_time() - start
    return _score_peer(model, part, seed), seconds, sum(value.numel() for value in model.policy.parameters())


def _score_peer(model: Any, part: str, seed: int) -> float:
    """Play one episode in each of 100 copies with the likeliest actions, and return the mean return."""
    family, kwargs = FAMILIES[part]
    env = FamilyVectorEnv(family, EPISODES, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
    observations, _ = env.reset(seed=10_000 * seed)
    returns, running, state = np.zeros(EPISODES), np.ones(EPISODES, bool), None
    starts = np.ones(EPISODES, bool)
    while running.any():
        actions, state = model.predict(observations, state=state, episode_start=starts, deterministic=True)
        observations, rewards, terminated, truncated, _ = env.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
        starts = np.zeros(EPISODES, bool)
    return float(returns.mean())


class FamilyVecEnv(VecEnv):
    """Our vector environment in the peer's form, so that both step the same one."""

    def __init__(self, part: str, copies: int, seed: int) -> None:
        family, kwargs = FAMILIES[part]
        self.env = FamilyVectorEnv(family, copies, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
        super().__init__(copies, self.env.single_observation_space, self.env.single_action_space)
        self.first_seed = 1_000 * seed
        self.actions = np.zeros(0)

    def reset(self) -> np.ndarray:
        return self.env.reset(seed=self.first_seed)[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, infos = self.env.step(self.actions)
        done = terminated | truncated
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for copy in np.flatnonzero(done).tolist():
            rows[copy] = {
                "terminal_observation": infos["final_obs"][copy],
                "TimeLimit.truncated": bool(truncated[copy] and not terminated[copy]),
            }
        return observations, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("copies have no attributes of their own")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("copies have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def read_runs(path: Path = FILE) -> list[PixelRun]:
    """Read all runs of a results file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [PixelRun(**json.loads(line)) for line in lines]


def format_table(runs: Sequence[PixelRun]) -> Iterator[str]:
    """Write a row for each contestant, and the ratio of processor times, seed by seed."""
    if not runs:
        return
    yield "| part | contestant | parameters | return, mean over seeds | lowest to highest | CPU s | times ours |"
    yield "| --- | --- | ---: | ---: | --- | ---: | --- |"
    for part in PARTS:
        ours = {run.seed: run for run in runs if run.part == part and run.contestant == CONTESTANTS[0]}
        for contestant in CONTESTANTS:
            own = {run.seed: run for run in runs if run.part == part and run.contestant == contestant}
            if not own:
                continue
            scores, seconds = [run.score for run in own.values()], [run.cpu_seconds for run in own.values()]
            ratios = [run.cpu_seconds / ours[seed].cpu_seconds for seed, run in own.items() if seed in ours]
            ratio = "" if contestant == CONTESTANTS[0] else f"{np.median(ratios):.2f} ({min(ratios):.2f} to"
            ratio += f" {max(ratios):.2f})" if ratio else ""
            cells = [part, contestant, f"{next(iter(own.values())).parameters:,}", f"{np.mean(scores):.2f}"]
            cells += [f"{min(scores):.2f} to {max(scores):.2f}", f"{np.median(seconds):.1f}", ratio]
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
