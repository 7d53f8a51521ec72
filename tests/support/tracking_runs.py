"""Runs for the tests of tracking: a scenario, lines of rounds.jsonl, results, and a reader of MLflow's database."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo_fed.scenario.scenario import Scenario

BLOCKS = {"torso.0": 0.01, "actor": 0.02, "joint": 0.04}


def scenario(name: str = "carts", carts: int = 2, rounds: int = 4) -> Scenario:
    """Make a scenario of so many carts and one that is wired backwards."""
    text = f"""
    name = "{name}"
    description = "Carts learn together; one is wired backwards."
    rounds = {rounds}
    steps = 128
    evaluate.episodes = 2
    policy = {{ hidden = [8] }}
    rollout = {{ num_envs = 2, horizon = 64 }}
    normalise = {{ observations = true }}
    objective = {{ epochs = 1, minibatches = 1 }}
    [[clients]]
    name = "cart"
    count = {carts}
    env = "grpo_fed/CartPole-v1"
    [[clients]]
    name = "backwards"
    env = "grpo_fed/CartPole-v1"
    kwargs = {{ swap_actions = true }}
    """
    return Scenario.loads(text)


def client_names(given: Scenario) -> list[str]:
    """List the clients of a scenario."""
    return [name for entry in given.clients for name in entry.names]


def line(given: Scenario, number: int) -> dict[str, Any]:
    """Make the line of a round; the k-th client's evaluation return is 10 number + k."""
    clients: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(client_names(given)):
        clients[name] = {
            "eval/episodic_return": 10.0 * number + k,
            "charts/episodic_return": 9.0 * number + k,
            "losses/entropy": 0.5 - 0.01 * number,
            "kl/joint": 0.001 * (k + 1),
            "fed/personal_groups": int(name == "backwards"),
        }
    returns = [client["eval/episodic_return"] for client in clients.values()]
    return {
        "round": number,
        "global_step": 384 * number,
        "time/round_s": 0.5,
        "charts/SPS": 700.0,
        "eval/score_iqm": sum(returns) / len(returns),
        "eval/score_min": min(returns),
        "eval/episodic_return": sum(returns) / len(returns),
        "charts/episodic_return": 9.0 * number,
        "task/cart": 10.0 * number,
        "losses/value_loss": None,
        "fed/clients_ok": len(clients),
        "fed/clients_failed": 0,
        "fed/personal_groups": 1,
        "comm/MB_total": 0.1 * number,
        **{f"kl/{block}": value for block, value in BLOCKS.items()},
        **{f"budget/{block}": 2 * value for block, value in BLOCKS.items()},
        "alpha/torso.0": 1.0,
        "alpha/actor": 0.5,
        "clients": clients,
    }


def document(given: Scenario, rounds: int, status: str = "finished") -> dict[str, Any]:
    """Make the content of results.json after so many rounds."""
    last = line(given, rounds)
    return {
        "status": status,
        "rounds": rounds,
        "seconds": 12.0,
        "env_steps": 384 * rounds,
        "bytes_up": 1_000_000,
        "bytes_down": 500_000,
        "eval": {"score_iqm": last["eval/score_iqm"], "score_mean": last["eval/score_iqm"], "score_min": 10.0 * rounds},
        "clients": {
            name: {
                "env": "grpo_fed/CartPole-v1",
                "return": client["eval/episodic_return"],
                "return_before": 1.0,
                "return_best": 99.0,
                "episodes": 7,
                "env_steps": 128 * rounds,
                "personal_groups": ["actor"] if name == "backwards" else [],
            }
            for name, client in last["clients"].items()
        },
    }


class Database:
    """Reads MLflow's sqlite database without MLflow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}"

    @property
    def is_made(self) -> bool:
        """Whether the database has its tables."""
        return bool(self.rows("select 1 from sqlite_master where name = 'runs'"))

    def rows(self, query: str, *values: Any) -> list[Any]:
        """Run a query and return its rows."""
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            rows = connection.execute(query, values).fetchall()
            connection.commit()
            return rows

    def runs(self, experiment: str) -> dict[str, str]:
        """Find the ids of an experiment's runs by their names."""
        query = "select r.name, run_uuid from runs r join experiments e using (experiment_id) where e.name = ?"
        return dict(self.rows(query, experiment))

    def status(self, run: str) -> str:
        """Read a run's status."""
        ((status,),) = self.rows("select status from runs where run_uuid = ?", run)
        return str(status)

    def metric(self, run: str, key: str) -> list[tuple[int, float]]:
        """Read all points (step, value) of a metric."""
        query = "select step, value from metrics where run_uuid = ? and key = ? order by step, timestamp"
        return self.rows(query, run, key)

    def keys(self, run: str) -> set[str]:
        """List the keys of a run's metrics."""
        return {key for (key,) in self.rows("select distinct key from metrics where run_uuid = ?", run)}

    def tags(self, run: str) -> Mapping[str, str]:
        """Read a run's tags."""
        return dict(self.rows("select key, value from tags where run_uuid = ?", run))

    def params(self, run: str) -> Mapping[str, str]:
        """Read a run's parameters."""
        return dict(self.rows("select key, value from params where run_uuid = ?", run))

    def experiment_tags(self, name: str) -> Mapping[str, str]:
        """Read an experiment's tags."""
        query = "select t.key, t.value from experiment_tags t join experiments e using (experiment_id) where e.name = ?"
        return dict(self.rows(query, name))

    def artifacts(self, run: str) -> Path:
        """Find the folder of a run's files."""
        ((uri,),) = self.rows("select artifact_uri from runs where run_uuid = ?", run)
        return Path(uri.removeprefix("file://"))


def files_with_words(folder: Path, words: Sequence[str]) -> list[Path]:
    """List the files below a folder that contain one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(word.encode() in path.read_bytes() for word in words)]
