"""Clients that are asked together, in whatever process they live."""

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
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym import find_env_spec
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_tasks


class ClientHandler(Protocol):
    """Some clients who answer together, or a few of them at a time."""

    def answer(self, instructions: Mapping[str, Instruction]) -> Mapping[str, Answer]:
        """Of one kind for all of them; what one of them raises is raised, and nobody has an answer then."""

    def close(self) -> None:
        """Let go of environments."""


Serve: TypeAlias = Callable[[Sequence[str]], ClientHandler]
"""Makes clients of these names."""


@dataclass(frozen=True)
class ClientFactory:
    """How another process makes clients."""

    serve: str
    """`module:function`, called with the clients' names, and with `given` where there is something."""
    given: Mapping[str, Any] | None = None
    """JSON."""

    def __call__(self, names: Sequence[str]) -> ClientHandler:
        module, _, function = self.serve.partition(":")
        make = getattr(import_module(module), function)
        made: ClientHandler = make(names) if self.given is None else make(names, self.given)
        return made


@final
class RequestHandler:
    """Answers what this process is asked, and keeps the clients that it has made."""

    def __init__(self, serve: Serve | None = None) -> None:
        """Without `serve`, a question says how its clients are made."""
        self._serve = serve
        self._known: dict[tuple[str, ...], ClientHandler] = {}

    def answer(
        self, chunk: tuple[str, ...], instructions: Mapping[str, Instruction], serve: Serve | None = None
    ) -> Mapping[str, Answer]:
        """Of some clients of a chunk; raises what they raise."""
        if chunk not in self._known:
            make = serve or self._serve
            assert make is not None, "somebody knows how to make them"
            self._known[chunk] = make(chunk)
        return self._known[chunk].answer(instructions)

    def reply(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """To another process: `answers`, or what was `raised` and the `trace` of it."""
        sys.path[:] = question["path"]
        try:
            recipe = ClientFactory(question["serve"], question["given"])
            return {"answers": self.answer(question["chunk"], question["told"], recipe)}
        except Exception as error:  # noqa: BLE001, whatever a client raises is its own affair
            return {"raised": describe_exception(error), "trace": traceback.format_exc()}

    def close(self) -> None:
        """Let all of them go."""
        for serving in self._known.values():
            serving.close()
        self._known.clear()


def describe_exception(error: Exception) -> str:
    """What a client raised, in words."""
    return f"{type(error).__name__}: {error}"


def clients_factory(scenario: Scenario, home: StateStore, tasks: Sequence[GymTask]) -> ClientFactory:
    """For any process. ValueError where one has environments, wrappers or networks that no other can know of."""
    named = [scenario.policy.module or "", *(path for task in tasks for path in (task.env, *task.wrappers))]
    specs = {task.env: find_env_spec(task) for task in tasks}.values()
    named += [spec.entry_point for spec in specs if isinstance(spec.entry_point, str)]
    for path in named:
        if path.startswith("__main__:"):
            raise ValueError(
                f"{path}: no worker process can import that; give it a module of its own, or set workers = 0"
            )
    try:
        written = [spec.to_json() for spec in specs]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{error}: no worker process can know it; register it with an entry point module:Class, or set workers = 0"
        ) from error
    return ClientFactory(
        f"{__name__}:make_clients",
        {
            "scenario": scenario.dumps(),
            "home": str(home.folder.absolute()),
            "durable": home.durable,
            "specs": written,
        },
    )


def make_clients(names: Sequence[str], given: Mapping[str, Any]) -> Clients:
    """Clients of a scenario, in a process that has been told of it."""
    scenario, commons, tasks = _setup(json.dumps(given))
    home = StateStore(Path(given["home"]), given["durable"])
    return Clients(scenario, commons, [tasks[name] for name in names], home)


@lru_cache(maxsize=1)
def _setup(given: str) -> tuple[Scenario, SharedBlocks, Mapping[str, GymTask]]:
    """What such a process needs to know but once."""
    told = json.loads(given)
    scenario = Scenario.loads(told["scenario"])
    for entry in scenario.clients:
        module, colon, _ = entry.env.partition(":")
        if colon:
            with suppress(Exception):  # tasks_of says what is wrong with it
                import_module(module)  # before the specs: gymnasium warns of what registers itself a second time
    for spec in map(EnvSpec.from_json, told["specs"]):
        gymnasium.registry.setdefault(spec.id, spec)
    return scenario, resolve_shared_blocks(scenario), {task.client: task for task in resolve_tasks(scenario)}
