"""The federation as the server runs it: round by round, over any transport.

`Federation._round` is the story: sample clients, let them train, merge what they send, step within the KL budgets,
evaluate, record the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

from grpo_fed.callbacks.control import SavePolicies
from grpo_fed.federation.arrivals import Arrivals, RealTime
from grpo_fed.federation.buffer import AnswerBuffer
from grpo_fed.federation.conversation import Conversation
from grpo_fed.federation.evaluations import absurd_scores, accept_evaluations
from grpo_fed.federation.hostile import ColludingTransport, refuse_collusion
from grpo_fed.federation.messages import EvaluationPlan, EvaluationSummary, Start, Train, Trained
from grpo_fed.federation.moments import RunMoments
from grpo_fed.federation.pace import MICROSECONDS, Paces
from grpo_fed.federation.participation import Attendance, RunPausedError, check_quorum, has_quorum, sample_clients
from grpo_fed.federation.round_record import (
    RoundOutcome,
    Traffic,
    make_round_record,
    name_clusters,
    name_groups,
    note_lost_state,
)
from grpo_fed.federation.secure_round import SecureRound
from grpo_fed.federation.server import Aggregation
from grpo_fed.federation.server_state import ServerState
from grpo_fed.federation.sites import SiteTree, make_server
from grpo_fed.federation.stopping import EarlyStopping
from grpo_fed.federation.trained_round import TrainedRound
from grpo_fed.federation.transport import Transport
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.continuation import CALLBACKS
from grpo_fed.runs.evaluations import Evaluations, with_evaluations
from grpo_fed.runs.folder import check_usable, write_engine_state
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.privacy import explain_spent_budget
from grpo_fed.runs.recorder import CheckpointContent, Recorder, Watch
from grpo_fed.runs.records import Failure
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

ClientFiles = Callable[[int], Mapping[str, Path]]
"""A function that finds every client's file with its state after a round; the file is never written to again."""
UNREACHABLE = Failure("unreachable", "it was not connected when the round began")


@final
class Federation:
    """Runs a federation. Making one checks the server's side of the scenario before anything is sent or written."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        transport: Transport,
        folder: Path | None = None,
        after: Checkpoint | None = None,
        evaluate_with_next_round: bool = False,
        client_files: ClientFiles | None = None,
        before_results: Callable[[Mapping[str, Start]], Mapping[str, str]] | None = None,
        engine: Mapping[str, Any] | None = None,
        device: str | None = None,
        arrivals: Arrivals | None = None,
        callbacks: Sequence[object] = (),
        save_policies: SavePolicies | None = None,
        pauses: Callable[[int], bool] = lambda round: False,
    ) -> None:
        """Prepare a new federation, or one that goes on `after` a checkpoint. Nothing is written yet.

        folder: the run's folder; None writes nothing.
        evaluate_with_next_round: clients evaluate with the next round's training, not on a message of its own; for
            transports where a message costs seconds.
        client_files: the clients' states for a checkpoint; None where each client keeps its own.
        before_results: is called with every client's start before the results are written; returns the clients whose
            policies could not be saved, with the reason.
        engine: JSON that the engine finds again as `engine` in a checkpoint's parts.
        device: what the clients compute on, where that is known.
        arrivals: whose answers come next with `round.mode = "buffered"`; by default as they come in real time.
        pauses: whether to raise RunPausedError after a round, whose checkpoint another federation goes on from.
        callbacks: objects beside those that the scenario names. save_policies: as for `callbacks.RunControl`.
        """
        if folder is not None:
            check_usable(folder)
        if not isinstance(transport, ColludingTransport):
            refuse_collusion(scenario, "this transport")
        self.scenario, self.shared_blocks, self.transport, self.folder = scenario, shared_blocks, transport, folder
        self.evaluate_with_next_round = evaluate_with_next_round
        self.client_files, self.before_results, self.engine = client_files, before_results, dict(engine or {})
        self.pauses = pauses
        self.server = make_server(scenario, shared_blocks, after)
        self.moments = RunMoments(scenario, shared_blocks, self.server, folder, callbacks, save_policies, after)
        all_clients, training = shared_blocks.clients, shared_blocks.training_clients
        self.attendance = Attendance(scenario.round, all_clients, training, transport.reachable)
        self.recorder = Recorder(scenario, folder, device or scenario.device, scenario.method, after)
        self.conversation = Conversation(transport, self.recorder, scenario.round.deadline)
        self.paces = Paces(scenario)
        self._has_virtual_time = arrivals is not None and self.paces.matter
        self._clock = 0 if after is None else after.part("clock", int)
        self.buffer: AnswerBuffer | None = None
        """The work of clients that the server does not wait for; None if it waits for all."""
        if scenario.round.mode == "buffered":
            self.buffer = AnswerBuffer(scenario, shared_blocks, arrivals or RealTime(transport), folder, after)
        self.stopping = EarlyStopping() if after is None else after.part("stopping", EarlyStopping)
        self.result: Result | None = None
        """What became of the run, once it has ended, however it ended."""
        self.notes = [] if after is None else [*after.passed_over]
        """Messages for a person that the next record gets."""
        self._rounds_below_quorum = 0 if after is None else after.part("rounds_below_quorum", int)
        """The latest rounds in a row without a quorum."""
        self._recorded_bytes = self.recorder.totals.bytes_up, self.recorder.totals.bytes_down

    @property
    def state(self) -> ServerState:
        """The server's state between two rounds."""
        return self.server.state

    @property
    def starts(self) -> dict[str, Start]:
        """Every client's start with its latest state."""
        return {name: self._latest(name) for name in self.shared_blocks.clients}

    def _latest(self, client: str) -> Start:
        """Return a client's start with its latest state."""
        return self.server.state_of(client).latest(client)

    # The story -------------------------------------------------------------------------------------------------------

    def run(self, watch: Watch = lambda record: None) -> Result:
        """Evaluate, train round by round, evaluate again; call `watch` with every round's record, the first being 0.

        Whatever stops the run, KeyboardInterrupt included, the results so far are written first.
        """
        self.recorder.open(watch, self.shared_blocks.names)
        write_engine_state(self.folder, self.engine)
        if self.buffer is not None:
            self.buffer.open()
        try:
            self.moments.run_start()
            if self.state.round == 0:
                self._begin()
            while not self._is_over:
                if self.state.round and self.pauses(self.state.round):
                    raise RunPausedError
                self._round(self.state.round + 1)
            sampled = self._evaluate(EvaluationPlan(self.state.round, deterministic=False), {})
        except RunPausedError:
            raise
        except BaseException as error:
            self._end(error)
            raise
        return self._end(sampled=sampled.scores)

    def _begin(self) -> None:
        """Wait for the clients, and evaluate them before the first round."""
        self.attendance.wait()
        self._finish_round(RoundOutcome(0))

    def _round(self, round: int) -> None:
        """Train one round; without a quorum the shared blocks stay as they are."""
        failures: dict[str, Failure] = {}
        self.moments.round_start(round)
        self._compare_sites(round, failures)
        trained = self._train(round, failures) if self.buffer is None else self._collect(self.buffer, round, failures)
        self._refuse_absurd_returns(trained.replies, failures)
        self._complete_last_round(trained.replies)
        if trained.batch is not None and trained.batch.first_evaluations:
            self.recorder.first_scores_arrived(self._accept(trained.batch.first_evaluations, {}))
        self.moments.clients_trained(trained)
        self.server.steer(trained.replies)
        last_kl = self.server.observe_last_step(trained.replies, trained.merge)
        aggregation: Aggregation | None = None
        if trained.problem is None and has_quorum(self.scenario, len(trained.replies), trained.expected):
            measure = self.conversation.measure(round, self._latest, failures)
            aggregation = self.server.aggregate(trained.merge, measure, trained.length)
            self.moments.merged(trained, aggregation)
        else:
            self.server.skip_merge()
        if self.buffer is not None and trained.batch is not None:
            self.buffer.finish(round, trained.batch, self.state.last_step, self.state.shared)
        self.state.round = round
        self._rounds_below_quorum = 0 if aggregation is not None else self._rounds_below_quorum + 1
        seconds = time.perf_counter() - trained.began
        virtual_seconds = self._clock / MICROSECONDS if self._has_virtual_time else None
        outcome = RoundOutcome(
            round, seconds, trained.replies, aggregation, last_kl, failures, virtual_seconds=virtual_seconds
        )
        if trained.batch is not None:
            outcome = replace(outcome, ages=trained.batch.ages, length=trained.length)
        self._finish_round(outcome)
        check_quorum(self.scenario.round, self._rounds_below_quorum, round, failures)

    def _finish_round(self, outcome: RoundOutcome) -> None:
        """Evaluate if it is time, and record the round: a checkpoint first, then its line."""
        is_evaluated = self._is_evaluated(outcome.round)
        waits = is_evaluated and self.evaluate_with_next_round and not self._is_over
        failures = dict(outcome.failures)
        evaluations = Evaluations()
        if is_evaluated and not waits:
            evaluations = self._evaluate(EvaluationPlan(outcome.round), failures)
            self._observe_scores(outcome.round, evaluations.scores)
        outcome = replace(outcome, failures=failures, evaluations=evaluations, notes=tuple(self.notes))
        self.notes.clear()
        traffic = self._count_traffic()
        record = make_round_record(
            outcome, self.scenario, self.shared_blocks, self.server, self.recorder.env_steps, traffic
        )
        record = self.moments.round_waits(record) if waits else self.moments.round_end(record)
        if self._is_over and not is_evaluated:  # a callback has ended the run with this very round
            evaluations = self._evaluate(EvaluationPlan(outcome.round), {})
            record = with_evaluations(record, evaluations)
        self.recorder.round_finished(record, self._checkpoint_content, waits)

    def _complete_last_round(self, replies: Mapping[str, Trained]) -> None:
        """Record the evaluations of the last round that came with this round's answers.

        Clients that take no part in training are evaluated now: the shared blocks are still those of the last round.
        """
        if self.recorder.waits:
            summaries = {name: reply.evaluation for name, reply in replies.items() if reply.evaluation is not None}
            held_out = set(self.shared_blocks.held_out).intersection(self.transport.reachable())
            summaries |= self._summaries(sorted(held_out), EvaluationPlan(self.state.round), {})
            evaluations = self._accept(summaries, {})
            record = self.recorder.scores_arrived(evaluations, self.moments.round_end)
            self._observe_scores(record.round, record.scores)

    def _observe_scores(self, round: int, scores: Mapping[str, float]) -> None:
        """Let the clients that take part in training decide whether the run ends early."""
        held_out = self.shared_blocks.held_out
        trained = {name: score for name, score in scores.items() if name not in held_out}
        self.stopping.observe(self.scenario, round, trained)

    def _is_evaluated(self, round: int) -> bool:
        every, is_told = self.scenario.evaluate.every, self.scenario.privacy.metrics == "all"
        return self._is_over or (is_told and (round == 0 or (every > 0 and round % every == 0)))

    @property
    def _is_over(self) -> bool:
        return self.state.round == self.scenario.rounds or self.stopping.is_due or self._stop_reason is not None

    @property
    def _stop_reason(self) -> str | None:
        return self.moments.stop_reason or explain_spent_budget(self.server.privacy)

    # Who takes part --------------------------------------------------------------------------------------------------

    def _sample_clients(self, round: int, failures: dict[str, Failure]) -> list[str]:
        """Choose the round's clients among those that can be reached; the others fail."""
        reachable = self.attendance.wait()
        for name in sorted({*self.shared_blocks.training_clients} - {*reachable}):
            self.conversation.client_failed(round, name, UNREACHABLE, failures)
        return sample_clients(self.scenario, reachable, round)

    # What clients do -------------------------------------------------------------------------------------------------

    def _train(self, round: int, failures: dict[str, Failure]) -> TrainedRound:
        """Let sampled clients train, and wait for all; their vectors go into the merge as they arrive."""
        clients = self._sample_clients(round, failures)
        trained = TrainedRound(self.server.begin_merge(), len(clients))
        begin, end = (round - 1) / self.scenario.rounds, round / self.scenario.rounds
        plan = EvaluationPlan(round - 1) if self.recorder.waits else None
        asked, levels = self.server.asked, self.server.curricula
        starts = {name: self.server.state_of(name).start(name, round) for name in clients}
        measures, rate = self._measures_last_step, self.moments.rate
        instructions = {
            name: Train(start, begin, end, measures, plan, asked.get(name, ()), levels.get(name, ()), rate)
            for name, start in starts.items()
        }
        ask = partial(self.conversation.ask, round, failures=failures)
        with SecureRound.around(trained, starts, ask, self.notes) as secure:
            for name, answer in ask(instructions if secure is None else secure.agree(instructions)):
                assert isinstance(answer, Trained)
                self._add(trained, name, answer, round)
        self._clock += max((self.paces.duration(name, round) for name in trained.replies), default=0)
        return trained

    def _collect(self, buffer: AnswerBuffer, round: int, failures: dict[str, Failure]) -> TrainedRound:
        """Give work to clients that have none, and wait until enough have answered; the others work on."""
        reachable = self.attendance.wait()
        for name in sorted({*self.shared_blocks.training_clients} - {*reachable} - buffer.busy):
            self.conversation.client_failed(round, name, UNREACHABLE, failures)
        trained = TrainedRound(self.server.begin_merge(), buffer.size)
        buffer.assign(round, self.state, reachable, self._measures_last_step, self.recorder.waits, self.moments.rate)
        trained.batch = batch = buffer.gather(round, self.state)
        for name, failure in batch.failures.items():
            self.conversation.client_failed(round, name, failure, failures)
        for each in batch.arrivals:
            self._add(trained, each.client, each.answer, each.number, each.weight)
        trained.length, self._clock = batch.length, buffer.work.state.clock
        return trained

    @property
    def _measures_last_step(self) -> bool:
        """Whether clients measure the KL of the last step before they train."""
        quadratic = self.scenario.proximity.mode == "quadratic"
        return quadratic and self.state.last_step is not None and self.shared_blocks.size > 0

    def _add(self, trained: TrainedRound, name: str, answer: Trained, number: int, weight: float = 1.0) -> None:
        trained.add(name, answer, weight)
        trained_in = self.server.state_of(name).trained
        self.notes += note_lost_state(name, answer, number, trained_in.get(name, 0))
        trained_in[name] = number

    def _refuse_absurd_returns(self, replies: dict[str, Trained], failures: dict[str, Failure]) -> None:
        """Leave out mean returns of training that are of no scale that the others' have."""
        means = {name: reply.metrics.get(TRAINING_RETURN, 0.0) for name, reply in replies.items()}
        for name in means.keys() - self._refuse_absurd(means, failures).keys():
            others = {key: value for key, value in replies[name].metrics.items() if key != TRAINING_RETURN}
            replies[name] = replace(replies[name], metrics=others)

    def _evaluate(self, plan: EvaluationPlan, failures: dict[str, Failure]) -> Evaluations:
        """Evaluate all reachable clients with their latest state."""
        return self._accept(self._summaries(self.transport.reachable(), plan, failures), failures)

    def _summaries(
        self, clients: Iterable[str], plan: EvaluationPlan, failures: dict[str, Failure]
    ) -> dict[str, EvaluationSummary]:
        starts = {name: self._latest(name) for name in clients}
        return self.conversation.evaluate(self.state.round, starts, plan, failures)

    def _compare_sites(self, round: int, failures: dict[str, Failure]) -> None:
        """Let sites that are to leave something, or to come back to it, compare by playing."""
        if not isinstance(self.server, SiteTree):
            return
        plan = EvaluationPlan(round - 1, deterministic=False)

        def play(starts: Mapping[str, Start]) -> Mapping[str, EvaluationSummary]:
            reachable = {*self.transport.reachable()}
            present = {name: start for name, start in starts.items() if name in reachable}
            return self.conversation.evaluate(round, present, plan, failures)

        self.server.begin_round(play)

    def _accept(self, summaries: Mapping[str, EvaluationSummary], failures: dict[str, Failure]) -> Evaluations:
        """Leave out evaluations of no scale that the others' have, before adaptation or after."""
        largest = {name: max((each.mean, *each.adapted), key=abs) for name, each in summaries.items()}
        return accept_evaluations(summaries, self._refuse_absurd(largest, failures))

    def _refuse_absurd(self, scores: Mapping[str, float], failures: dict[str, Failure]) -> dict[str, float]:
        """Leave out mean returns that are of no scale that the others' have; their clients fail."""
        refused = absurd_scores(scores)
        for name, failure in refused.items():
            self.conversation.client_failed(self.state.round, name, failure, failures)
        return {name: score for name, score in scores.items() if name not in refused}

    # What is recorded ------------------------------------------------------------------------------------------------

    def _count_traffic(self) -> Traffic:
        """Count the bytes since the last round's record."""
        self.recorder.count_bytes(self.transport.bytes_up, self.transport.bytes_down)
        up, down = self.recorder.totals.bytes_up, self.recorder.totals.bytes_down
        before_up, before_down = self._recorded_bytes
        self._recorded_bytes = up, down
        return Traffic(up - before_up, down - before_down, up + down)

    def _checkpoint_content(self) -> CheckpointContent:
        round = self.state.round
        best = self.stopping.best
        return CheckpointContent(
            parts={
                **self.server.parts(),
                "stopping": self.stopping,
                "rounds_below_quorum": self._rounds_below_quorum,
                "engine": self.engine,
                "clock": self._clock,
                CALLBACKS: self.moments.saved,
                **({} if self.buffer is None else {"buffer": self.buffer.work.state}),
            },
            files={} if self.client_files is None else self.client_files(round),
            shared=self.server.arrays() | ({} if self.buffer is None else self.buffer.work.arrays()),
            best=None if best is None else best[0],
        )

    def _end(self, error: BaseException | None = None, sampled: Mapping[str, float] | None = None) -> Result:
        """Write the results, and return them."""
        self.recorder.count_bytes(self.transport.bytes_up, self.transport.bytes_down)
        blocks, states = self.shared_blocks, {name: self.server.state_of(name) for name in self.shared_blocks.clients}
        before_results = self.before_results
        self.result = self.recorder.finish(
            error,
            sampled,
            departed={name: name_groups(blocks, state.departed.get(name, ())) for name, state in states.items()},
            clusters={name: name_clusters(blocks, state.clusters.get(name)) for name, state in states.items()},
            before_results=dict if before_results is None else (lambda: before_results(self.starts)),
            reason=self._stop_reason,
            privacy=self.server.privacy,
        )
        self.moments.run_end(self.result, error)
        return self.result
