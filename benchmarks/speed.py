"""Time our training loop beside stable-baselines3's, and fleets beside their clients trained one after another.

Two contestants take turns in one process, so that what else the machine does hits both, and a row's result is the ratio
of their median speeds. Every learner has 8 copies of its task, 128 steps between updates, 4 epochs of 4 minibatches, a
policy and a critic of 64x64 tanh units and one thread. The peer's environments are its make_vec_env's, but without
render_mode, with which LunarLander would be several times slower.

    python -m benchmarks.speed --rounds 5 --only CartPole-v1,fleet-64

prints a table and puts its rows into benchmarks/results/speed.json. On a busy machine the ratio of processor times is
the one to trust.
"""

import os

# Before torch and numpy load: one thread a process, since the matrices are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.learning import machine_kind
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

RESULTS = Path(__file__).parent / "results" / "speed.json"
NUM_ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
UPDATES = 8
"""Of one client in a measurement; fewer for each client of a fleet."""
SINGLES = 4
"""Clients trained one after another stand for all: their speed does not depend on how many follow."""

Learner = Callable[[int], int]
"""Trains for a number of updates and returns the environment steps of all its clients."""


@dataclass(frozen=True)
class Contest:
    """One row: two learners that do the same work."""

    name: str
    ours: Callable[[], Learner]
    theirs: Callable[[], Learner]
    against: str
    """Who the others are."""
    updates: int
    """Of each client of ours in a measurement."""
    least: float | None = None
    """The ratio that we hold ourselves to."""
    wanted: float | None = None


@dataclass(frozen=True)
class Speeds:
    """Environment steps a second, one entry a round."""

    wall: list[float]
    cpu: list[float]
    """Per second of this process's processor time."""


@dataclass(frozen=True)
class Row:
    """A contest's outcome."""

    name: str
    against: str
    ours: Speeds
    theirs: Speeds
    ratio: float
    """Of median speeds by the clock."""
    cpu_ratio: float
    """The same by processor time."""
    least: float | None
    wanted: float | None


TARGETS = {"CartPole-v1": (1.9, 3), "Acrobot-v1": (1.6, 2), "LunarLander-v3": (2.4, 3), "HalfCheetah-v5": (1.3, 1.8)}
"""Tasks on which one client of ours meets the peer."""
FAMILIES = ("CartPole-v1", "Acrobot-v1")
"""Tasks that we have a vectorised version of, which meets the peer's own environment."""
FLEETS: dict[int, tuple[float, ...]] = {8: (), 64: (4, 6), 256: ()}
"""Clients in a fleet, and its targets."""


def contests() -> list[Contest]:
    """All rows, in the order of the table."""
    peer, fleet = "stable-baselines3", "grpo_fed/CartPole-v1"
    alone = f"our clients one after another ({SINGLES} measured)"
    return [
        *(
            Contest(task, partial(our_fleet, task, 1), partial(peer_on, task), peer, UPDATES, *targets)
            for task, targets in TARGETS.items()
        ),
        *(
            Contest(
                f"grpo_fed/{task}", partial(our_fleet, f"grpo_fed/{task}", 1), partial(peer_on, task), peer, UPDATES
            )
            for task in FAMILIES
        ),
        *(
            Contest(f"fleet-{size}", partial(our_fleet, fleet, size), partial(singles, fleet), alone, updates, *targets)
            for size, targets in FLEETS.items()
            for updates in [max(1, UPDATES * 8 // size)]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--only", help="comma-separated rows; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(HEADER)
    for contest in chosen_contests(arguments.only):
        rows.append(hold(contest, arguments.rounds))
        print(line(rows[-1]), flush=True)
    write(rows, arguments.rounds, arguments.results)


def chosen_contests(names: str | None) -> list[Contest]:
    """The named rows in the table's order."""
    rows = contests()
    if names is None:
        return rows
    wanted, known = set(names.split(",")), {contest.name for contest in rows}
    if unknown := wanted - known:
        raise ValueError(f"--only: no row {sorted(unknown)}; there are {sorted(known)}")
    return [contest for contest in rows if contest.name in wanted]


def hold(contest: Contest, rounds: int) -> Row:
    """A warm-up of each, then turn by turn."""
    ours, theirs = contest.ours(), contest.theirs()
    ours(1)
    theirs(1)
    measured: list[tuple[tuple[float, float], tuple[float, float]]] = [
        (speed(ours, contest.updates), speed(theirs, UPDATES)) for _ in range(rounds)
    ]
    mine, peers = (Speeds([wall for wall, _ in each], [cpu for _, cpu in each]) for each in zip(*measured, strict=True))
    return Row(
        contest.name,
        contest.against,
        mine,
        peers,
        median(mine.wall) / median(peers.wall),
        median(mine.cpu) / median(peers.cpu),
        contest.least,
        contest.wanted,
    )


def speed(learner: Learner, updates: int) -> tuple[float, float]:
    """Steps a second, by the clock and by processor time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    steps = learner(updates)
    return steps / (time.perf_counter() - start), steps / (time.process_time() - cpu_start)


def our_fleet(task: str, clients: int) -> Learner:
    """A fleet of clients on the same task, with PPO's preset and the settings above."""
    scenario = Scenario.model_validate(
        {
            "name": "speed",
            "device": "cpu",
            "rollout": {"num_envs": NUM_ENVS, "horizon": HORIZON},
            "objective": {"preset": "ppo", "epochs": EPOCHS, "minibatches": MINIBATCHES},
            "clients": [{"name": "client", "env": task, "count": clients}],
        }
    )
    fleet = StackedLearner(resolve_tasks(scenario), scenario)

    def train(updates: int) -> int:
        return sum(report.steps for report in fleet.train(updates * NUM_ENVS * HORIZON))

    return train


def singles(task: str) -> Learner:
    """Fleets of one client each, trained one after another."""
    learners = [our_fleet(task, 1) for _ in range(SINGLES)]

    def train(updates: int) -> int:
        return sum(learner(updates) for learner in learners)

    return train


def peer_on(task: str) -> Learner:
    """stable-baselines3's PPO with the settings above; its other defaults are our preset's."""
    environments = make_vec_env(task, n_envs=NUM_ENVS, seed=0, env_kwargs={"render_mode": None})
    model = PPO(
        "MlpPolicy",
        environments,
        n_steps=HORIZON,
        batch_size=NUM_ENVS * HORIZON // MINIBATCHES,
        n_epochs=EPOCHS,
        seed=0,
        device="cpu",
    )

    def train(updates: int) -> int:
        before = model.num_timesteps
        model.learn(updates * NUM_ENVS * HORIZON, reset_num_timesteps=False)
        return model.num_timesteps - before

    return train


HEADER = (
    "| row | against | ours, steps/s | theirs | ratio | by processor time | at least | wanted |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    """A row of the table."""
    least, wanted = ("" if target is None else f"{target:g}" for target in (row.least, row.wanted))
    return (
        f"| {row.name} | {row.against} | {median(row.ours.wall):,.0f} | {median(row.theirs.wall):,.0f} "
        f"| {row.ratio:.2f} | {row.cpu_ratio:.2f} | {least} | {wanted} |"
    )


def write(rows: Sequence[Row], rounds: int, path: Path) -> None:
    """Rows measured now take the place of older ones; the others stay."""
    old = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: version(name) for name in ("grpo-fed", "stable-baselines3", "torch", "gymnasium", "numpy")}
    new = {row.name: {**asdict(row), "rounds": rounds, "machine": machine_kind(), "versions": versions} for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**old, **new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
