"""Training without a federation, every client by itself: the control that a federation is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self, final

from grpo_fed.federation.steering import steered_curricula
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.language.examples import make_examples
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.learner import Learner
from grpo_fed.rl.make import make_learner, make_learners
from grpo_fed.rl.records import TrainingReport
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.evaluations import Evaluations
from grpo_fed.runs.examples import write_examples
from grpo_fed.runs.folder import check_usable, claim_folder, open_unfinished, reclaim_folder
from grpo_fed.runs.policies import save_policies
from grpo_fed.runs.recorder import CheckpointContent, Recorder, Watch
from grpo_fed.runs.records import ClientRecord, RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.importing import describe_exception
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import scales_of


def train(
    scenario: Scenario, out: str | Path | None = None, watch: Watch = lambda record: None, replace: bool = False
) -> Result:
    """Train every client by itself; write a run's folder to `out`; call `watch` with every round's record, the first
    being 0.

    replace: whether a run that `out` holds may be removed. ValueError for a mistake in the scenario, before anything is
    written. Whatever stops the training later, KeyboardInterrupt included, policies and results are saved first.
    """
    with AloneEngine(scenario, out, replace=replace) as engine:
        return engine.run(watch)


@final
class AloneEngine:
    """Trains every client by itself. Making one finds every mistake before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path) -> Self:
        """Prepare to go on with the run in a folder, from its latest checkpoint, or from its start if there is none."""
        folder = Path(folder)
        scenario, after = open_unfinished(folder)
        if after is not None and after.shared is not None:
            raise ValueError(f"{folder}: holds a federation; `grpo-fed run --resume` goes on with it")
        return cls(scenario, folder, after, goes_on=True)

    def __init__(
        self,
        scenario: Scenario,
        out: str | Path | None = None,
        after: Checkpoint | None = None,
        replace: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Prepare a new run, or one that goes on `after` a checkpoint.

        replace: whether a run that `out` holds may be removed. goes_on: whether `out` holds this very run.
        """
        _check_set_up(scenario)
        self.scenario = scenario
        self.folder = None if out is None else Path(out)
        self.result: Result | None = None
        """What became of the run, once it has ended, however it ended."""
        with ExitStack() as stack:
            if self.folder is not None:
                check_usable(self.folder)
            self.learners = make_learners(scenario)
            stack.callback(self._close_learners)
            self.first_tasks = [learner.tasks for learner in self.learners]
            """The tasks that the clients of each learner begin with."""
            self.recorder = Recorder(scenario, self.folder, self.device, after=after)
            if after is not None:
                self._change_tasks(after.round)
                self._load(after)
            if self.folder is not None:
                claim = reclaim_folder(self.folder) if goes_on else claim_folder(self.folder, replace)
                stack.enter_context(claim)
            self._stack = stack.pop_all()

    @property
    def device(self) -> str:
        """The device that the learners compute on."""
        return str(resolve_device(self.scenario.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, watch: Watch = lambda record: None) -> Result:
        """Evaluate, train round by round, evaluate again."""
        self.recorder.open(watch)
        try:
            for record in self._rounds():
                self.recorder.round_finished(record, self._checkpoint_content)
            sampled = _evaluate(self.learners, deterministic=False).scores
            self._write_examples()
        except BaseException as error:
            self.result = self.recorder.finish(error, before_results=self._save_policies)
            raise
        self.result = self.recorder.finish(sampled=sampled, before_results=self._save_policies)
        return self.result

    def _load(self, after: Checkpoint) -> None:
        """Take up the clients' states of a checkpoint; ValueError if they do not fit."""
        states = after.states()
        for learner in self.learners:
            try:
                learner.load([states[name] for name in learner.names])
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"{after.folder}: the states of {', '.join(learner.names)} do not fit the scenario:"
                    f" {describe_exception(error)}; start the run again with --out and --replace"
                ) from error

    def _change_tasks(self, round: int) -> None:
        """Replace learners of other tasks than their clients have in a round by ones that go on from their states."""
        for index, (learner, first_tasks) in enumerate(zip(self.learners, self.first_tasks, strict=True)):
            tasks = tuple(task.at(round) for task in first_tasks)
            if tasks != learner.tasks:
                self.learners[index] = make_learner(tasks, self.scenario)
                self.learners[index].load([learner.state(row) for row in range(len(tasks))])
                learner.close()

    def _close_learners(self) -> None:
        for learner in self.learners:
            learner.close()

    def _rounds(self) -> Iterator[RoundRecord]:
        """Train round by round, and yield the records; round 0 is the evaluation before training."""
        scenario, every = self.scenario, self.scenario.evaluate.every
        if self.recorder.after is None:
            yield self._record(0, 0.0, {}, _evaluate(self.learners, deterministic=True))
        for round in range(self.recorder.totals.rounds + 1, scenario.rounds + 1):
            self._change_tasks(round)
            began = time.perf_counter()
            progress = (round - 1) / scenario.rounds, round / scenario.rounds
            reports = [report for learner in self.learners for report in learner.train(scenario.steps, *progress)]
            seconds = time.perf_counter() - began
            is_evaluated = round == scenario.rounds or (every > 0 and round % every == 0)
            scores = _evaluate(self.learners, deterministic=True) if is_evaluated else Evaluations()
            yield self._record(round, seconds, {report.client: report for report in reports}, scores)

    def _record(
        self, round: int, seconds: float, reports: Mapping[str, TrainingReport], played: Evaluations
    ) -> RoundRecord:
        """Make a round's record. reports, played: of the clients that have trained, and were evaluated."""
        entries = {name: settings.name for settings in self.scenario.clients for name in settings.names}
        clients = [
            _client_record(name, entries[name], reports.get(name), played)
            for learner in self.learners
            for name in learner.names
        ]
        env_steps = self.recorder.env_steps + sum(report.steps for report in reports.values())
        scales = scales_of(self.scenario)
        return RoundRecord(round, self.scenario.rounds, seconds, env_steps, clients, scales=scales)

    def _checkpoint_content(self) -> CheckpointContent:
        """Collect the learners' states."""
        states = {name: learner.state(row) for learner in self.learners for row, name in enumerate(learner.names)}
        return CheckpointContent({}, clients=states)

    def _save_policies(self) -> dict[str, str]:
        """Save the policies, except those that diverged; return why for those that could not be saved."""
        problems: dict[str, str] = {}
        if self.folder is not None:
            for learner in self.learners:
                problems |= save_policies(self.folder, learner)
        return problems

    def _write_examples(self) -> None:
        """Write what clients with prompts answered before and after training."""
        if self.folder is None:
            return
        for learner in self.learners:
            if isinstance(learner, LanguageLearner):
                for texts, parameters in zip(learner.texts, learner.parameters, strict=True):
                    examples = make_examples(learner.model, texts, self.scenario, parameters)
                    write_examples(self.folder, texts.task.client, examples)


def _check_set_up(scenario: Scenario) -> None:
    """ValueError for settings that clients without a server do not have."""
    cure = 'use grpo-fed run, with method = "local" to share nothing'
    for entry in scenario.clients:
        if not entry.trains:
            raise ValueError(f"clients.{entry.name}.trains = false is for a federation; {cure}")
    if steered_curricula(scenario):
        raise ValueError(f'curriculum.by = "server" is for a federation; use curriculum.by = "client", or {cure}')
    if scenario.callbacks:
        raise ValueError(f"callbacks are called by a federation's server; {cure}")
    if scenario.evaluate.adapt:
        raise ValueError(f"evaluate.adapt = {scenario.evaluate.adapt} is for a federation; {cure}")


def _evaluate(learners: Sequence[Learner], deterministic: bool) -> Evaluations:
    """Evaluate every client."""
    played = [each for learner in learners for each in learner.evaluate(deterministic=deterministic)]
    return Evaluations(
        {each.client: each.score for each in played},
        costs={each.client: each.cost for each in played if each.cost is not None},
    )


def _client_record(client: str, entry: str, report: TrainingReport | None, played: Evaluations) -> ClientRecord:
    """Make the record of a client that has trained, or was only evaluated."""
    score, cost = played.scores.get(client), played.costs.get(client)
    if report is None:
        return ClientRecord(client, entry, score=score, cost=cost)
    return ClientRecord(client, entry, report.steps, len(report.episodes), report.metrics(), score, cost=cost)
