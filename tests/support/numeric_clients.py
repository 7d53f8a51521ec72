"""Clients of numbers alone: each is drawn to a point of its own, and its KL is 1/2 d'Fd exactly.

Everything that a real client promises the server holds here too, in a few lines of numpy that share no code with it: a
state for each round, the groups that it has left kept as they are, answers that depend on the instruction alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

BASE = """
name = "numbers"
rounds = 4
steps = 128
policy = { hidden = [4], shared = ["torso.*", "actor"] }
rollout = { num_envs = 4, horizon = 32 }
objective = { minibatches = 1 }
proximity.mode = "off"
merge.rule = "mean"
"""


def scenario_of(*overrides: str, count: int = 4) -> Scenario:
    """A few CartPole clients, of whom nobody ever looks at a pole."""
    text = f'{BASE}[[clients]]\nname = "c"\ncount = {count}\nenv = "grpo_fed/CartPole-v1"\n'
    return Scenario.loads(text, overrides=overrides)


Fault = Callable[[str, Instruction], Failure | None]


@dataclass
class NumericPost:
    """A post and all of its clients."""

    commons: SharedBlocks
    fault: Fault = lambda name, instruction: None
    goals: dict[str, np.ndarray] = field(default_factory=dict)
    """[S] of those that are not drawn to where their name says."""
    steps: dict[str, int] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    episodes: dict[int, int] = field(default_factory=dict)
    """Of every client, by round."""
    away: set[str] = field(default_factory=set)
    """Who cannot be reached."""
    bytes_up: int = 0
    bytes_down: int = 0
    sent: list[tuple[str, Instruction]] = field(default_factory=list)
    states: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    """Of each client, after each round."""
    submitted: dict[str, Instruction] = field(default_factory=dict)
    """Instructions that are answered when they are collected."""

    def reachable(self) -> tuple[str, ...]:
        return tuple(name for name in self.commons.clients if name not in self.away)

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name in sorted(instructions):
            told = instructions[name]
            self.sent.append((name, told))
            self.bytes_down += told.start.shared.nbytes
            failure = self.fault(name, told)
            if failure is not None:
                yield name, failure
                continue
            answer = self._answer(name, told)
            self.bytes_up += answer.point.nbytes if isinstance(answer, Trained) else 8
            yield name, answer

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        self.submitted |= instructions

    def collect(self, timeout: float) -> list[tuple[str, Answer | Failure]]:
        submitted, self.submitted = self.submitted, {}
        return list(self.send(submitted, timeout))

    # A client ---------------------------------------------------------------------------------------------------------

    def goal(self, name: str) -> np.ndarray:
        return self.goals.get(name, self.numbers(name, 0))

    def fisher(self, name: str) -> np.ndarray:
        return np.exp(self.numbers(name, 1))

    def numbers(self, name: str, kind: int) -> np.ndarray:
        rng = np.random.default_rng([zlib.crc32(name.encode()), kind])
        return rng.standard_normal(self.commons.size).astype(np.float32)

    def policy(self, name: str, start: Start, shared: np.ndarray, before: int) -> np.ndarray:
        """The shared blocks as this client has them: its own where it has left."""
        own = max((number for number in self.states.get(name, {}) if number < before), default=None)
        if own is None:
            return shared.copy()
        keeps = self.commons.columns_of_groups(start.departed).numpy()
        return np.where(keeps, self.states[name][own]["point"], shared)

    def kl(self, name: str, old: np.ndarray, new: np.ndarray) -> float:
        return float(0.5 * (self.fisher(name).astype(np.float64) * (new.astype(np.float64) - old) ** 2).sum())

    def _answer(self, name: str, told: Instruction) -> Answer:
        start = told.start
        match told:
            case Train():
                return self._train(name, told)
            case Measure():
                old = self.policy(name, start, start.shared, start.round + 1)
                goal = self.policy(name, start, told.candidate, start.round + 1)
                tried = [self._part_way(old, goal, trial) for trial in told.fractions]
                return Measured(tuple(self.kl(name, old, new) for new in tried))
            case Evaluate():
                assert start.round == 0 or start.round in self.states[name]
                return Evaluated(self._play(name, start, start.round + 1))

    def _train(self, name: str, told: Train) -> Trained:
        start, number = told.start, told.start.round
        begin = self.policy(name, start, start.shared, number)
        played = None if told.evaluate_first is None else self._play(name, start, number)
        kl = None
        before = self.states.get(name, {}).get(number - 1)
        if told.measure_last_step and before is not None:
            keeps = self.commons.columns_of_groups(start.departed).numpy()
            new = np.where(keeps, before["shared"], start.shared)
            trials = [tuple(float(one == other) for other in self.commons.blocks) for one in self.commons.blocks]
            parts = [self._part_way(before["shared"], new, trial) for trial in trials]
            kl = tuple(self.kl(name, before["shared"], part) for part in (new, *parts))
        noise = 0.1 * self.numbers(name, 1 + number)
        point = (begin + 0.3 * (self.goal(name) - begin) + noise).astype(np.float32)
        self.states.setdefault(name, {})[number] = {"point": point, "shared": start.shared.copy()}
        return Trained(
            point=point,
            steps=self.steps.get(name, 128),
            episodes=self.episodes.get(number, 2 + len(name)),
            gain=self.gains.get(name, 0.0),
            spread=1.0,
            metrics={"charts/episodic_return": -self._error(name, point), "losses/approx_kl": 0.01},
            fisher=self.fisher(name),
            kl=kl,
            played=played,
        )

    def _part_way(self, old: np.ndarray, new: np.ndarray, trial: tuple[float, ...]) -> np.ndarray:
        found = old.astype(np.float64)
        for alpha, columns in zip(trial, self.commons.slices.values(), strict=True):
            found[columns] += alpha * (new[columns].astype(np.float64) - old[columns])
        return found

    def _play(self, name: str, start: Start, before: int) -> EvaluationSummary:
        score = -self._error(name, self.policy(name, start, start.shared, before))
        return EvaluationSummary(score, 0.0, score, score, 1, 1.0)

    def _error(self, name: str, point: np.ndarray) -> float:
        return float(((point.astype(np.float64) - self.goal(name)) ** 2).sum())

    # As an engine keeps its clients' states ---------------------------------------------------------------------------

    def write(self, folder: Path, number: int) -> dict[str, Path]:
        """Every client's latest state of a round up to this one, as a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, states in self.states.items():
            latest = max(one for one in states if one <= number)
            (folder / name).mkdir(exist_ok=True)
            files[name] = folder / name / f"round-{latest:04d}.safetensors"
            if not files[name].exists():
                save_file(states[latest], files[name])
        return files

    def read(self, files: Mapping[str, Path], origins: Mapping[str, str]) -> None:
        """Take up the states of a checkpoint."""
        for name, file in files.items():
            number = int(origins[name].removeprefix("round-").removesuffix(".safetensors"))
            self.states[name] = {number: load_file(file)}


def village(*overrides: str, count: int = 4) -> tuple[Scenario, SharedBlocks, NumericPost]:
    """All that a federation is made of."""
    scenario = scenario_of(*overrides, count=count)
    commons = resolve_shared_blocks(scenario)
    return scenario, commons, NumericPost(commons)


__all__ = ["EvaluationPlan", "NumericPost", "scenario_of", "village"]
