"""Learning without any federation: the control that a federation is held against, and the simplest use of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

from grpo_fed import checkpoint, journal
from grpo_fed.checkpoint import Checkpoint
from grpo_fed.fleet import Fleet, fleets_of
from grpo_fed.journal import ClientResult, Journal, Result, RoundNote, Status, mean_return
from grpo_fed.play import Evaluation
from grpo_fed.saved import scenario_of
from grpo_fed.scenario import Scenario

Watch = Callable[[RoundNote], None]


def train(scenario: Scenario, out: str | Path | None = None, watch: Watch = lambda note: None) -> Result:
    """Train every client on its own; write a run folder to `out`; tell `watch` of every round, the first being 0.

    ValueError for what is wrong with the scenario, before anything is written. Whatever stops the training after that,
    KeyboardInterrupt too, first finds the policies and `results.json` saved as they are.
    """
    with Training(scenario, out) as training:
        return training.run(watch)


def resume(folder: str | Path, watch: Watch = lambda note: None) -> Result:
    """Go on with a run that was stopped, from its latest checkpoint, to the very end that it would have had.

    ValueError if the folder holds no such run.
    """
    with Training.resumed(folder) as training:
        return training.run(watch)


@final
class Training:
    """A run that is ready to begin: to make one finds whatever is wrong before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path) -> Self:
        """The run that a folder holds, from its latest checkpoint on, or from its start if there is none yet."""
        folder = Path(folder)
        scenario = scenario_of(folder)
        journal.refuse_finished(folder)
        after = checkpoint.latest(folder)
        if after is None and not scenario.checkpoint.every:
            raise ValueError(f"{folder}: has no checkpoint to go on from, for its scenario has checkpoint.every = 0")
        return cls(scenario, folder, after)

    def __init__(self, scenario: Scenario, out: str | Path | None = None, after: Checkpoint | None = None) -> None:
        """A new run, or one that goes on `after` a checkpoint."""
        self.scenario = scenario
        self.folder = None if out is None else Path(out)
        self.after = after
        if self.folder is not None:
            journal.refuse_unusable(self.folder)
        self.fleets = fleets_of(scenario)
        if after is not None:
            for fleet in self.fleets:
                fleet.load([after.clients[name] for name in fleet.names])
        self.result: Result | None = None
        """What became of it, as soon as it has ended, in whatever way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fleet in self.fleets:
            fleet.close()

    def run(self, watch: Watch = lambda note: None) -> Result:
        """Play, train round by round, play again."""
        totals = _Totals(self.scenario, self.fleets)
        if self.after is None:
            written = Journal.open(self.folder, self.scenario)
        else:
            totals.load(self.after.notes)
            written = Journal.reopen(self.folder, self.after.round)
        try:
            for note in self._rounds(totals):
                totals.add(note)
                written.write(note)
                self._keep(totals)
                watch(note)
            totals.sampled = _scores(_evaluate(self.fleets, deterministic=False))
        except BaseException as error:
            status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.result = totals.result(status, self.folder, error)
            written.close(self.result, self.fleets)
            raise
        self.result = totals.result("finished", self.folder)
        written.close(self.result, self.fleets)
        return self.result

    def _rounds(self, totals: _Totals) -> Iterator[RoundNote]:
        """Round 0 is what there was before; the last one always plays."""
        scenario, every = self.scenario, self.scenario.evaluate.every
        if self.after is None:
            yield RoundNote(0, scenario.rounds, 0.0, 0, (), _evaluate(self.fleets, deterministic=True))
        env_steps = sum(totals.steps.values())
        for number in range(totals.rounds + 1, scenario.rounds + 1):
            began = time.perf_counter()
            progress = (number - 1) / scenario.rounds, number / scenario.rounds
            reports = [report for fleet in self.fleets for report in fleet.train(scenario.steps, *progress)]
            seconds = time.perf_counter() - began
            plays = number == scenario.rounds or (every and number % every == 0)
            evaluations = _evaluate(self.fleets, deterministic=True) if plays else ()
            env_steps += sum(report.steps for report in reports)
            yield RoundNote(number, scenario.rounds, seconds, env_steps, reports, evaluations)

    def _keep(self, totals: _Totals) -> None:
        """A checkpoint, if there is a folder and the round is one for it."""
        settings = self.scenario.checkpoint
        if self.folder is None or not totals.rounds or not settings.every or totals.rounds % settings.every:
            return
        states = {name: fleet.state(k) for fleet in self.fleets for k, name in enumerate(fleet.names)}
        checkpoint.write(self.folder, Checkpoint(totals.rounds, totals.document(), states), settings.keep)


def _evaluate(fleets: Sequence[Fleet], deterministic: bool) -> list[Evaluation]:
    return [one for fleet in fleets for one in fleet.evaluate(deterministic=deterministic)]


def _scores(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    return {evaluation.client: evaluation.score for evaluation in evaluations}


class _Totals:
    """What a run's rounds come to, from the first to where it is."""

    def __init__(self, scenario: Scenario, fleets: Sequence[Fleet]) -> None:
        self.scenario = scenario
        self.device = str(fleets[0].device)
        self.envs = {task.client: task.env for fleet in fleets for task in fleet.tasks}
        self.began = time.perf_counter()
        self.rounds = 0
        self.episodes = dict.fromkeys(self.envs, 0)
        self.steps = dict.fromkeys(self.envs, 0)
        self.best: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        """When they played last."""
        self.sampled: dict[str, float] = {}

    def document(self) -> dict[str, Any]:
        """What `load` needs; JSON."""
        kept = {name: getattr(self, name) for name in ("rounds", "episodes", "steps", "best", "first", "last")}
        return {**kept, "seconds": time.perf_counter() - self.began}

    def load(self, kept: Mapping[str, Any]) -> None:
        """Go on where `document` was."""
        for name in ("rounds", "episodes", "steps", "best", "first", "last"):
            setattr(self, name, kept[name])
        self.began = time.perf_counter() - kept["seconds"]

    def add(self, note: RoundNote) -> None:
        """One more round, or with number 0 what there was before."""
        self.rounds = note.round
        self.last = _scores(note.evaluations)
        if note.round == 0:
            self.first = self.last
        for report in note.reports:
            self.episodes[report.client] += len(report.episodes)
            self.steps[report.client] += report.steps
            mean = mean_return(report)
            if mean is not None:
                self.best[report.client] = max(mean, self.best.get(report.client, mean))

    def result(self, status: Status, out: Path | None, error: BaseException | None = None) -> Result:
        """The whole, with the clients in the scenario's order."""
        names = [name for settings in self.scenario.clients for name in settings.names]
        after = self.last if self.rounds == self.scenario.rounds else {}  # else they have learned since
        clients = {
            name: ClientResult(
                env=self.envs[name],
                before=self.first.get(name),
                after=after.get(name),
                sampled=self.sampled.get(name),
                best=self.best.get(name),
                episodes=self.episodes[name],
                env_steps=self.steps[name],
            )
            for name in names
        }
        return Result(
            scenario=self.scenario.name,
            seed=self.scenario.seed,
            device=self.device,
            status=status,
            error=None if error is None else f"{type(error).__name__}: {error}".rstrip(": "),
            rounds=self.rounds,
            seconds=time.perf_counter() - self.began,
            env_steps=sum(self.steps.values()),
            clients=clients,
            out=out,
        )
