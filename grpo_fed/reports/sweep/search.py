"""Values that Optuna chooses: each trial trains one seed after another, and is pruned by the rounds of the first.

The study is a journal in the sweep's folder, so a sweep that was stopped goes on, and several processes may share it. A
trial belongs to the process that holds its lock; one whose process was killed is taken up by another, where its runs
go on from their checkpoints.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from grpo_fed.reports.sweep.grid import LOG, Watch, check_folder
from grpo_fed.reports.sweep.page import SweepResult, rank_points, write_sweep
from grpo_fed.reports.sweep.points import SweptRun, make_run
from grpo_fed.reports.sweep.pool import RunPool, WorkerProcess, count_processes
from grpo_fed.reports.sweep.values import Axis, Space, check_keys
from grpo_fed.runs.tracking.groups import RunGroup, finish_group, open_group
from grpo_fed.runs.tracking.spool import hold_lock
from grpo_fed.runs.tracking.store import resolve_store
from grpo_fed.scenario.shipped import find_scenario

JOURNAL = "optuna.log"
"""The study's journal in the sweep's folder."""
PRUNED = "pruned: half of the earlier trials had a higher return in training by this round"
WAITING = 600.0
"""Seconds that another process may take to begin a trial."""


def search(
    scenario: str | Path,
    trials: int,
    over: Sequence[str],
    out: str | Path,
    grid: Sequence[str] = (),
    overrides: Sequence[str] = (),
    workers: int | None = None,
    track: str | None = "off",
    prune: bool = True,
    watch: Watch = lambda run: None,
) -> SweepResult:
    """Train a scenario with values that Optuna chooses (extra `sweep`), and write `sweep.json` and `sweep.md` to `out`.

    trials: how many choices are tried in all, those of earlier calls included. over: such as
    "objective.learning_rate=log:1e-4..1e-2". grid: the seeds of each trial, "seed=0..2". prune: stop a trial whose
    training return in a round of its first seed is below the median of earlier trials. The other arguments are those of
    `sweep`.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("--optuna needs the package optuna: install grpo-fed with its extra sweep")
    spaces = [Space.parse(text) for text in over]
    axes = [Axis.parse(text) for text in grid]
    check_keys([*(space.key for space in spaces), *(axis.key for axis in axes)], "--over")
    if not spaces:
        raise ValueError("--optuna: needs keys to choose: --over objective.learning_rate=log:1e-4..1e-2")
    if others := [axis.key for axis in axes if axis.key != "seed"]:
        raise ValueError(f"--grid {others[0]}: with --optuna a grid has seeds alone; use --over {others[0]}=A,B")
    if any(space.key == "seed" for space in spaces):
        raise ValueError("--over seed: no seed is better than another; give each trial some with --grid seed=0..2")
    folder = Path(out)
    check_folder(folder)
    study = Study(scenario, trials, spaces, axes[0].values if axes else (None,), overrides, folder, prune)
    store = resolve_store(track)
    group = open_group(folder, "sweep", study.example.scenario.name) if store is not None else None
    with RunPool(count_processes(workers, trials), folder / LOG) as pool:
        study.open()
        pool.work(lambda worker: study.train_one(worker, track, group, watch))
    runs = study.runs()
    result = SweepResult(study.example.scenario, rank_points(runs), tuple(runs), folder)
    write_sweep(result)
    if group is not None and store is not None:
        result = result.with_note(finish_group(group, store, folder, result.page(), result.metrics()))
    return result


@final
class Study:
    """A study of Optuna and the runs of its trials."""

    def __init__(
        self,
        scenario: str | Path,
        trials: int,
        spaces: Sequence[Space],
        seeds: Sequence[str | None],
        overrides: Sequence[str],
        folder: Path,
        prune: bool,
    ) -> None:
        """Check the spaces at their ends; ValueError names a key or value that is wrong. Nothing is written yet."""
        self._source = find_scenario(str(scenario))
        self._trials, self._spaces, self._seeds = trials, spaces, seeds
        self._overrides, self._folder, self._prune = overrides, folder, prune
        self._lock = threading.Lock()
        self._study: Any = None
        self._mine: set[int] = set()
        """The trials that threads of this process are training."""
        for end in (0, -1):
            values = [(space.key, _ends(space)[end]) for space in spaces]
            self.example = make_run(self._source, overrides, values, seeds[0], folder / "none", "--over")

    def open(self) -> None:
        """Open the journal, or begin it."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._locked("journal"):
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self._folder / JOURNAL))),
                study_name=self.example.scenario.name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=0),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if self._prune else optuna.pruners.NopPruner(),
            )

    def train_one(self, worker: WorkerProcess, track: str | None, group: RunGroup | None, watch: Watch) -> bool:
        """Train a trial that is left, or a new one; return False when there are enough."""
        with self._lock:
            taken = self._take()
        if taken is None:
            return False
        trial, lock = taken
        try:
            scores = []
            for index, run in enumerate(self._runs_of(trial)):
                decide = self._decide(trial) if index == 0 and self._prune else None
                named = None if group is None else group.with_label(f"trial {trial.number} {run.short_label}")
                ended = run.read()
                if not ended.has_ended:
                    ended = worker.train(run, track, named, decide)
                watch(ended)
                if ended.status in ("interrupted", "failed") and not ended.problem:
                    return False  # the sweep is stopped; the trial is taken up by the next call
                if ended.status == "stopped":
                    self._tell(trial, "PRUNED", None)
                    return True
                if ended.score is None:
                    self._tell(trial, "FAIL", None)
                    return True
                scores.append(ended.score)
            self._tell(trial, "COMPLETE", sum(scores) / len(scores))
            return True
        finally:
            self._mine.discard(trial.number)
            lock.__exit__(None, None, None)

    def runs(self) -> list[SweptRun]:
        """Return all runs that the study has, with how they ended."""
        trials = [trial for trial in self._study.get_trials(deepcopy=False) if trial.params]
        found = [run.read() for trial in trials for run in self._runs_of(trial)]
        return [run for run in found if run.status != "waits"]

    def _take(self) -> tuple[Any, Any] | None:
        """Take up a trial whose process has died, or ask for a new one; None if there are enough."""
        from optuna.trial import Trial, TrialState

        with self._locked("journal"):
            known = self._study.get_trials(deepcopy=False)
            for frozen in known:
                if frozen.state == TrialState.RUNNING and frozen.number not in self._mine:
                    lock = self._locked(f"trial-{frozen.number:04d}", patience=0.0)
                    try:
                        lock.__enter__()
                    except TimeoutError:
                        continue  # another process is training it
                    self._mine.add(frozen.number)
                    return self._suggested(Trial(self._study, frozen._trial_id)), lock
            if len(known) >= self._trials:
                return None
            trial = self._study.ask()
            self._suggested(trial)
            lock = self._locked(f"trial-{trial.number:04d}", patience=0.0)
            lock.__enter__()
            self._mine.add(trial.number)
            return trial, lock

    def _suggested(self, trial: Any) -> Any:
        """Let the study choose the trial's values; those that it has chosen before stay."""
        for space in self._spaces:
            match space.scale:
                case "choice":
                    trial.suggest_categorical(space.key, space.choices)
                case "int":
                    trial.suggest_int(space.key, int(space.low), int(space.high))
                case _:
                    trial.suggest_float(space.key, space.low, space.high, log=space.scale == "log")
        return trial

    def _runs_of(self, trial: Any) -> list[SweptRun]:
        """Make the runs of a trial, one for each seed."""
        values = [(space.key, _text(trial.params[space.key])) for space in self._spaces]
        folder = self._folder / f"trial-{trial.number:04d}"
        return [make_run(self._source, self._overrides, values, seed, folder, "--over") for seed in self._seeds]

    def _decide(self, trial: Any) -> Callable[[int, float | None], str]:
        """Make the function that prunes a trial by its rounds."""

        def decide(round: int, score: float | None) -> str:
            with self._lock:
                if score is not None:
                    trial.report(score, round)
                return PRUNED if trial.should_prune() else "go"

        return decide

    def _tell(self, trial: Any, state: str, value: float | None) -> None:
        from optuna.trial import TrialState

        with self._lock:
            self._study.tell(trial.number, value, TrialState[state])

    @contextmanager
    def _locked(self, name: str, patience: float = WAITING) -> Iterator[None]:
        """Hold a lock that all processes of the sweep share; TimeoutError if another one holds it for too long."""
        folder = self._folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file, hold_lock(file.fileno(), patience):
            yield


def _ends(space: Space) -> tuple[str, ...]:
    """Return the values between which a space is, as text."""
    if space.scale == "choice":
        return space.choices
    return tuple(_text(int(end) if space.scale == "int" else end) for end in (space.low, space.high))


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
