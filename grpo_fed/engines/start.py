"""Starts and resumes a federation on the engine that was asked for.

An engine decides where clients run and how messages reach them; the loop of rounds and the messages are the same on all
engines. To add one, write a class with the methods of `Engine` in a package beside `local/` and `flower/`. It resolves
the scenario (`federation.setup.FederationSetup`), makes a `Transport` to its clients (`wire.transport.GridTransport`
serves any Flower grid), hands both to a `federation.rounds.Federation`, and runs that. Then give the engine a name in
`EngineName`, and a branch in `make_engine` and in `resume_engine`. `local/engine.py` is the shortest example.

Nothing here imports torch before the fork server of the worker processes has begun to do so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias, get_args

from grpo_fed.engines.workers.fork_server import preload

if TYPE_CHECKING:
    from grpo_fed.runs.records import RoundRecord
    from grpo_fed.runs.results import Result
    from grpo_fed.scenario.scenario import Scenario

log = logging.getLogger(__name__)

EngineName: TypeAlias = Literal["local", "flower-sim", "flower"]
"""This machine's processes; Flower's simulation; or a Flower deployment of a SuperLink and nodes."""
Watch: TypeAlias = "Callable[[RoundRecord], None]"
"""Called with the record of each round as soon as the round has ended."""


class Engine(Protocol):
    """Runs one federation: a context manager whose `run` is called once.

    Making an engine raises ValueError for everything that can be found wrong before a run is started or a file is
    written; processes that it has started, so that they import meanwhile, are stopped then. Leaving its context stops
    its processes and closes its environments, whatever has happened.
    """

    scenario: Scenario
    """The scenario that is run; of a resumed run, as it was saved."""

    @property
    def device(self) -> str:
        """The torch device that clients compute on, such as `cpu` or `cuda:0`, where the engine knows it."""

    @property
    def result(self) -> Result | None:
        """The run's result once it has finished, failed or been interrupted; None before."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, watch: Watch) -> Result:
        """Run all rounds, or those that are left of a resumed run.

        watch: gets the record of every round. Round 0 is the evaluation before training.
        Whatever stops the run, KeyboardInterrupt too, is raised after what has been learned is saved.
        """
        ...


def run(
    scenario: Scenario,
    out: str | Path | None = None,
    watch: Watch = lambda record: None,
    engine: EngineName = "local",
    superlink: str | None = None,
    workers: int | None = None,
    replace: bool = False,
    callbacks: Sequence[object] = (),
    tracking: str | bool = False,
) -> Result:
    """Train a federation.

    out: the folder to write; without one nothing is left behind.
    watch: gets the record of every round, the first being 0.
    superlink: the name of a deployment's connection, for the engine `flower`.
    workers: the number of worker processes, for the engine `local`; by default one for each core.
    replace: whether a run that `out` holds may be removed.
    callbacks: objects with methods of `grpo_fed.callbacks.Callback`, beside those that the scenario names; for the
        engine `local`.
    tracking: where MLflow keeps the run: True for MLFLOW_TRACKING_URI, or else `runs/mlflow.db`; or an address.
    Raises ValueError for what is wrong with the scenario or the call, before anything is written. Whatever stops the
    run after that, KeyboardInterrupt too, is raised after what has been learned is saved.
    """
    with make_engine(scenario, out, engine, superlink, workers, replace, callbacks) as federation:
        return _run_tracked(federation, out, watch, tracking)


def resume(
    folder: str | Path,
    watch: Watch = lambda record: None,
    engine: EngineName = "local",
    superlink: str | None = None,
    callbacks: Sequence[object] = (),
    tracking: str | bool = False,
) -> Result:
    """Continue a federation that was stopped, from its latest checkpoint, to the same end as without the stop.

    folder: the folder of the run. The other arguments are those of `run`.
    Raises ValueError if the folder holds no unfinished run.
    """
    with resume_engine(folder, engine, superlink, callbacks) as federation:
        return _run_tracked(federation, folder, watch, tracking, resumed=True)


def make_engine(
    scenario: Scenario,
    out: str | Path | None = None,
    engine: EngineName = "local",
    superlink: str | None = None,
    workers: int | None = None,
    replace: bool = False,
    callbacks: Sequence[object] = (),
) -> Engine:
    """Make an engine for a new run; the arguments are those of `run`.

    Raises ValueError for what is wrong with the scenario, or for arguments that another engine has.
    """
    _check_superlink(engine, superlink)
    if engine not in get_args(EngineName):
        raise ValueError(f"engine {engine}: is unknown; there are {', '.join(get_args(EngineName))}")
    if engine == "local":
        if workers != 0:
            preload()
        from grpo_fed.engines.local.engine import LocalEngine

        return LocalEngine(scenario, out, workers=workers, replace=replace, callbacks=callbacks)
    _refuse_objects(callbacks, engine)
    if workers is not None:
        raise ValueError(f"workers = {workers}: only the local engine has workers; this engine is {engine}")
    from grpo_fed.engines.flower.engine import FlowerEngine

    return FlowerEngine(scenario, out, engine, superlink, replace=replace)


def resume_engine(
    folder: str | Path,
    engine: EngineName = "local",
    superlink: str | None = None,
    callbacks: Sequence[object] = (),
) -> Engine:
    """Make an engine for the unfinished run in a folder; the arguments are those of `resume`.

    Raises ValueError if the folder holds no such run.
    """
    _check_superlink(engine, superlink)
    if engine == "local":
        preload()
        from grpo_fed.engines.local.engine import LocalEngine

        return LocalEngine.resumed(folder, callbacks)
    _refuse_objects(callbacks, engine)
    from grpo_fed.engines.flower.engine import FlowerEngine

    return FlowerEngine.resumed(folder, engine, superlink)


def _check_superlink(engine: EngineName, superlink: str | None) -> None:
    if superlink is not None and engine != "flower":
        raise ValueError(f"superlink = {superlink}: only the engine flower has a SuperLink; this engine is {engine}")


def _refuse_objects(callbacks: Sequence[object], engine: EngineName) -> None:
    """ValueError for callbacks that would have to be called in another process."""
    if callbacks:
        names = ", ".join(f"{type(each).__module__}:{type(each).__qualname__}" for each in callbacks)
        raise ValueError(
            f"callbacks: the server of the engine {engine} is another process, which objects cannot reach; name"
            f" {names} in the scenario, as callbacks = [...]"
        )


def _run_tracked(
    engine: Engine, out: str | Path | None, watch: Watch, tracking: str | bool, resumed: bool = False
) -> Result:
    """Run an engine and track it to MLflow, if asked; as on the command line, the run does not wait for the store."""
    if tracking is False:
        return engine.run(watch)
    if out is None:
        raise ValueError(f"tracking = {tracking!r}: needs out, the folder in which records wait until they are sent")
    from grpo_fed.runs.records import record_to_line
    from grpo_fed.runs.results import status_of
    from grpo_fed.runs.tracking import Tracker

    tracker = Tracker.open(None if tracking is True else tracking, Path(out), engine.scenario, resumed)

    def watch_and_track(record: RoundRecord) -> None:
        tracker.round(record_to_line(record))
        watch(record)

    error: BaseException | None = None
    try:
        return engine.run(watch_and_track)
    except BaseException as raised:
        error = raised
        raise
    finally:
        result = engine.result
        status = status_of(error) if result is None else result.status
        tracker.close(None if result is None else result.to_json(), status)
        if tracker.trouble is not None:
            log.warning(tracker.trouble)
