"""The federation as the server runs it: round by round, over whatever carries messages.

`Federation._round` is the story: clients train, what they send is merged, the shared blocks go as far towards that as
proximity allows, clients play, and what happened is written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from grpo_fed.aggregation.merge.rules import check_rule
from grpo_fed.aggregation.proximity import StepFractions, adapt_budgets, full_step, interpolate
from grpo_fed.federation.ledger import Ledger, Watch
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.participation import ceil_fraction, sample_clients, wait_for_clients
from grpo_fed.federation.round_merge import MergeTarget, RoundMerge
from grpo_fed.federation.round_record import RoundOutcome
from grpo_fed.federation.server_state import ServerState, deduplicate
from grpo_fed.federation.server_step import Move, ServerStep, block_budgets, choose_step, with_measured_kl
from grpo_fed.federation.transport import Transport
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.folder import write_engine_state
from grpo_fed.runs.recorder import status_of
from grpo_fed.runs.records import Failure
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

ClientFiles = Callable[[int], Mapping[str, Path]]
"""Of a round: for every client the file with its state as it was then, which nobody writes to again."""
NOTHING = np.zeros(0, np.float32)


class QuorumLostError(RuntimeError):
    """Too few clients answered, for too many rounds in a row."""


@final
class Federation:
    """A federation that is ready to begin: to make one finds what is wrong with the server's side of the scenario."""

    def __init__(
        self,
        scenario: Scenario,
        commons: SharedBlocks,
        post: Transport,
        folder: Path | None = None,
        after: Checkpoint | None = None,
        fold: bool = False,
        client_files: ClientFiles | None = None,
        before_results: Callable[[Mapping[str, Start]], None] | None = None,
        engine: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """A new federation, or one that goes on `after` a checkpoint; a folder gets what a run leaves behind.

        fold: where a message costs seconds, clients play when they are told to train again, not on a message of its
        own. client_files: the clients in a checkpoint; none where each keeps its own. before_results: what else is to
        be saved, with where the clients stand, before the results are. engine: JSON that the engine wants to find again
        under `engine` in a checkpoint's notes. device: what the clients compute on, where that is known.
        """
        self.scenario, self.shared_blocks, self.transport, self.folder, self.evaluate_with_next_round = (
            scenario,
            commons,
            post,
            folder,
            fold,
        )
        self.client_files, self.before_results, self.engine = client_files, before_results, dict(engine or {})
        check_rule(scenario.merge, commons)
        self.first_budgets = block_budgets(scenario.proximity, commons)
        if after is None:
            self.state = ServerState.first(scenario.name, commons, self.first_budgets)
        else:
            self.state = ServerState.after(after, commons)
        self.ledger = Ledger(scenario, commons, post, folder, after, device)
        self.result: Result | None = None
        """What became of it, as soon as it has ended, in whatever way."""
        self._is_new = True
        self._rounds_below_quorum = 0
        """Rounds in a row below the quorum."""

    @property
    def starts(self) -> dict[str, Start]:
        """Where every client stands."""
        return {name: self.state.latest(name) for name in self.shared_blocks.clients}

    # The story -------------------------------------------------------------------------------------------------------

    def run(self, watch: Watch = lambda note: None) -> Result:
        """Play, train round by round, play again; tell `watch` of every round, the first being 0.

        Whatever stops it, KeyboardInterrupt too, first finds written down what has been done.
        """
        self.ledger.open(watch)
        write_engine_state(self.folder, self.engine)
        try:
            if self.state.round == 0:
                self._wait_for_clients()
                self._finish(RoundOutcome(0))
            while not self._is_over:
                self._round(self.state.round + 1)
            self.ledger.totals.sampled = self._evaluate(EvaluationPlan(self.state.round, deterministic=False))
        except BaseException as error:
            self._end(error)
            raise
        return self._end()

    def _round(self, number: int) -> None:
        """One round; without a quorum the shared blocks stay as they are."""
        clients = self._sample_clients(number)
        began = time.perf_counter()
        merging, replies = self._train(number, clients)
        if self.ledger.waits:
            self.ledger.complete(replies)
        last_kl = self._learn_from_the_last_step(replies, merging.weights)
        made: ServerStep | None = None
        notes: tuple[str, ...] = ()
        if self._is_quorum(len(replies), len(clients)):
            target = merging.target(torch.from_numpy(self.state.shared))
            self.state.departed |= target.departed
            self.state.clusters = dict(target.clusters) or self.state.clusters
            made, notes = self._step(number, target), target.notes
            self._move(target, made.accepted.alphas)
        self.state.round, self.state.last_step = number, None if made is None else made.accepted
        self._finish(RoundOutcome(number, time.perf_counter() - began, replies, made, last_kl, notes))
        if self._rounds_below_quorum >= self.scenario.round.patience:
            raise QuorumLostError(self._why_alone(number))

    def _finish(self, outcome: RoundOutcome) -> None:
        """Let clients play if it is time, and keep a checkpoint before anybody hears of the round."""
        number, every = outcome.round, self.scenario.evaluate.every
        plays = number == 0 or self._is_over or (every > 0 and number % every == 0)
        waits = plays and self.evaluate_with_next_round and not self._is_over
        scores = self._evaluate(EvaluationPlan(number)) if plays and not waits else {}
        self.ledger.note(outcome, self.state, scores, waits)
        self._save_checkpoint()
        if not waits:
            self.ledger.tell()

    @property
    def _is_over(self) -> bool:
        return self.state.round == self.scenario.rounds or self.ledger.enough

    # Who takes part --------------------------------------------------------------------------------------------------

    def _wait_for_clients(self) -> tuple[str, ...]:
        """At first everybody is waited for, later those who make a quorum."""
        settings, everybody = self.scenario.round, len(self.shared_blocks.clients)
        wanted = everybody if self._is_new else ceil_fraction(settings.quorum, everybody)
        self._is_new = False
        return wait_for_clients(self.transport.reachable, self.shared_blocks.clients, wanted, settings.deadline)

    def _sample_clients(self, number: int) -> list[str]:
        """Who cannot be reached is named."""
        self.ledger.failures = {}
        names = self._wait_for_clients()
        for name in sorted(set(self.shared_blocks.clients) - set(names)):
            self.ledger.miss(number, name, Failure("unreachable", "it was not connected when the round began"))
        return sample_clients(self.scenario, names, number)

    def _is_quorum(self, answers: int, drawn: int) -> bool:
        """Whether so many answers are enough for a merge."""
        enough = answers >= ceil_fraction(self.scenario.round.quorum, drawn)
        self._rounds_below_quorum = 0 if enough else self._rounds_below_quorum + 1
        return enough

    def _why_alone(self, number: int) -> str:
        failures = self.ledger.failures
        some = "; ".join(f"{name} {one.kind}: {one.reason}" for name, one in list(failures.items())[:3])
        return (
            f"too few answers in rounds {number - self._rounds_below_quorum + 1} to {number}: round.quorum ="
            f" {self.scenario.round.quorum:g} of those drawn must answer, and round.patience = {self._rounds_below_quorum} rounds"
            f" have gone by; {some}{f' and {len(failures) - 3} more' if len(failures) > 3 else ''}"
        )

    # What clients do -------------------------------------------------------------------------------------------------

    def _train(self, number: int, clients: Sequence[str]) -> tuple[RoundMerge, dict[str, Trained]]:
        """What they send goes into the merge at once; what they say of themselves stays."""
        begin, end = (number - 1) / self.scenario.rounds, number / self.scenario.rounds
        back = (
            self.scenario.proximity.mode == "quadratic"
            and self.state.last_step is not None
            and self.shared_blocks.size > 0
        )
        first = EvaluationPlan(number - 1) if self.ledger.waits else None
        told = {name: Train(self.state.start(name, number), begin, end, back, first) for name in clients}
        merging, replies = RoundMerge(self.scenario, self.shared_blocks), {}
        for name, answer in self._ask(number, told):
            assert isinstance(answer, Trained)
            merging.add(name, answer)
            replies[name] = replace(answer, point=NOTHING, fisher=None)
            self.state.trained[name] = number
        return merging, replies

    def _evaluate(self, play: EvaluationPlan) -> dict[str, float]:
        """By client, the mean return with what the latest round made."""
        told = {name: Evaluate(self.state.latest(name), play) for name in self.transport.reachable()}
        answers = self._ask(self.state.round, told)
        return {name: answer.played.mean for name, answer in answers if isinstance(answer, Evaluated)}

    def _measure(
        self, number: int, candidates: Mapping[str, np.ndarray], trials: Sequence[StepFractions]
    ) -> dict[str, StepFractions]:
        """By client, the KL [M] of the trials on the way to its candidate."""
        told = {
            name: Measure(self.state.start(name, number), point, tuple(trials)) for name, point in candidates.items()
        }
        answers = self._ask(number, told)
        return {name: answer.kl for name, answer in answers if isinstance(answer, Measured)}

    def _ask(self, number: int, told: Mapping[str, Instruction]) -> Iterator[tuple[str, Answer]]:
        """Those that answer; who does not is named."""
        if not told:
            return
        for name, answer in self.transport.send(told, self.scenario.round.deadline):
            if isinstance(answer, Failure):
                self.ledger.miss(number, name, answer)
            else:
                yield name, answer

    # What the server makes of it -------------------------------------------------------------------------------------

    def _step(self, number: int, target: MergeTarget) -> ServerStep:
        """How far to go: the server's own arithmetic, or a dialogue with the clients that replied."""
        if not self.shared_blocks.size:
            return ServerStep(full_step(()))
        common, own = target.point.numpy(), deduplicate(target.points)
        ways = [Move(self.state.shared_of(name), to, target.weights[name]) for name, to in target.points.items()]

        def measure(names: Sequence[str], trials: Sequence[StepFractions]) -> Mapping[str, Sequence[float]]:
            return self._measure(number, {name: own.get(name, common) for name in names}, trials)

        return choose_step(
            self.scenario.proximity,
            self.state.budgets,
            self.shared_blocks,
            ways or [Move(torch.from_numpy(self.state.shared), target.point, 1.0)],
            target,
            measure,
        )

    def _move(self, target: MergeTarget, alphas: StepFractions) -> None:
        """The shared blocks s <- s + alpha (s* - s); those of a client in a cluster go their own way."""
        blocks, position = list(self.shared_blocks.slices.values()), self.state
        going = {
            name: interpolate(position.shared_of(name), point, blocks, alphas) for name, point in target.points.items()
        }
        position.cluster_points = deduplicate(
            {**{name: position.shared_of(name) for name in position.cluster_points}, **going}
        )
        position.shared = interpolate(torch.from_numpy(position.shared), target.point, blocks, alphas).numpy()

    def _learn_from_the_last_step(
        self, replies: Mapping[str, Trained], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """What clients know of it by now: its KL, if that was only predicted, and whether they gained by it."""
        position, settings = self.state, self.scenario.proximity
        if position.last_step is None:
            return {}
        seen = with_measured_kl(position.last_step, replies, weights, settings.over)
        if settings.adaptive:
            gains = [reply.gain / reply.spread for reply in replies.values() if reply.spread > 0]
            position.budgets = adapt_budgets(position.budgets, self.first_budgets, seen or position.last_step, gains)
        found = {} if seen is None else {"joint": seen.joint, **{block.block: block.kl for block in seen.blocks}}
        return {name: kl for name, kl in found.items() if kl is not None}

    # What is left of it ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """A checkpoint, if there is a folder and the round is one for it."""
        settings, number = self.scenario.checkpoint, self.state.round
        if self.folder is None or not number or not settings.every or number % settings.every:
            return
        own = {"position": self.state.to_json(), "ledger": self.ledger.noted(), "engine": self.engine}
        notes = {**self.ledger.totals.document(), **own}
        files = {} if self.client_files is None else self.client_files(number)
        best = None if self.ledger.best is None else self.ledger.best[0]
        shared = self.state.arrays(self.shared_blocks)
        checkpoint.write(self.folder, Checkpoint(number, notes, files=files, shared=shared), settings.keep, best)

    def _end(self, error: BaseException | None = None) -> Result:
        """The results last of all, so that who finds them finds everything."""
        self.result = self.ledger.settle(status_of(error), self.state, error)
        if self.before_results is not None:
            self.before_results(self.starts)
        self.ledger.close(self.result)
        return self.result
