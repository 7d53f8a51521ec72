"""What a process does with the jobs that it is given: it makes the clients of a chunk once, and lets them answer."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

import gymnasium
from gymnasium.envs.registration import EnvSpec

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.scenario.importing import describe_exception
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym import find_env_spec
from grpo_fed.tasks.gym_task import GymTask


class ClientHandler(Protocol):
    """The clients of a chunk, which answer all together or some of them at a time."""

    def answer(self, instructions: Mapping[str, Instruction]) -> Mapping[str, Answer]:
        """Answer instructions, which are all of one kind.

        If a client raises, the exception is raised from here and there is no answer of any client.
        """

    def close(self) -> None:
        """Close the environments."""


MakeClients: TypeAlias = Callable[[Sequence[str]], ClientHandler]
"""Makes the clients with these names."""


@dataclass(frozen=True)
class ClientFactory:
    """Makes clients in another process, which imports what makes them."""

    function: str
    """`module:function`, called with the clients' names, and with `settings` if there are any."""
    settings: Mapping[str, Any] | None = None
    """The function's second argument, as JSON."""

    def __call__(self, names: Sequence[str]) -> ClientHandler:
        """Make the clients with these names."""
        module, _, function = self.function.partition(":")
        make = getattr(import_module(module), function)
        clients: ClientHandler = make(names) if self.settings is None else make(names, self.settings)
        return clients


@final
class RequestHandler:
    """Answers requests, and keeps the clients of each chunk, so that their environments stay open."""

    def __init__(self, make_clients: MakeClients | None = None) -> None:
        """Make a handler; without `make_clients` every request says how its clients are made."""
        self._make_clients = make_clients
        self._clients: dict[tuple[str, ...], ClientHandler] = {}

    def answer(
        self, chunk: tuple[str, ...], instructions: Mapping[str, Instruction], make_clients: MakeClients | None = None
    ) -> Mapping[str, Answer]:
        """Let clients of a chunk answer; raises what they raise."""
        if chunk not in self._clients:
            make = make_clients or self._make_clients
            assert make is not None, "the handler or the request says how clients are made"
            self._clients[chunk] = make(chunk)
        return self._clients[chunk].answer(instructions)

    def reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reply to another process's `frames.make_request`.

        Returns the `answers`, or what was `raised` and its `trace`.
        """
        sys.path[:] = request["path"]
        try:
            factory = ClientFactory(request["function"], request["settings"])
            return {"answers": self.answer(request["chunk"], request["instructions"], factory)}
        except Exception as error:  # noqa: BLE001, a client may raise anything, and the worker goes on
            return {"raised": describe_exception(error), "trace": traceback.format_exc()}

    def close(self) -> None:
        """Close all clients."""
        for clients in self._clients.values():
            clients.close()
        self._clients.clear()


# The clients of a scenario in another process ------------------------------------------------------------------------


def clients_factory(setup: FederationSetup, state_store: StateStore) -> ClientFactory:
    """Describe a scenario's clients so that another process can make them.

    Raises ValueError if an environment, a wrapper or a network is defined where another process cannot import it.
    """
    tasks = [task for task in setup.tasks.values() if isinstance(task, GymTask)]
    paths = [setup.scenario.policy.module or "", *(task.env for task in tasks)]
    paths += [wrapper.path for task in tasks for wrapper in task.wrappers]
    for entry in setup.scenario.clients:
        paths += [entry.prompts or "", entry.eval_prompts or "", *(reward.function for reward in entry.rewards)]
    specs = {task.env: find_env_spec(task) for task in tasks}.values()
    paths += [spec.entry_point for spec in specs if isinstance(spec.entry_point, str)]
    for path in paths:
        if path.startswith("__main__:"):
            raise ValueError(
                f"{path}: a worker process cannot import that; move it into a module of its own, or set workers = 0"
            )
    try:
        specs_as_json = [spec.to_json() for spec in specs]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{error}: a worker process cannot make it; register it with an entry point module:Class, or set"
            " workers = 0"
        ) from error
    return ClientFactory(
        f"{__name__}:make_clients",
        {
            "scenario": setup.scenario.dumps(),
            "states": str(state_store.folder.absolute()),
            "durable": state_store.durable,
            "specs": specs_as_json,
        },
    )


def make_clients(names: Sequence[str], settings: Mapping[str, Any]) -> Clients:
    """Make clients of a scenario from the settings of `clients_factory`."""
    setup = _setup(json.dumps(settings))
    state_store = StateStore(Path(settings["states"]), settings["durable"])
    return Clients(setup.scenario, setup.shared_blocks, [setup.tasks[name] for name in names], state_store)


@lru_cache(maxsize=1)
def _setup(settings: str) -> FederationSetup:
    """Resolve a scenario in a worker, once for all chunks that the worker runs.

    The setup cannot be handed over instead: its tasks hold gymnasium's spaces, which may be of a user's own class and
    have no form in JSON, and nothing between processes is pickled. The worker needs the environments' modules anyway.
    settings: JSON of the settings of `clients_factory`.
    """
    given = json.loads(settings)
    scenario = Scenario.loads(given["scenario"])
    for entry in scenario.clients:
        module, colon, _ = (entry.env or "").partition(":")
        if colon:
            with suppress(Exception):  # resolving the tasks explains what is wrong with it
                import_module(module)  # before the specs: gymnasium warns of an id that is registered twice
    for spec in map(EnvSpec.from_json, given["specs"]):
        gymnasium.registry.setdefault(spec.id, spec)
    return FederationSetup.of(scenario)
