"""Learning without any federation: the control that a federation is held against, and the simplest use of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, final

import numpy as np

from grpo_fed.rl.records import TrainingReport
from grpo_fed.rl.stacked_learner import StackedLearner, make_learners
from grpo_fed.runs import checkpoint
from grpo_fed.runs import folder as journal
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.policies import save_policies
from grpo_fed.runs.recorder import Journal, Totals, status_of
from grpo_fed.runs.records import LENGTH, RETURN, ClientRecord, RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

Watch = Callable[[RoundRecord], None]


def train(scenario: Scenario, out: str | Path | None = None, watch: Watch = lambda note: None) -> Result:
    """Train every client on its own; write a run folder to `out`; tell `watch` of every round, the first being 0.

    ValueError for what is wrong with the scenario, before anything is written. Whatever stops the training after that,
    KeyboardInterrupt too, first finds the policies and `results.json` saved as they are.
    """
    with AloneEngine(scenario, out) as training:
        return training.run(watch)


def resume(folder: str | Path, watch: Watch = lambda note: None) -> Result:
    """Go on with a run that was stopped, from its latest checkpoint, to the very end that it would have had.

    ValueError if the folder holds no such run.
    """
    with AloneEngine.resumed(folder) as training:
        return training.run(watch)


@final
class AloneEngine:
    """A run that is ready to begin: to make one finds whatever is wrong before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path) -> Self:
        """The run that a folder holds, from its latest checkpoint on, or from its start if there is none yet."""
        folder = Path(folder)
        scenario, after = journal.open_unfinished(folder)
        if after is not None and after.shared is not None:
            raise ValueError(f"{folder}: holds a federation; `grpo-fed run --resume` goes on with it")
        return cls(scenario, folder, after)

    def __init__(self, scenario: Scenario, out: str | Path | None = None, after: Checkpoint | None = None) -> None:
        """A new run, or one that goes on `after` a checkpoint."""
        self.scenario = scenario
        self.folder = None if out is None else Path(out)
        self.after = after
        if self.folder is not None:
            journal.check_usable(self.folder)
        self.learners = make_learners(scenario)
        if after is not None:
            states = after.states()
            for fleet in self.learners:
                fleet.load([states[name] for name in fleet.names])
        self.result: Result | None = None
        """What became of it, as soon as it has ended, in whatever way."""

    @property
    def device(self) -> str:
        """What it computes on."""
        return str(self.learners[0].device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fleet in self.learners:
            fleet.close()

    def run(self, watch: Watch = lambda note: None) -> Result:
        """Play, train round by round, play again."""
        totals = Totals(self.scenario, str(self.learners[0].device))
        if self.after is None:
            written = Journal.open(self.folder, self.scenario)
        else:
            totals.load(self.after.counters)
            written = Journal.reopen(self.folder, self.after.round)
        try:
            for note in self._rounds(totals):
                totals.add(note)
                written.write(note)
                self._keep(totals)
                watch(note)
            totals.sampled = _evaluate(self.learners, deterministic=False)
        except BaseException as error:
            self._close(written, totals.result(status_of(error), self.folder, error))
            raise
        self._close(written, totals.result("finished", self.folder))
        assert self.result is not None
        return self.result

    def _rounds(self, totals: Totals) -> Iterator[RoundRecord]:
        """Round 0 is what there was before; the last one always plays."""
        scenario, every = self.scenario, self.scenario.evaluate.every
        if self.after is None:
            yield self._note(0, 0.0, 0, {}, _evaluate(self.learners, deterministic=True))
        for number in range(totals.rounds + 1, scenario.rounds + 1):
            began = time.perf_counter()
            progress = (number - 1) / scenario.rounds, number / scenario.rounds
            reports = [report for fleet in self.learners for report in fleet.train(scenario.steps, *progress)]
            seconds = time.perf_counter() - began
            plays = number == scenario.rounds or (every and number % every == 0)
            scores = _evaluate(self.learners, deterministic=True) if plays else {}
            env_steps = totals.env_steps + sum(report.steps for report in reports)
            yield self._note(number, seconds, env_steps, {report.client: report for report in reports}, scores)

    def _note(
        self,
        number: int,
        seconds: float,
        env_steps: int,
        reports: Mapping[str, TrainingReport],
        scores: Mapping[str, float],
    ) -> RoundRecord:
        entries = {name: settings.name for settings in self.scenario.clients for name in settings.names}
        names = [name for fleet in self.learners for name in fleet.names]
        clients = [_note(name, entries[name], reports.get(name), scores.get(name)) for name in names]
        return RoundRecord(number, self.scenario.rounds, seconds, env_steps, clients)

    def _keep(self, totals: Totals) -> None:
        """A checkpoint, if there is a folder and the round is one for it."""
        settings = self.scenario.checkpoint
        if self.folder is None or not totals.rounds or not settings.every or totals.rounds % settings.every:
            return
        states = {name: fleet.state(k) for fleet in self.learners for k, name in enumerate(fleet.names)}
        checkpoint.write(self.folder, Checkpoint(totals.rounds, totals.document(), states), settings.keep)

    def _close(self, written: Journal, result: Result) -> None:
        """The policies, but for those that diverged, then the results."""
        self.result = result
        if self.folder is not None:
            for fleet in self.learners:
                save_policies(self.folder, fleet)
        written.close(result)


def _evaluate(fleets: Sequence[StackedLearner], deterministic: bool) -> dict[str, float]:
    """By client, its mean return."""
    return {one.client: one.score for fleet in fleets for one in fleet.evaluate(deterministic=deterministic)}


def _note(client: str, entry: str, report: TrainingReport | None, score: float | None) -> ClientRecord:
    """What there is to say of a client that has trained, or has only played."""
    if report is None:
        return ClientRecord(client, entry, score=score)
    metrics = {f"losses/{name}": value for name, value in report.losses.items()}
    if report.episodes:
        metrics[RETURN] = float(np.mean([episode.score for episode in report.episodes]))
        metrics[LENGTH] = float(np.mean([episode.length for episode in report.episodes]))
    return ClientRecord(client, entry, report.steps, len(report.episodes), metrics, score)
