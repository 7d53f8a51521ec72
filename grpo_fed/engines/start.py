"""A federation on the engine that was asked for.

Nothing here imports torch before the workers' process has begun to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias

from grpo_fed.engines.workers.fork_server import preload

if TYPE_CHECKING:
    from grpo_fed.runs.records import RoundRecord
    from grpo_fed.runs.results import Result
    from grpo_fed.scenario.scenario import Scenario

EngineName: TypeAlias = Literal["local", "flower-sim", "flower"]
"""This machine's processes; Flower's simulation; or a SuperLink and SuperNodes."""
Watch: TypeAlias = "Callable[[RoundRecord], None]"


class Engine(Protocol):
    """A run that is ready to begin: to make one finds what is wrong before anything is started or written."""

    scenario: Scenario

    @property
    def device(self) -> str:
        """What it computes on."""

    @property
    def result(self) -> Result | None:
        """What became of it, as soon as it has ended, in whatever way."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, watch: Watch) -> Result:
        """All rounds, or those that are left; `watch` hears of each, the first being 0."""
        ...


def run(
    scenario: Scenario,
    out: str | Path | None = None,
    watch: Watch = lambda note: None,
    engine: EngineName = "local",
    superlink: str | None = None,
    workers: int | None = None,
) -> Result:
    """Train a federation; write a run folder to `out`; tell `watch` of every round, the first being 0.

    ValueError for what is wrong with the scenario or the call, before anything is written. Whatever stops it after
    that, KeyboardInterrupt too, first finds what there is saved. superlink: of the engine `flower`, a deployment's
    connection. workers: of the local engine, how many processes; by default one for each core.
    """
    with make_engine(scenario, out, engine, superlink, workers) as federation:
        return federation.run(watch)


def resume(
    folder: str | Path,
    watch: Watch = lambda note: None,
    engine: EngineName = "local",
    superlink: str | None = None,
) -> Result:
    """Go on with a federation that was stopped, from its latest checkpoint, to the very end that it would have had.

    ValueError if the folder holds no such run.
    """
    with resume_engine(folder, engine, superlink) as federation:
        return federation.run(watch)


def make_engine(
    scenario: Scenario,
    out: str | Path | None = None,
    engine: EngineName = "local",
    superlink: str | None = None,
    workers: int | None = None,
) -> Engine:
    """A new one; ValueError for what does not go together."""
    _refuse(engine, superlink)
    if engine == "local":
        if workers != 0:
            preload()
        from grpo_fed.engines.local.engine import LocalEngine

        return LocalEngine(scenario, out, workers=workers)
    if workers is not None:
        raise ValueError(f"workers = {workers}: only the local engine has them; the engine is {engine}")
    from grpo_fed.engines.flower.engine import FlowerEngine

    return FlowerEngine(scenario, out, engine, superlink)


def resume_engine(folder: str | Path, engine: EngineName = "local", superlink: str | None = None) -> Engine:
    """One that was stopped."""
    _refuse(engine, superlink)
    if engine == "local":
        preload()
        from grpo_fed.engines.local.engine import LocalEngine

        return LocalEngine.resumed(folder)
    from grpo_fed.engines.flower.engine import FlowerEngine

    return FlowerEngine.resumed(folder, engine, superlink)


def _refuse(engine: EngineName, superlink: str | None) -> None:
    if superlink is not None and engine != "flower":
        raise ValueError(f"superlink = {superlink}: is for the engine flower; it is {engine}")
