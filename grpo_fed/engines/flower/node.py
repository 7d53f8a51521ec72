"""What a node does with a message's content: its client's answer, as content again.

What a client remembers is in files on its own disk, since Flower starts a new process for every message; what a process
remembers of it is only faster. The node's configuration says who it is: `client`, or else its `partition-id`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from flwr.app import RecordDict

from grpo_fed.engines import wire
from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.superlink import STATE
from grpo_fed.engines.wire import HELLO, Codec, Hello
from grpo_fed.engines.wire.packing import pack, unpack
from grpo_fed.engines.workers.handler import ClientHandler
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Evaluate
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_client_shared_blocks
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_task

MOST = 64
"""Clients that stay ready in a process; a simulation has it serve many in turn."""

Config = Mapping[str, str | int | float | bool | bytes]


@final
class NodeHandler:
    """Clients of one process, as they are asked for."""

    def __init__(self) -> None:
        self.ready: dict[tuple[str, str, Path, tuple[str, ...]], tuple[Codec, Clients]] = {}

    def answer(self, kind: str, content: RecordDict, text: str, config: Config) -> RecordDict:
        """To a message of this kind, in a run with this scenario, by the node with this configuration."""
        scenario = scenario_from_config(text)
        name = client_of(scenario, config)
        if kind == HELLO:
            return _hello(scenario, name)
        letters, members = self._client(scenario, name, _state(config), wire.read_shared_blocks(content))
        home, told = members.state_store.folder, letters.read_instruction(kind, content)
        with _locked(home / told.start.run / name):
            answer = members.answer({name: told})[name]
            if isinstance(told, Evaluate) and told.start.round:  # perhaps the last we hear: what plays is worth keeping
                write_atomic(home / told.start.run / SCENARIO, members.scenario.dumps())
                members.save_policies(home / told.start.run, {name: told.start})
        return letters.write_answer(told, answer)

    def close(self) -> None:
        """Let go of environments."""
        for _, members in self.ready.values():
            members.close()
        self.ready.clear()

    def _client(self, scenario: Scenario, name: str, state: Path, blocks: tuple[str, ...]) -> tuple[Codec, Clients]:
        """A client, with how to read what it is told. Of other clients it need not know a thing."""
        key = scenario.dumps(), name, state, blocks
        if key not in self.ready:
            task = resolve_task(scenario, name)
            commons = resolve_client_shared_blocks(scenario, task, blocks)
            while len(self.ready) >= MOST:
                _, oldest = self.ready.pop(next(iter(self.ready)))
                oldest.close()
            self.ready[key] = Codec(commons, scenario), Clients(scenario, commons, [task], StateStore(state))
        return self.ready[key]


def client_of(scenario: Scenario, config: Config) -> str:
    """Whose node it is; ValueError if it has no client in the scenario."""
    names = [name for settings in scenario.clients for name in settings.names]
    name, place = config.get("client"), config.get("partition-id")
    if name is None and isinstance(place, int) and 0 <= place < len(names):
        return names[place]
    if name not in names:
        said = f"client = {name!r}" if name is not None else f"no client, partition-id = {place!r}"
        raise ValueError(f"node-config says {said}; scenario {scenario.name} has {', '.join(names)}")
    return str(name)


def _hello(scenario: Scenario, name: str) -> RecordDict:
    """Whose node it is, and what its task is like."""
    try:
        form = resolve_task(scenario, name).shape
    except ValueError:  # told to train, it says why
        form = None
    return wire.write_hello(Hello(name, form))


def _state(config: Config) -> Path:
    """The folder for what clients remember: the node's own, the environment's, or the user's."""
    given = config.get("state") or os.environ.get(STATE)
    users = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(str(given)) if given else Path(users) / "grpo_fed"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A message that comes while another process is still busy with the one before has to wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# In a worker of the hearth -------------------------------------------------------------------------------------------


@final
class WarmNodeHandler:
    """A node that answers what another process was told."""

    def __init__(self) -> None:
        self._node = NodeHandler()

    def answer(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: {"content": self._answer(**one)} for name, one in told.items()}

    def close(self) -> None:
        self._node.close()

    def _answer(self, kind: str, content: np.ndarray, text: str, config: Config, threads: int) -> np.ndarray:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return pack(self._node.answer(kind, unpack(content), text, config))


def serving(names: Sequence[str]) -> ClientHandler:
    """For `serving.Recipe`; the names are the hearth's own."""
    return WarmNodeHandler()
