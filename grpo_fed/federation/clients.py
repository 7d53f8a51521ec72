"""Clients with equally shaped policies: they follow the server's instructions, and remember their state at home.

What a client remembers of a round is its learner's state, the shared blocks that the round began with and its mean
return. With `personal.model` it has a second policy (Ditto, 2012.04221), trained by a learner beside the first: nothing
that the first one does depends on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.proximity import StepFractions, interpolate
from grpo_fed.federation.adaptation import adapted_returns
from grpo_fed.federation.client_reports import needs_fisher, reported_metrics, summarise
from grpo_fed.federation.comparison import ReturnHistory, compare_by_playing
from grpo_fed.federation.compression import prepare_point
from grpo_fed.federation.drift import RoundDrift
from grpo_fed.federation.hostile import attacks_of, lies
from grpo_fed.federation.kinds import all_of_kind, round_of
from grpo_fed.federation.learners import ClientLearners
from grpo_fed.federation.loaded_client import ROUND_SHARED, LoadedClient
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    SecureStep,
    SharingComparison,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.newcomers import play_unlearned
from grpo_fed.federation.secure_clients import SecureClients
from grpo_fed.federation.state_store import Arrays, StateStore
from grpo_fed.federation.twins import compare_with_twin
from grpo_fed.federation.withheld_metrics import WITHHELD, are_withheld, withhold_metrics
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.learner import PERSONAL, sub_state
from grpo_fed.rl.make import make_client_policies
from grpo_fed.runs.examples import write_examples
from grpo_fed.runs.policies import save_policy
from grpo_fed.scenario.importing import describe_exception
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import Task

log = logging.getLogger(__name__)


@final
class Clients:
    """Answers the server's instructions for clients with equally shaped policies, all together or some at a time."""

    def __init__(
        self, scenario: Scenario, shared_blocks: SharedBlocks, tasks: Sequence[Task], state_store: StateStore
    ) -> None:
        """Take the clients of these tasks, whose policies have the same shape."""
        self.scenario = scenario
        self.shared_blocks = shared_blocks
        self.tasks = {task.client: task for task in tasks}
        self.state_store = state_store
        self.names = tuple(self.tasks)
        self.policies = make_client_policies(tasks, scenario, shared_blocks)
        self.columns = self.policies.columns
        self.slices = list(shared_blocks.slices.values())
        self.attacks = attacks_of(scenario)
        self.secure = SecureClients(scenario, shared_blocks, state_store)
        self.learners: ClientLearners | None = None
        """The learners of the clients that were trained last."""

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        """Follow instructions of one kind, by client; clients without one do nothing.

        If one client raises an error, it is raised, and there are no answers.
        """
        given = {name: instructions[name] for name in self.names if name in instructions}
        assert given, "there is an instruction"
        assert len(given) == len(instructions), f"unknown clients among {sorted(instructions)}"
        try:
            answers: dict[str, Answer]
            match next(iter(given.values())):
                case Train():
                    rounds: dict[tuple[str, int, float, float], dict[str, Train]] = {}
                    for name, each in all_of_kind(Train, given).items():
                        rounds.setdefault(round_of(each), {})[name] = each
                    answers = {name: answer for each in rounds.values() for name, answer in self._train(each)}
                case Measure():
                    answers = dict(self._measure(all_of_kind(Measure, given)))
                case Evaluate():
                    evaluates = all_of_kind(Evaluate, given)
                    is_played = not are_withheld(self.scenario)
                    answers = dict(self._evaluate(evaluates)) if is_played else dict.fromkeys(given, WITHHELD)
                case SecureStep():
                    steps = all_of_kind(SecureStep, given)
                    return {name: self.secure.follow(name, each) for name, each in steps.items()}
        except BaseException:
            self.close()  # environments and parameters may be in any state; the files have that of the clients
            raise
        answers |= lies(given, answers, self.attacks, self.scenario)
        return self.secure.protect(given, withhold_metrics(self.scenario, answers))

    def save_policies(self, folder: Path, starts: Mapping[str, Start], round: int) -> dict[str, str]:
        """Write the policies that these clients are evaluated with to `folder/policies`, but not diverged ones.

        round: the last round of the run so far, whose tasks the policies are for. Return why for those that could not
        be saved, which is logged too: one client's policy costs no other's.
        """
        problems: dict[str, str] = {}
        for name in self.names:
            try:
                if name in starts:
                    self._save_policy(folder, self._load(name, starts[name]), round)
            except Exception as error:  # noqa: BLE001, a damaged file or a user's module may fail in any way
                problems[name] = describe_exception(error)
                log.warning("the policy of %s could not be saved: %s", name, problems[name])
        return problems

    def _save_policy(self, folder: Path, client: LoadedClient, round: int) -> None:
        (parameters,), (state,) = self._evaluated_parameters([client]), self._evaluated_states([client])
        if bool(parameters.isfinite().all()):
            moments = self.policies.observation_moments(client.name, state)
            task = self.tasks[client.name].at(round)
            save_policy(folder, task, self.policies.policy, parameters, moments, self.scenario.seed)
            write_examples(folder, client.name, self.policies.examples(client.name, parameters))

    def close(self) -> None:
        """Close the environments."""
        learners, self.learners = self.learners, None
        if learners is not None:
            learners.close()
        self.policies.close()

    # Training

    def _train(self, instructions: Mapping[str, Train]) -> Iterator[tuple[str, Trained]]:
        first, *_ = instructions.values()
        assert len({round_of(each) for each in instructions.values()}) == 1, "all clients train the same round"
        round = first.start.round
        clients = [self._load(name, each.start, round - 1) for name, each in instructions.items()]
        last_step_kl = self._measure_last_step(
            [client for client in clients if instructions[client.name].measure_last_step]
        )
        evaluations: Sequence[EvaluationSummary | None] = [None] * len(clients)
        if first.evaluate_first is not None:
            evaluations = self._evaluate_clients(clients, first.evaluate_first)

        clients, comparisons = self._compare(clients, {name: each.compare for name, each in instructions.items()})
        floors = play_unlearned(self.scenario, self.policies, clients, round)
        learners = self._learners_of(clients, round)
        learners.shared.parameters.copy_(self._with_shared_blocks(learners.shared.parameters, clients))
        drift = RoundDrift(learners.shared, self.columns, clients)
        began = time.perf_counter()
        reports = learners.train([*instructions.values()])
        seconds = time.perf_counter() - began
        fisher = learners.fisher(round) if needs_fisher(self.scenario) else [None] * len(clients)
        for row, (client, reported) in enumerate(zip(clients, reports, strict=True)):
            report, history = reported.shared, ReturnHistory.read(client.state)
            point = learners.shared.parameters[row, self.columns].cpu().numpy()
            floor = floors.get(client.name, report.floor)
            kept = history.after(report.mean_return, report.spread, floor).arrays()
            twin = compare_with_twin(client.state, round, reported)
            sent = prepare_point(self.scenario, self.shared_blocks, client, point)
            self._save(client, learners, row, {**kept, **twin.arrays, **drift.arrays(row, point), **sent.owed})
            yield (
                client.name,
                Trained(
                    point=sent.point,
                    steps=reported.steps,
                    episodes=reported.episodes,
                    gain=client.gain(report.mean_return),
                    spread=report.spread,
                    metrics={**reported_metrics(report, seconds), **twin.metrics},
                    fisher=fisher[row],
                    kl=last_step_kl.get(client.name),
                    evaluation=evaluations[row],
                    low=history.is_low(report.mean_return),
                    since=None if client.last_round == round - 1 else client.last_round,
                    comparison=comparisons.get(client.name),
                    difference=sent.difference,
                    evidence=learners.evidence(row),
                ),
            )

    def _learners_of(self, clients: Sequence[LoadedClient], round: int) -> ClientLearners:
        """These clients' learners in the states that the clients remember; the last ones if they can be used.

        round: the one to be trained. Learners of other tasks than the clients have in it cannot be used.
        """
        names, states = [client.name for client in clients], [client.stored for client in clients]
        if (
            self.learners is None
            or self.learners.names != names
            or self._tasks_of(names, self.learners.round) != self._tasks_of(names, round)
            or not self.learners.can_load(states)
        ):
            previous, self.learners = self.learners, None
            if previous is not None:
                previous.close()
            self.learners = ClientLearners(self.scenario, self.policies, names, round)
        self.learners.load(states)
        return self.learners

    def _tasks_of(self, names: Sequence[str], round: int) -> list[Task]:
        """The tasks that clients have in a round."""
        return [self.tasks[name].at(round) for name in names]

    def _save(self, client: LoadedClient, learners: ClientLearners, row: int, kept: Arrays) -> None:
        """Store a client's state after the round, with what else it remembers."""
        state = learners.state(row) | {ROUND_SHARED: client.start.shared} | dict(kept)
        stored = self.state_store.save(client.start.run, client.name, client.start.round, state)
        learners.mark_stored(row, stored)

    def _compare(
        self, clients: Sequence[LoadedClient], groups: Mapping[str, tuple[int, ...]]
    ) -> tuple[list[LoadedClient], dict[str, SharingComparison]]:
        """Let clients choose between their own parameters and the shared ones in some groups, for each client's name.

        Return the clients as they begin the round, and the comparisons that they made.
        """
        asked = {client.name: client for client in clients if groups[client.name] and client.state is not None}
        versions = {
            own: {name: client.with_own_groups(groups[name], own) for name, client in asked.items()}
            for own in (True, False)
        }

        def play(names: Sequence[str], own: bool, batch: int) -> list[np.ndarray]:
            return self._play_to_compare([versions[own][name] for name in names], batch)

        comparisons = compare_by_playing(
            {name: ReturnHistory.read(client.state) for name, client in asked.items()},
            {name for name, client in asked.items() if {*client.start.departed} & {*groups[name]}},
            play,
        )
        chosen = {name: versions[not comparison.shares][name] for name, comparison in comparisons.items()}
        return [chosen.get(client.name, client) for client in clients], comparisons

    def _play_to_compare(self, clients: Sequence[LoadedClient], batch: int) -> list[np.ndarray]:
        """Play episodes of a round with the parameters with which clients would begin it; return the returns [E]."""
        evaluations = self.policies.evaluate(
            [client.name for client in clients],
            self._with_shared_blocks(self._parameters(clients), clients),
            [client.state for client in clients],
            clients[0].start.round,
            deterministic=False,
            compared=self.scenario.merge.episodes,
            batch=batch,
        )
        return [evaluation.scores for evaluation in evaluations]

    # Measuring

    def _measure(self, instructions: Mapping[str, Measure]) -> Iterator[tuple[str, Measured]]:
        clients = [self._load(name, each.start) for name, each in instructions.items()]
        for client in clients:
            if not self._can_measure(client, client.start.round):
                raise ValueError(
                    f"client {client.name}: it has no states of round {client.start.round} to measure on; it must have"
                    f" trained that round of {client.start.run} first, with its state in {self.state_store.folder}"
                )
        shared = [each.start.shared for each in instructions.values()]
        candidates = [each.candidate for each in instructions.values()]
        fractions = [each.fractions for each in instructions.values()]
        for client, kl in zip(clients, self._measure_kl(clients, shared, candidates, fractions), strict=True):
            yield client.name, Measured(kl)

    def _measure_last_step(self, clients: Sequence[LoadedClient]) -> dict[str, tuple[float, ...]]:
        """KL of the step from the shared blocks that the last round began with to those of this one, [1 + B] each.

        All blocks together, then each alone; only for clients that took part in the last round.
        """
        present = [client for client in clients if self._can_measure(client, client.start.round - 1)]
        shared = [client.remembered[ROUND_SHARED] for client in present]
        blocks = range(len(self.slices))
        fractions = [tuple([1.0] * len(blocks)), *(tuple(float(b == block) for b in blocks) for block in blocks)]
        candidates = [client.start.shared for client in present]
        measured = self._measure_kl(present, shared, candidates, [fractions] * len(present))
        return {client.name: kl for client, kl in zip(present, measured, strict=True)}

    def _can_measure(self, client: LoadedClient, round: int) -> bool:
        """Whether a client has measurement states of this round."""
        return client.remembers(round) and self.policies.can_measure(client.remembered)

    def _measure_kl(
        self,
        clients: Sequence[LoadedClient],
        shared: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray],
        fractions: Sequence[Sequence[StepFractions]],
    ) -> list[tuple[float, ...]]:
        """KL of steps from each client's policy with these shared blocks, [M] for each client.

        shared, candidates: [S] for each client: a step goes from the former towards the latter.
        fractions: M for each client, the part of the way that each block goes.
        """
        if not clients:
            return []
        parameters = self._parameters(clients)
        begins, ends = ([torch.from_numpy(np.array(vector)) for vector in each] for each in (shared, candidates))
        steps = [
            [
                interpolate(begin, end, self.slices, fraction)
                for begin, end, fraction in zip(begins, ends, of_clients, strict=True)
            ]
            for of_clients in zip(*fractions, strict=True)
        ]
        kl = self.policies.measure_kl(
            [client.remembered for client in clients],
            self._with_shared_blocks(parameters, clients, begins),
            (self._with_shared_blocks(parameters, clients, step) for step in steps),
        )
        largest = torch.finfo(kl.dtype).max
        return [tuple(row) for row in kl.nan_to_num(nan=largest, posinf=largest).T.tolist()]

    # Evaluating

    def _evaluate(self, instructions: Mapping[str, Evaluate]) -> Iterator[tuple[str, Evaluated]]:
        clients = [self._load(name, each.start) for name, each in instructions.items()]
        plans = [each.plan for each in instructions.values()]
        assert len({(plan.number, plan.deterministic) for plan in plans}) == 1, "all clients play the same episodes"
        summaries = self._evaluate_clients(clients, plans[0])
        for client, summary in zip(clients, summaries, strict=True):
            yield client.name, Evaluated(summary)

    def _evaluate_clients(self, clients: Sequence[LoadedClient], plan: EvaluationPlan) -> list[EvaluationSummary]:
        names, updates = [client.name for client in clients], self.scenario.evaluate.adapt
        parameters, states = self._evaluated_parameters(clients), self._evaluated_states(clients)
        evaluations = self.policies.evaluate(names, parameters, states, plan.number, plan.deterministic)
        adapted: list[tuple[float, ...]] = [()] * len(clients)
        if updates and plan.deterministic:
            adapted = adapted_returns(self.policies, names, parameters, states, plan.number, updates)
        return [summarise(evaluation, each) for evaluation, each in zip(evaluations, adapted, strict=True)]

    def _evaluated_parameters(self, clients: Sequence[LoadedClient]) -> Tensor:
        """The policies that clients are evaluated with, [K, P]: their second ones where they have them."""
        parameters = self._with_shared_blocks(self._parameters(clients), clients)
        if self.scenario.personal.model:
            trained = [row for row, client in enumerate(clients) if client.state is not None]
            if trained:
                names = [clients[row].name for row in trained]
                states = self._evaluated_states([clients[row] for row in trained])
                parameters[trained] = self.policies.parameters(names, states)
        return parameters

    def _evaluated_states(self, clients: Sequence[LoadedClient]) -> list[Arrays | None]:
        """The states of the policies that clients are evaluated with."""
        states = [client.state for client in clients]
        if not self.scenario.personal.model:
            return states
        return [None if state is None else sub_state(state, PERSONAL) for state in states]

    # What clients remember

    def _load(self, name: str, start: Start, until: int | None = None) -> LoadedClient:
        """A client with what it remembers of the rounds until this one, by default until the start's.

        The server may have accepted nothing of a client since the start's round while the client trained on, late or
        refused each time, and no longer has that state. Its earliest one is nearer to it than none.
        """
        last = start.round if until is None else until
        stored = self.state_store.load(start.run, name, before=last + 1)
        if stored is None and until is None and start.round:
            stored = self.state_store.earliest(start.run, name)
        return LoadedClient(name, start, stored)

    def _parameters(self, clients: Sequence[LoadedClient]) -> Tensor:
        """The clients' policies as they remember them, or the first ones, [K, P]."""
        return self.policies.parameters([client.name for client in clients], [client.state for client in clients])

    def _with_shared_blocks(
        self, parameters: Tensor, clients: Sequence[LoadedClient], shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """A copy of the clients' parameters [K, P] with shared blocks put in place, but for groups that departed.

        shared: [S] for each client; by default what its instruction begins with. A client without a state has no
        values of its own for a group that departed, and takes all.
        """
        given = shared or [torch.from_numpy(np.array(client.start.shared)) for client in clients]
        departed = [
            self.shared_blocks.columns_of_groups(() if client.state is None else client.start.departed)
            for client in clients
        ]
        device, placed = parameters.device, parameters.clone()
        placed[:, self.columns] = torch.where(
            torch.stack(departed).to(device), parameters[:, self.columns], torch.stack(list(given)).to(device)
        )
        return placed
