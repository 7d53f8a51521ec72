"""Numeric clients: each moves towards a point of its own, and its KL is 1/2 d'Fd exactly.

They keep every promise that real clients make to the server, in a few lines of numpy that share no code with these: a
state for each round, departed groups that stay as they are, answers that depend on the instruction alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

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
    SharingComparison,
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


def numeric_scenario(*overrides: str, count: int = 4) -> Scenario:
    """A scenario of CartPole clients whose environments are never stepped."""
    text = f'{BASE}[[clients]]\nname = "c"\ncount = {count}\nenv = "grpo_fed/CartPole-v1"\n'
    return Scenario.loads(text, overrides=overrides)


Fault = Callable[[str, Instruction], Failure | None]
Kind = TypeVar("Kind", Train, Measure, Evaluate)


@dataclass
class NumericTransport:
    """A transport with all of its clients."""

    shared_blocks: SharedBlocks
    fault: Fault = lambda name, instruction: None
    goals: dict[str, np.ndarray] = field(default_factory=dict)
    """[S] for clients that do not move towards the point that follows from their name."""
    steps: dict[str, int] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    episodes: dict[int, int] = field(default_factory=dict)
    """Finished episodes of every client, by round."""
    shares_from: int | None = None
    """The round from which clients that compare find the shared parameters no worse; None to go by their scores."""
    unreachable: set[str] = field(default_factory=set)
    """Clients that cannot be reached."""
    bytes_up: int = 0
    bytes_down: int = 0
    sent: list[tuple[str, Instruction]] = field(default_factory=list)
    states: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    """State of each client after each round."""
    submitted: dict[str, Instruction] = field(default_factory=dict)
    """Instructions that are answered when they are collected."""

    def reachable(self) -> tuple[str, ...]:
        return tuple(name for name in self.shared_blocks.clients if name not in self.unreachable)

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name in sorted(instructions):
            instruction = instructions[name]
            self.sent.append((name, instruction))
            self.bytes_down += instruction.start.shared.nbytes
            failure = self.fault(name, instruction)
            if failure is not None:
                yield name, failure
                continue
            answer = self._answer(name, instruction)
            self.bytes_up += answer.point.nbytes if isinstance(answer, Trained) else 8
            yield name, answer

    def sent_of(self, kind: type[Kind]) -> list[tuple[str, Kind]]:
        """List the instructions of one kind that were sent, with their clients."""
        return [(name, instruction) for name, instruction in self.sent if isinstance(instruction, kind)]

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        self.submitted |= instructions

    def collect(self, timeout: float) -> list[tuple[str, Answer | Failure]]:
        submitted, self.submitted = self.submitted, {}
        return list(self.send(submitted, timeout))

    # Clients ----------------------------------------------------------------------------------------------------------

    def goal(self, name: str) -> np.ndarray:
        return self.goals.get(name, self.numbers(name, 0))

    def fisher(self, name: str) -> np.ndarray:
        return np.exp(self.numbers(name, 1))

    def numbers(self, name: str, kind: int) -> np.ndarray:
        rng = np.random.default_rng([zlib.crc32(name.encode()), kind])
        return rng.standard_normal(self.shared_blocks.size).astype(np.float32)

    def policy(self, name: str, start: Start, shared: np.ndarray, before: int) -> np.ndarray:
        """The shared blocks of this client: its own values in departed groups."""
        last = max((number for number in self.states.get(name, {}) if number < before), default=None)
        if last is None:
            return shared.copy()
        departed = self.shared_blocks.columns_of_groups(start.departed).numpy()
        return np.where(departed, self.states[name][last]["point"], shared)

    def kl(self, name: str, old: np.ndarray, new: np.ndarray) -> float:
        return float(0.5 * (self.fisher(name).astype(np.float64) * (new.astype(np.float64) - old) ** 2).sum())

    def _answer(self, name: str, instruction: Instruction) -> Answer:
        start = instruction.start
        match instruction:
            case Train():
                return self._train(name, instruction)
            case Measure():
                old = self.policy(name, start, start.shared, start.round + 1)
                goal = self.policy(name, start, instruction.candidate, start.round + 1)
                steps = [self._part_way(old, goal, fractions) for fractions in instruction.fractions]
                return Measured(tuple(self.kl(name, old, new) for new in steps))
            case Evaluate():
                assert start.round == 0 or start.round in self.states[name]
                return Evaluated(self._evaluate(name, start, start.round + 1))

    def _train(self, name: str, instruction: Train) -> Trained:
        start, number = instruction.start, instruction.start.round
        comparison = self._compare(name, start, instruction.compare)
        own = comparison is not None and not comparison.shares
        begin = self.policy(name, _with_own_groups(start, instruction.compare, own), start.shared, number)
        played = None if instruction.evaluate_first is None else self._evaluate(name, start, number)
        kl = None
        before = self.states.get(name, {}).get(number - 1)
        if instruction.measure_last_step and before is not None:
            departed = self.shared_blocks.columns_of_groups(start.departed).numpy()
            new = np.where(departed, before["shared"], start.shared)
            blocks = self.shared_blocks.blocks
            single = [tuple(float(block == moved) for block in blocks) for moved in blocks]
            parts = [self._part_way(before["shared"], new, fractions) for fractions in single]
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
            evaluation=played,
            comparison=comparison,
        )

    def _compare(self, name: str, start: Start, groups: tuple[int, ...]) -> SharingComparison | None:
        """Compare the scores with the client's own parameters in some groups and with the shared ones."""
        if not groups or not self.states.get(name):
            return None
        own, shared = (
            self._evaluate(name, _with_own_groups(start, groups, is_own), start.round).mean for is_own in (True, False)
        )
        shares = shared >= own if self.shares_from is None else start.round >= self.shares_from
        return SharingComparison(own, shared, error=0.5, learned=1.0, episodes=2, shares=shares)

    def _part_way(self, old: np.ndarray, new: np.ndarray, fractions: tuple[float, ...]) -> np.ndarray:
        moved = old.astype(np.float64)
        for alpha, columns in zip(fractions, self.shared_blocks.slices.values(), strict=True):
            moved[columns] += alpha * (new[columns].astype(np.float64) - old[columns])
        return moved

    def _evaluate(self, name: str, start: Start, before: int) -> EvaluationSummary:
        score = -self._error(name, self.policy(name, start, start.shared, before))
        return EvaluationSummary(score, 0.0, score, score, 1, 1.0)

    def _error(self, name: str, point: np.ndarray) -> float:
        return float(((point.astype(np.float64) - self.goal(name)) ** 2).sum())

    # As an engine stores its clients' states --------------------------------------------------------------------------

    def write(self, folder: Path, number: int) -> dict[str, Path]:
        """Every client's latest state of a round up to this one, as a file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, states in self.states.items():
            latest = max(round for round in states if round <= number)
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


def _with_own_groups(start: Start, groups: tuple[int, ...], own: bool) -> Start:
    departed = set(start.departed)
    return replace(start, departed=tuple(sorted(departed | {*groups} if own else departed - {*groups})))


def numeric_federation(*overrides: str, count: int = 4) -> tuple[Scenario, SharedBlocks, NumericTransport]:
    """A scenario, its shared blocks, and a transport with numeric clients."""
    scenario = numeric_scenario(*overrides, count=count)
    shared_blocks = resolve_shared_blocks(scenario)
    return scenario, shared_blocks, NumericTransport(shared_blocks)


__all__ = ["EvaluationPlan", "NumericTransport", "numeric_federation", "numeric_scenario"]
