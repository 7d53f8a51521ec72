"""Clients that join a deployment while it runs, although its scenario did not name them.

A client that the deployment knows, and the scenario does not, waits until a round with a checkpoint has ended.
Then the federation pauses, and another goes on from this checkpoint with one client more, as a run does that is joined
after its end (`grpo-fed join`): the newcomer begins with the shared blocks, and is asked what fits it. The run's
scenario names it from then on, so a run that is resumed has it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from flwr.serverapp import Grid

from grpo_fed.engines.flower.discovery import discover_shared_blocks
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.joining import admit_newcomers, list_newcomers
from grpo_fed.federation.participation import RunPausedError
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import TASK_SHAPES, SharedBlocks
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import SCENARIO, read_engine_state, read_shared_names, write_engine_state
from grpo_fed.runs.recorder import Watch
from grpo_fed.runs.results import Result
from grpo_fed.scenario.newcomers import takes_newcomers, with_newcomers
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import TaskShape


def serve_federation(
    scenario: Scenario,
    grid: Grid,
    registry: NodeRegistry,
    folder: Path,
    after: Checkpoint | None,
    state: Mapping[str, Any],
    watch: Watch,
) -> Result:
    """Run a federation over a grid, and go on with more clients whenever some ask to join that may.

    after, state: the checkpoint to go on from, and what the engine saved; None and nothing for a new run.
    """
    if after is not None and takes_newcomers(scenario):
        state = {**state, **read_engine_state(folder)}  # newer than the checkpoint, if the run ended as somebody joined
    has_begun, notes = False, list[str]()
    while True:
        shared_blocks, state = discover_shared_blocks(scenario, registry, state)
        joined = 0
        if after is not None:
            after = _take_in(after, scenario, shared_blocks, folder)
            joined = len(after.parts["recorder"]["totals"].get("joined", {}))
        admission = Admission(scenario, registry, shared_blocks, state, joined)
        federation = Federation(
            scenario,
            shared_blocks,
            GridTransport(grid, shared_blocks, scenario, registry),
            folder,
            after,
            evaluate_with_next_round=True,
            engine=state,
            pauses=admission.finds_newcomers,
        )
        federation.attendance.has_begun = has_begun
        federation.notes += notes
        if not has_begun:
            print(f"run folder: {folder.absolute()}", flush=True)
        try:
            return federation.run(watch)
        except RunPausedError:
            scenario, state, notes, has_begun = admission.scenario, admission.state, admission.notes, True
            write_engine_state(folder, state)
            write_atomic(folder / SCENARIO, scenario.dumps())
            after = checkpoint.latest(folder)


def _take_in(after: Checkpoint, scenario: Scenario, shared_blocks: SharedBlocks, folder: Path) -> Checkpoint:
    """Let a checkpoint know the clients of the scenario that it does not have; it is the same without any."""
    names = read_shared_names(folder)
    if names is None or not list_newcomers(after, scenario):
        return after
    return admit_newcomers(after, scenario, names, shared_blocks)


@final
class Admission:
    """Decides which of the clients that ask to join a federation may."""

    def __init__(
        self,
        scenario: Scenario,
        registry: NodeRegistry,
        shared_blocks: SharedBlocks,
        state: Mapping[str, Any],
        joined: int,
    ) -> None:
        """state: what the engine saves. joined: how many have joined already."""
        self.scenario = scenario
        """The scenario with those that may join."""
        self.state = state
        """What the engine saves with them."""
        self.notes: list[str] = []
        """Messages for a person: who joins."""
        self._registry, self._shared_blocks, self._joined = registry, shared_blocks, joined

    def finds_newcomers(self, round: int) -> bool:
        """Decide after a round whether somebody may join in the next one; say why others may not."""
        if not takes_newcomers(self.scenario) or round % self.scenario.checkpoint.every:
            return False
        self._registry.connected_clients()
        for name, shape in self._registry.waiting_clients().items():
            try:
                self._admit(name, shape)
            except ValueError as error:
                self._registry.refuse(name, str(error))
                continue
            self.notes.append(f"{name} joins in round {round + 1}, as a client like {self.scenario.newcomers.like}")
            print(self.notes[-1], flush=True)
        return bool(self.notes)

    def _admit(self, name: str, shape: TaskShape | None) -> None:
        """Add a client to the scenario; ValueError if it may not join."""
        most = self.scenario.newcomers.most
        if self._joined >= most:
            raise ValueError(f"newcomers.most = {most}, and as many have joined")
        if shape is None:
            raise ValueError(f"its machine cannot make the task of {self.scenario.newcomers.like}")
        scenario, state = with_newcomers(self.scenario, [name]), dict(self.state)
        if TASK_SHAPES in state:
            state[TASK_SHAPES] = {**state[TASK_SHAPES], name: asdict(shape)}
        blocks, state = discover_shared_blocks(scenario, self._registry, state)
        if blocks.digest != self._shared_blocks.digest:
            shared = ", ".join(self._shared_blocks.blocks)
            raise ValueError(f"the run shares {shared}, and with its task these would not be the same for all")
        self.scenario, self.state, self._joined = scenario, state, self._joined + 1
        self._registry.admit(name)
