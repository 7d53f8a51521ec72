"""Time our training loop beside stable-baselines3's, and stacked clients beside clients trained one by one.

Two contestants take turns in one process, so that other work on the machine slows down both alike, and the result of a
row is the ratio of their median speeds. Every learner has 8 copies of its task, 128 steps between updates, 4 epochs of
4 minibatches, a policy and a critic of 64x64 tanh units and one thread. The peer's environments are those of its
make_vec_env, but without render_mode, which would make LunarLander several times slower.

    python -m benchmarks.speed --rounds 5 --only CartPole-v1,stack-64

prints a table and puts its rows into benchmarks/results/speed.json. On a busy machine, the ratio of processor times
is the reliable one.
"""

import os

# Set before torch and numpy are loaded: one thread a process, since the matrices are small.
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

from benchmarks.learning import describe_machine
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

RESULTS = Path(__file__).parent / "results" / "speed.json"
NUM_ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
UPDATES = 8
"""Updates of one client in a measurement; fewer for each client of a stack."""
SINGLE_LEARNERS = 4
"""Number of clients trained one after another; their speed does not depend on how many there are."""

Trainer = Callable[[int], int]
"""Trains for a number of updates and returns the environment steps of all its clients."""


@dataclass(frozen=True)
class Contest:
    """One row: two contestants that do the same work."""

    name: str
    ours: Callable[[], Trainer]
    theirs: Callable[[], Trainer]
    against: str
    """Description of the other contestant."""
    updates: int
    """Updates of each of our clients in a measurement."""
    least: float | None = None
    """The ratio that must be reached."""
    wanted: float | None = None


@dataclass(frozen=True)
class Speeds:
    """Environment steps per second, with an entry for each round."""

    wall: list[float]
    cpu: list[float]
    """Steps per second of this process's processor time."""


@dataclass(frozen=True)
class Row:
    """The result of a contest."""

    name: str
    against: str
    ours: Speeds
    theirs: Speeds
    ratio: float
    """Ratio of the median speeds by the clock."""
    cpu_ratio: float
    """The same by processor time."""
    least: float | None
    wanted: float | None


TARGETS = {"CartPole-v1": (1.9, 3), "Acrobot-v1": (1.6, 2), "LunarLander-v3": (2.4, 3), "HalfCheetah-v5": (1.3, 1.8)}
"""Tasks on which one of our clients is compared with the peer, and the ratios that must be reached and are wanted."""
FAMILIES = ("CartPole-v1", "Acrobot-v1")
"""Tasks of which our vectorised version is compared with the peer's environment."""
STACKS: dict[int, tuple[float, ...]] = {8: (), 64: (4, 6), 256: ()}
"""Numbers of stacked clients, and the targets of each."""


def list_contests() -> list[Contest]:
    """List all rows in the order of the table."""
    peer, cartpole = "stable-baselines3", "grpo_fed/CartPole-v1"
    in_turn = f"our clients one after another ({SINGLE_LEARNERS} measured)"
    return [
        *(
            Contest(task, partial(make_our_learner, task, 1), partial(make_peer, task), peer, UPDATES, *targets)
            for task, targets in TARGETS.items()
        ),
        *(
            Contest(
                f"grpo_fed/{task}",
                partial(make_our_learner, f"grpo_fed/{task}", 1),
                partial(make_peer, task),
                peer,
                UPDATES,
            )
            for task in FAMILIES
        ),
        *(
            Contest(
                f"stack-{size}",
                partial(make_our_learner, cartpole, size),
                partial(make_single_learners, cartpole),
                in_turn,
                updates,
                *targets,
            )
            for size, targets in STACKS.items()
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
    for contest in choose_contests(arguments.only):
        rows.append(run_contest(contest, arguments.rounds))
        print(format_row(rows[-1]), flush=True)
    write_rows(rows, arguments.rounds, arguments.results)


def choose_contests(names: str | None) -> list[Contest]:
    """Choose the named rows, in the table's order."""
    rows = list_contests()
    if names is None:
        return rows
    wanted, known = set(names.split(",")), {contest.name for contest in rows}
    if unknown := wanted - known:
        raise ValueError(f"--only: no row {sorted(unknown)}; there are {sorted(known)}")
    return [contest for contest in rows if contest.name in wanted]


def run_contest(contest: Contest, rounds: int) -> Row:
    """Warm up both contestants, then measure them in turns."""
    ours, theirs = contest.ours(), contest.theirs()
    ours(1)
    theirs(1)
    measured: list[tuple[tuple[float, float], tuple[float, float]]] = [
        (measure_speed(ours, contest.updates), measure_speed(theirs, UPDATES)) for _ in range(rounds)
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


def measure_speed(learner: Trainer, updates: int) -> tuple[float, float]:
    """Measure steps per second by the clock and by processor time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    steps = learner(updates)
    return steps / (time.perf_counter() - start), steps / (time.process_time() - cpu_start)


def make_our_learner(task: str, clients: int) -> Trainer:
    """Make stacked clients on the same task, with PPO's preset and the settings above."""
    scenario = Scenario.model_validate(
        {
            "name": "speed",
            "device": "cpu",
            "rollout": {"num_envs": NUM_ENVS, "horizon": HORIZON},
            "objective": {"preset": "ppo", "epochs": EPOCHS, "minibatches": MINIBATCHES},
            "clients": [{"name": "client", "env": task, "count": clients}],
        }
    )
    learner = StackedLearner(resolve_tasks(scenario), scenario)

    def train(updates: int) -> int:
        return sum(report.steps for report in learner.train(updates * NUM_ENVS * HORIZON))

    return train


def make_single_learners(task: str) -> Trainer:
    """Make learners of one client each, which are trained one after another."""
    learners = [make_our_learner(task, 1) for _ in range(SINGLE_LEARNERS)]

    def train(updates: int) -> int:
        return sum(learner(updates) for learner in learners)

    return train


def make_peer(task: str) -> Trainer:
    """Make stable-baselines3's PPO with the settings above; its other defaults are our preset's."""
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


def format_row(row: Row) -> str:
    """Write a row of the table."""
    least, wanted = ("" if target is None else f"{target:g}" for target in (row.least, row.wanted))
    return (
        f"| {row.name} | {row.against} | {median(row.ours.wall):,.0f} | {median(row.theirs.wall):,.0f} "
        f"| {row.ratio:.2f} | {row.cpu_ratio:.2f} | {least} | {wanted} |"
    )


def write_rows(rows: Sequence[Row], rounds: int, path: Path) -> None:
    """Write rows to the results file; they replace older rows of the same name."""
    old = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: version(name) for name in ("grpo-fed", "stable-baselines3", "torch", "gymnasium", "numpy")}
    new = {
        row.name: {**asdict(row), "rounds": rounds, "machine": describe_machine(), "versions": versions} for row in rows
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**old, **new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
