"""The clients of one fleet as members of a federation: they do what a server tells them, and remember it at home.

What a client remembers of a round is all of its fleet's state, the shared blocks that the round began with and how well
it went. With `personal.model` it has a second policy of its own (Ditto, 2012.04221), which is a fleet beside the first:
nothing that the first one does depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.proximity import StepFractions, interpolate
from grpo_fed.federation.learners import OWN, ClientLearners
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
from grpo_fed.federation.state_store import Arrays, StateStore
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.evaluation import EvaluatedClients, Evaluation, evaluate
from grpo_fed.rl.measurement import MeasurementStates, mean_kl
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.rollout import Actor, Episode
from grpo_fed.rl.stacked_learner import TrainingReport, first_parameters, sub_state
from grpo_fed.runs.metrics import REPORTED
from grpo_fed.runs.policies import save_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs, EnvCache, make_client_envs
from grpo_fed.tasks.gym_task import GymTask

BEGAN, RETURN, KEPT = "round.shared", "round.return", "kept"

Kind = TypeVar("Kind", Train, Measure, Evaluate)


@dataclass(frozen=True, eq=False)
class LoadedClient:
    """A client that is asked, and what it remembers."""

    name: str
    start: Start
    round: int
    """The last round that it remembers; 0 for none."""
    state: Arrays | None
    """What it remembers of that."""


@final
class Clients:
    """Clients with equally shaped policies, who answer together or a few of them at a time."""

    def __init__(self, scenario: Scenario, commons: SharedBlocks, tasks: Sequence[GymTask], home: StateStore) -> None:
        self.scenario = scenario
        self.shared_blocks = commons
        self.tasks = {task.client: task for task in tasks}
        self.state_store = home
        self.names = tuple(self.tasks)
        self.policy = make_policy(tasks[0], scenario.policy)
        self.device = resolve_device(scenario.device)
        self.columns = commons.columns_in(self.policy.layout).to(self.device)
        self.slices = list(commons.slices.values())
        self.seeds = {name: client_seed(scenario.seed, name) for name in self.names}
        self._env_caches = EnvCache(), EnvCache(), EnvCache()
        """Environments to train on, to train a second policy on, and to play on."""
        self._learners: ClientLearners | None = None
        self._evaluation_envs: tuple[list[str], ClientEnvs] | None = None
        """Who played last, and where."""

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        """What these clients make of what they are told: of one kind for all of them; the others rest.

        What one of them raises is raised, and nobody has an answer then.
        """
        asked = {name: instructions[name] for name in self.names if name in instructions}
        assert asked, "somebody is asked"
        assert len(asked) == len(instructions), f"strangers among {sorted(instructions)}"
        try:
            match next(iter(asked.values())):
                case Train():
                    return dict(self._train(_all_of(Train, asked)))
                case Measure():
                    return dict(self._measure(_all_of(Measure, asked)))
                case Evaluate():
                    return dict(self._evaluate(_all_of(Evaluate, asked)))
        except BaseException:
            self.close()  # environments and parameters may be anywhere; the files say where the clients stand
            raise

    def save_policies(self, folder: Path, starts: Mapping[str, Start]) -> None:
        """Write the policies that these clients play with to `folder/policies`, but for those that diverged."""
        seats = [self._load(name, starts[name]) for name in self.names if name in starts]
        if not seats:
            return
        normaliser = self._normaliser(seats)
        for row, (seat, parameters) in enumerate(zip(seats, self._evaluated_parameters(seats), strict=True)):
            if bool(parameters.isfinite().all()):
                moments = None if normaliser is None else normaliser.state(row)
                save_policy(folder, self.tasks[seat.name], self.policy, parameters, moments)

    def close(self) -> None:
        """Close the environments."""
        crew, self._learners = self._learners, None
        stage, self._evaluation_envs = self._evaluation_envs, None
        if crew is not None:
            crew.close()
        if stage is not None:
            stage[1].close()
        for shed in self._env_caches:
            shed.close()

    # Training

    def _train(self, orders: Mapping[str, Train]) -> Iterator[tuple[str, Trained]]:
        order, *others = orders.values()
        run, round = order.start.run, order.start.round
        same = {(run, round, order.begin, order.end)}
        assert same == same | {(o.start.run, o.start.round, o.begin, o.end) for o in others}, "all train one round"
        seats = [self._load(name, one.start, round - 1) for name, one in orders.items()]
        looked = self._measure_last_step([seat for seat in seats if orders[seat.name].measure_last_step])
        played = self._evaluate_clients(seats, order.evaluate_first) if order.evaluate_first else [None] * len(seats)

        crew = self._learners_of(seats)
        crew.shared.parameters.copy_(self._with_shared_blocks(crew.shared.parameters, seats))
        began = time.perf_counter()
        reports, own_reports = crew.train(order, [seat.state is None for seat in seats])
        seconds = time.perf_counter() - began
        fisher = crew.fisher(round) if self._asks_fisher else [None] * len(seats)
        for row, (seat, report, own) in enumerate(zip(seats, reports, own_reports, strict=True)):
            crew.states[row] = self._save(seat, crew, row, report)
            yield (
                seat.name,
                Trained(
                    point=crew.shared.parameters[row, self.columns].cpu().numpy(),
                    steps=report.steps + own.steps,
                    episodes=len(report.episodes) + len(own.episodes),
                    gain=_gain(report, seat),
                    spread=_spread(report.episodes),
                    metrics=reported_metrics(report, seconds),
                    fisher=fisher[row],
                    kl=looked.get(seat.name),
                    played=played[row],
                ),
            )

    @property
    def _asks_fisher(self) -> bool:
        """Whether the server needs Fisher matrices."""
        return self.scenario.merge.rule == "fisher" or self.scenario.proximity.mode == "quadratic"

    def _learners_of(self, seats: Sequence[LoadedClient]) -> ClientLearners:
        """These clients' fleet where they left it; that of the last call if it is theirs."""
        names, states = [seat.name for seat in seats], [seat.state for seat in seats]
        if self._learners is None or self._learners.shared.names != names or not self._learners.can_load(states):
            old, self._learners = self._learners, None
            if old is not None:
                old.close()
            self._learners = ClientLearners(
                [self.tasks[name] for name in names], self.scenario, self.columns, self._env_caches[:2]
            )
        self._learners.load(states)
        return self._learners

    def _save(self, seat: LoadedClient, crew: ClientLearners, row: int, report: TrainingReport) -> Arrays | None:
        """Write down how the client leaves the round; gives what will be read of it."""
        run, round = seat.start.run, seat.start.round
        state = crew.state(row) | {BEGAN: seat.start.shared, RETURN: np.array([_mean(report.episodes)])}
        self.state_store.save(run, seat.name, round, state)
        return self.state_store.read(run, seat.name, round)

    # Measuring

    def _measure(self, orders: Mapping[str, Measure]) -> Iterator[tuple[str, Measured]]:
        seats = [self._load(name, order.start) for name, order in orders.items()]
        for seat in seats:
            if seat.round != seat.start.round or seat.state is None or not len(seat.state.get(KEPT, ())):
                raise ValueError(
                    f"client {seat.name}: it has no states of round {seat.start.round} to measure on; it must have"
                    f" trained that round of {seat.start.run} first, with its state in {self.state_store.folder}"
                )
        shared = [order.start.shared for order in orders.values()]
        candidates = [order.candidate for order in orders.values()]
        trials = [order.fractions for order in orders.values()]
        for seat, kl in zip(seats, self._kl(seats, shared, candidates, trials), strict=True):
            yield seat.name, Measured(kl)

    def _measure_last_step(self, seats: Sequence[LoadedClient]) -> dict[str, tuple[float, ...]]:
        """KL of the step from the shared blocks that the last round began with: joint, and each block alone.

        Only of those who were there in the last round.
        """
        there: list[LoadedClient] = []
        shared: list[np.ndarray] = []
        for seat in seats:
            if seat.state is not None and seat.round == seat.start.round - 1 and len(seat.state.get(KEPT, ())):
                there.append(seat)
                shared.append(seat.state[BEGAN])
        blocks = range(len(self.slices))
        trials = [tuple([1.0] * len(blocks)), *(tuple(float(b == block) for b in blocks) for block in blocks)]
        candidates = [seat.start.shared for seat in there]
        found = self._kl(there, shared, candidates, [trials] * len(there))
        return {seat.name: kl for seat, kl in zip(there, found, strict=True)}

    def _kl(
        self,
        seats: Sequence[LoadedClient],
        shared: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray],
        trials: Sequence[Sequence[StepFractions]],
    ) -> list[tuple[float, ...]]:
        """[M] for each client: of steps from a policy with these shared blocks towards one with the candidate's."""
        if not seats:
            return []
        states = MeasurementStates.of([_remembered(seat)[KEPT] for seat in seats], self.device)
        own = self._parameters(seats)
        begins, ends = ([torch.from_numpy(np.array(one)) for one in each] for each in (shared, candidates))
        steps = [
            [
                interpolate(begin, end, self.slices, trial)
                for begin, end, trial in zip(begins, ends, column, strict=True)
            ]
            for column in zip(*trials, strict=True)
        ]
        new = (self._with_shared_blocks(own, seats, step) for step in steps)
        found = mean_kl(self.policy, states, self._with_shared_blocks(own, seats, begins), new)
        most = torch.finfo(found.dtype).max
        return [tuple(row) for row in found.nan_to_num(nan=most, posinf=most).T.tolist()]

    # Playing

    def _evaluate(self, orders: Mapping[str, Evaluate]) -> Iterator[tuple[str, Evaluated]]:
        seats = [self._load(name, order.start) for name, order in orders.items()]
        (number, deterministic), *others = {(o.play.number, o.play.deterministic) for o in orders.values()}
        assert not others, "all play the same episodes"
        for seat, played in zip(
            seats, self._evaluate_clients(seats, EvaluationPlan(number, deterministic)), strict=True
        ):
            yield seat.name, Evaluated(played)

    def _evaluate_clients(self, seats: Sequence[LoadedClient], given: EvaluationPlan) -> list[EvaluationSummary]:
        names, settings = [seat.name for seat in seats], self.scenario.evaluate
        found = evaluate(
            Actor(self.policy, self._evaluated_parameters(seats)),
            self._envs_of(names),
            EvaluatedClients(names, [self.seeds[name] for name in names], self._normaliser(seats)),
            settings.episodes,
            settings.step_limit,
            given.deterministic,
            given.number,
        )
        return [_played(one) for one in found]

    def _envs_of(self, names: list[str]) -> ClientEnvs:
        """To play on; those of the last time if they are these clients'."""
        if self._evaluation_envs is None or self._evaluation_envs[0] != names:
            old, self._evaluation_envs = self._evaluation_envs, None
            if old is not None:
                old[1].close()
            rollout, squash = self.scenario.rollout, self.scenario.policy.squash
            tasks = [self.tasks[name] for name in names]
            lanes = make_client_envs(tasks, rollout.num_envs, squash, rollout.episode_limit, self._env_caches[2])
            self._evaluation_envs = names, lanes
        return self._evaluation_envs[1]

    def _evaluated_parameters(self, seats: Sequence[LoadedClient]) -> Tensor:
        """[K, P]: what the clients play with, which is their own policy where they have a second one."""
        placed = self._with_shared_blocks(self._parameters(seats), seats)
        if self.scenario.personal.model:
            for row, seat in enumerate(seats):
                if seat.state is not None:
                    placed[row] = torch.from_numpy(np.array(seat.state[f"{OWN}.parameters"]))
        return placed

    def _normaliser(self, seats: Sequence[LoadedClient]) -> ObservationNormaliser | None:
        """Of the policies that play."""
        settings = self.scenario.normalise
        if not settings.observations:
            return None
        normaliser = ObservationNormaliser(len(seats), self.policy.observation_size, settings.clip)
        part = "observation_normaliser"
        for row, seat in enumerate(seats):
            if seat.state is not None:
                normaliser.load(row, sub_state(seat.state, f"{OWN}.{part}" if self.scenario.personal.model else part))
        return normaliser

    # What clients remember

    def _load(self, name: str, start: Start, until: int | None = None) -> LoadedClient:
        """A client with what it remembers of the rounds until this one, by default until the start's.

        One that was heard last in the start's round, and has trained on since, late or refused each time, may have
        forgotten that; then what it knows is nearer to it than what it knew before the first round.
        """
        last = start.round if until is None else until
        found = self.state_store.load(start.run, name, before=last + 1)
        if found is None and until is None and start.round:
            found = self.state_store.earliest(start.run, name)
        round, state = found or (0, None)
        return LoadedClient(name, start, round, state)

    def _parameters(self, seats: Sequence[LoadedClient]) -> Tensor:
        """[K, P]: as the clients left them, or the first ones."""
        fresh = [self.seeds[seat.name] for seat in seats if seat.state is None]
        first = iter(first_parameters(self.policy, self.scenario, fresh) if fresh else ())
        rows = [
            next(first) if seat.state is None else torch.from_numpy(np.array(seat.state["parameters"]))
            for seat in seats
        ]
        return torch.stack(rows).to(self.device)

    def _with_shared_blocks(
        self, own: Tensor, seats: Sequence[LoadedClient], shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """[K, P]: each client's own, with the shared blocks put in place; by default those that it is given.

        Where it has left a group it keeps what it has, if it has something.
        """
        given = shared or [torch.from_numpy(np.array(seat.start.shared)) for seat in seats]
        kept = [
            self.shared_blocks.columns_of_groups(() if seat.state is None else seat.start.departed) for seat in seats
        ]
        placed = own.clone()
        placed[:, self.columns] = torch.where(
            torch.stack(kept).to(self.device), own[:, self.columns], torch.stack(list(given)).to(self.device)
        )
        return placed


def _all_of(kind: type[Kind], asked: Mapping[str, Instruction]) -> dict[str, Kind]:
    found = {name: one for name, one in asked.items() if isinstance(one, kind)}
    assert len(found) == len(asked), "all are asked for the same kind of thing"
    return found


def _remembered(seat: LoadedClient) -> Arrays:
    assert seat.state is not None, f"{seat.name} remembers something"
    return seat.state


def _mean(episodes: Sequence[Episode]) -> float:
    """Return; not a number where none has finished."""
    return float(np.mean([episode.score for episode in episodes])) if episodes else math.nan


def _gain(report: TrainingReport, seat: LoadedClient) -> float:
    """By how much the mean return rose since the round before; 0 where one of them has none."""
    if seat.state is None or seat.round != seat.start.round - 1:
        return 0.0
    gain = _mean(report.episodes) - float(seat.state[RETURN][0])
    return gain if math.isfinite(gain) else 0.0


def _spread(episodes: Sequence[Episode]) -> float:
    """Standard deviation of the returns; 0 where there are none."""
    return float(np.std([episode.score for episode in episodes])) if episodes else 0.0


def reported_metrics(report: TrainingReport, seconds: float | None) -> dict[str, float]:
    """What a client tells of itself, where it is a number."""
    lengths = [episode.length for episode in report.episodes]
    told = {
        "charts/episodic_return": _mean(report.episodes),
        "charts/episodic_length": float(np.mean(lengths)) if lengths else math.nan,
        **({} if seconds is None else {"charts/seconds": seconds}),
        **{f"losses/{name}": value for name, value in report.losses.items()},
    }
    return {name: value for name, value in told.items() if name in REPORTED and math.isfinite(value)}


def _played(found: Evaluation) -> EvaluationSummary:
    scores = found.scores
    return EvaluationSummary(
        mean=float(scores.mean()),
        std=float(scores.std()),
        least=float(scores.min()),
        most=float(scores.max()),
        episodes=len(scores),
        length=float(found.lengths.mean()),
    )
