"""A federation on the engine that was asked for.

Nothing here imports torch before the workers' process has begun to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias

from grpo_fed.engines.workers.fork_server import start_ahead

if TYPE_CHECKING:
    from grpo_fed.runs.records import RoundNote
    from grpo_fed.runs.results import Result
    from grpo_fed.scenario.scenario import Scenario

Engine: TypeAlias = Literal["local", "flower-sim", "flower"]
"""This machine's processes; Flower's simulation; or a SuperLink and SuperNodes."""
Watch: TypeAlias = "Callable[[RoundNote], None]"


class Ready(Protocol):
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
    engine: Engine = "local",
    superlink: str | None = None,
    workers: int | None = None,
) -> Result:
    """Train a federation; write a run folder to `out`; tell `watch` of every round, the first being 0.

    ValueError for what is wrong with the scenario or the call, before anything is written. Whatever stops it after
    that, KeyboardInterrupt too, first finds what there is saved. superlink: of the engine `flower`, a deployment's
    connection. workers: of the local engine, how many processes; by default one for each core.
    """
    with ready(scenario, out, engine, superlink, workers) as federation:
        return federation.run(watch)


def resume(
    folder: str | Path,
    watch: Watch = lambda note: None,
    engine: Engine = "local",
    superlink: str | None = None,
) -> Result:
    """Go on with a federation that was stopped, from its latest checkpoint, to the very end that it would have had.

    ValueError if the folder holds no such run.
    """
    with resumed(folder, engine, superlink) as federation:
        return federation.run(watch)


def ready(
    scenario: Scenario,
    out: str | Path | None = None,
    engine: Engine = "local",
    superlink: str | None = None,
    workers: int | None = None,
) -> Ready:
    """A new one; ValueError for what does not go together."""
    _refuse(engine, superlink)
    if engine == "local":
        if workers != 0:
            start_ahead()
        from grpo_fed.engines.local.engine import LocalFederation

        return LocalFederation(scenario, out, workers=workers)
    if workers is not None:
        raise ValueError(f"workers = {workers}: only the local engine has them; the engine is {engine}")
    from grpo_fed.engines.flower.engine import FlowerFederation

    return FlowerFederation(scenario, out, engine, superlink)


def resumed(folder: str | Path, engine: Engine = "local", superlink: str | None = None) -> Ready:
    """One that was stopped."""
    _refuse(engine, superlink)
    if engine == "local":
        start_ahead()
        from grpo_fed.engines.local.engine import LocalFederation

        return LocalFederation.resumed(folder)
    from grpo_fed.engines.flower.engine import FlowerFederation

    return FlowerFederation.resumed(folder, engine, superlink)


def _refuse(engine: Engine, superlink: str | None) -> None:
    if superlink is not None and engine != "flower":
        raise ValueError(f"superlink = {superlink}: is for the engine flower; it is {engine}")
