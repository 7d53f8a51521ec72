"""What a node does with a message: decode it, let its client answer, encode the answer.

A client's state is in files on its own disk, since Flower's own nodes start a new process for every message; what a
process keeps in memory only saves time. A node's configuration names its client: `client`, or else `partition-id`.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from flwr.app import RecordDict

from grpo_fed.engines import wire
from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.superlink import find_state_folder
from grpo_fed.engines.flower.withheld_errors import withhold
from grpo_fed.engines.wire import HELLO, Codec, Hello
from grpo_fed.engines.wire.flower_private import pack, unpack
from grpo_fed.engines.wire.handshake import check_own_entry
from grpo_fed.engines.workers.handler import ClientHandler
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Evaluate
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.make import describe_shape
from grpo_fed.policy.shared import resolve_client_shared_blocks
from grpo_fed.runs.files import make_private_folder, write_atomic
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.scenario.newcomers import takes_newcomers, with_newcomers
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_task

MAX_CLIENTS = 64
"""How many clients stay loaded in a process: in a simulation a process serves many in turn."""

Config = Mapping[str, str | int | float | bool | bytes]


@final
class NodeHandler:
    """Answers messages for the clients of this process, which are loaded when they are first asked."""

    def __init__(self) -> None:
        self.loaded: dict[tuple[str, str, Path, tuple[str, ...]], tuple[Codec, Clients]] = {}
        """By scenario, client, state folder and shared blocks."""

    def answer(self, kind: str, content: RecordDict, scenario: str, config: Config) -> RecordDict:
        """Answer a message of type `kind`, in a run of this scenario (TOML), for the node with this configuration.

        Raises WithheldError in the place of what the client raises, unless the scenario lets its text leave.
        """
        state = find_state_folder(Path(str(config["state"])) if config.get("state") else None)
        errors = "place"
        try:
            given = scenario_from_config(scenario)
            errors = given.privacy.errors
            settings = _with_own_client(given, config)
            if kind == HELLO and settings is not given:
                like = f"with the task of {given.newcomers.like}"
                print(f"client {config['client']!s} asks to join the run of scenario {given.name}, {like}", flush=True)
            return self._answer(kind, content, settings, config, state)
        except Exception as error:
            if errors == "text":
                raise
            raise withhold(error, str(config.get("client", config.get("partition-id", ""))), state) from error

    def _answer(self, kind: str, content: RecordDict, settings: Scenario, config: Config, state: Path) -> RecordDict:
        if kind == HELLO:
            return _hello(settings, config)
        name = find_client(settings, config)
        check_own_entry(content, settings, name)
        device = None if config.get("device") is None else str(config["device"])
        codec, clients = self._load(settings, name, state, wire.read_shared_blocks(content), device)
        instruction = codec.read_instruction(kind, content)
        run = clients.state_store.folder / instruction.start.run
        with _locked(run / name):
            answer = clients.answer({name: instruction})[name]
            if isinstance(instruction, Evaluate) and instruction.start.round:
                # This may be the run's last message, so the policy that was evaluated is saved.
                write_atomic(run / SCENARIO, settings.dumps())
                clients.save_policies(run, {name: instruction.start}, instruction.plan.number)
        return codec.write_answer(instruction, answer)

    def close(self) -> None:
        """Close the environments."""
        for _, clients in self.loaded.values():
            clients.close()
        self.loaded.clear()

    def _load(
        self, scenario: Scenario, name: str, state: Path, blocks: tuple[str, ...], device: str | None
    ) -> tuple[Codec, Clients]:
        """Load a client and the codec for its messages, without making any other client's task.

        device: what the client's machine has for it, instead of the scenario's; None if it does not say.
        """
        key = scenario.dumps(), name, state, blocks
        if key not in self.loaded:
            task = resolve_task(scenario, name)
            shared_blocks = resolve_client_shared_blocks(scenario, task, blocks)
            while len(self.loaded) >= MAX_CLIENTS:
                _, oldest = self.loaded.pop(next(iter(self.loaded)))
                oldest.close()
            given = {} if device is None else {"device": device}
            clients = Clients(scenario.model_copy(update=given), shared_blocks, [task], StateStore(state))
            self.loaded[key] = Codec(shared_blocks, scenario), clients
        return self.loaded[key]


def _with_own_client(scenario: Scenario, config: Config) -> Scenario:
    """Add the node's client to a scenario that does not name it, where such clients may join."""
    name = config.get("client")
    return with_newcomers(scenario, [str(name)]) if name is not None and takes_newcomers(scenario) else scenario


def find_client(scenario: Scenario, config: Config) -> str:
    """Return the client of the node with this configuration; ValueError if the scenario has no such client."""
    names = [name for settings in scenario.clients for name in settings.names]
    name, partition = config.get("client"), config.get("partition-id")
    if name is None and isinstance(partition, int) and 0 <= partition < len(names):
        return names[partition]
    if name not in names:
        given = f"client = {name!r}" if name is not None else f"no client, partition-id = {partition!r}"
        raise ValueError(f"node-config says {given}; scenario {scenario.name} has {', '.join(names)}")
    return str(name)


def _hello(scenario: Scenario, config: Config) -> RecordDict:
    """Answer with the client's name and the shape of its task; a client that takes no part says so here, too."""
    names = [name for settings in scenario.clients for name in settings.names]
    given = config.get("client")
    if given is not None and given not in names:
        print(
            f"client {given!s} takes no part in the run of scenario {scenario.name}, which has {', '.join(names)}:"
            " give the client one of these names, or the scenario a client of this name",
            file=sys.stderr,
            flush=True,
        )
        return wire.write_hello(Hello(str(given)))
    name = find_client(scenario, config)
    try:
        shape = describe_shape(resolve_task(scenario, name))
    except ValueError:  # the answer to the first instruction says why
        shape = None
    return wire.write_hello(Hello(name, shape))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock, so that a message waits while another process still works on the client's last one."""
    for each in (folder.parent, folder):
        make_private_folder(each)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# In a worker of a resident node ---------------------------------------------------------------------------------------


@final
class PackedNodeHandler:
    """Answers messages that another process has received, as packed records."""

    def __init__(self) -> None:
        self._node = NodeHandler()

    def answer(self, instructions: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: {"content": self._answer(**request)} for name, request in instructions.items()}

    def close(self) -> None:
        self._node.close()

    def _answer(self, kind: str, content: np.ndarray, scenario: str, config: Config, threads: int) -> np.ndarray:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return pack(self._node.answer(kind, unpack(content), scenario, config))


def make_node_handler(names: Sequence[str]) -> ClientHandler:
    """Make what answers in a worker; its `ClientFactory` calls this.

    names: what the resident node calls the worker's client, which is of no use here.
    """
    return PackedNodeHandler()
