"""Measure what random actions reach in the tasks whose returns are normalised, and our scripted policies where a task
has no threshold of its own.

    python -m benchmarks.random_returns

The table is `KNOWN` in grpo_fed/tasks/scores.py. Episode k of 200 is reset with the seed k, and the actions are uniform
draws of the action space, seeded by k too. In Pendulum a scripted policy adds energy until the pole swings up, and then
holds it by a linear law; in PointMass one pushes towards the goal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np

import grpo_fed.tasks.families  # noqa: F401, registers our tasks
from grpo_fed.tasks.scores import KNOWN

EPISODES = 200
Policy = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=EPISODES)
    episodes = parser.parse_args().episodes
    print("| task | random | standard error | reference | of |\n| --- | ---: | ---: | ---: | --- |")
    for env in KNOWN:
        returns = np.array(list(play_randomly(env, episodes)))
        threshold = gymnasium.spec(env).reward_threshold
        source = "the threshold of the task" if threshold is not None else "a scripted policy"
        reference = threshold if threshold is not None else play_scripted(env, episodes).mean()
        error = returns.std(ddof=1) / len(returns) ** 0.5
        print(f"| {env} | {returns.mean():.2f} | {error:.2f} | {reference:.2f} | {source} |", flush=True)


def play_randomly(env: str, episodes: int) -> Iterator[float]:
    """Yield the returns of episodes with uniform actions."""
    made = gymnasium.make(env)
    for seed in range(episodes):
        made.reset(seed=seed)
        made.action_space.seed(seed)
        yield _play(made, lambda _: made.action_space.sample(), np.zeros(0))
    made.close()


def play_scripted(env: str, episodes: int) -> np.ndarray:
    """Return the returns of episodes with our scripted policy."""
    made = gymnasium.make(env)
    returns = [_play(made, SCRIPTED[env], made.reset(seed=seed)[0]) for seed in range(episodes)]
    made.close()
    return np.array(returns)


def _play(env: gymnasium.Env, policy: Policy, seen: np.ndarray) -> float:
    total, done = 0.0, False
    while not done:
        seen, reward, terminated, truncated, _ = env.step(policy(seen))
        total, done = total + float(reward), terminated or truncated
    return total


def swing_up(seen: np.ndarray) -> np.ndarray:
    """Balance the pendulum near the top; elsewhere bring its energy to that of rest at the top, theta_dot^2 / 6 + 5."""
    cosine, sine, speed = map(float, seen)
    if cosine > 0.85:
        return np.array([-12.0 * np.arctan2(sine, cosine) - 3.0 * speed], np.float32).clip(-2, 2)
    energy = speed**2 / 6 + 5 * cosine
    return np.array([np.sign(speed or 1.0) * (5.0 - energy) * 4], np.float32).clip(-2, 2)


def push_to_goal(seen: np.ndarray) -> np.ndarray:
    """Push with all force towards the default goal, (0.5, 0.5), and against the part of the velocity across it."""
    way = np.array([0.5, 0.5]) - seen[:2]
    direction = way / max(float(np.linalg.norm(way)), 1e-6)
    across = seen[2:4] - direction * float(seen[2:4] @ direction)
    push = direction - 2 * across
    return np.asarray((push / np.abs(push).max()), np.float32)


SCRIPTED: dict[str, Policy] = {
    "Pendulum-v1": swing_up,
    "grpo_fed/Pendulum-v1": swing_up,
    "grpo_fed/PointMass-v0": push_to_goal,
}

if __name__ == "__main__":
    main()
