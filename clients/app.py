"""ClientApp: a message -> what one client makes of it -> a reply.

Flower may start a new process for every message. So what a client remembers is in files on its own disk, and what this
process remembers of it is only faster. `node_config` says who it is: `client`, or else its `partition-id`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grpo_fed import wire
from grpo_fed.commons import commons_for
from grpo_fed.engines.apps import scenario_of
from grpo_fed.files import write_whole
from grpo_fed.home import Home
from grpo_fed.members import Members
from grpo_fed.messages import Evaluate
from grpo_fed.saved import SCENARIO
from grpo_fed.scenario import Scenario
from grpo_fed.tasks import task_of
from grpo_fed.wire import Hello, Wire

MOST = 64
"""Clients that stay ready in a process; a simulation has it serve many in turn."""

app = ClientApp()
_ready: dict[tuple[str, str, Path, tuple[str, ...]], tuple[Wire, Members]] = {}


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say whose node this is, and what its task is like."""
    scenario = _scenario(context)
    name = _name(scenario, context)
    try:
        form = task_of(scenario, name).form
    except ValueError:  # told to train, it says why
        form = None
    return Message(wire.write_hello(Hello(name, form)), reply_to=message)


@app.train()
@app.query("measure")
@app.evaluate()
def follow(message: Message, context: Context) -> Message:
    """Do what the message says."""
    letters, members = _client(context, wire.read_blocks(message.content))
    (name,), home = members.names, members.home.folder
    told = letters.read_instruction(message.metadata.message_type, message.content)
    with _alone(home / told.start.run / name):
        answer = members.answer({name: told})[name]
        if isinstance(told, Evaluate) and told.start.round:  # perhaps the last we hear: what plays is worth keeping
            write_whole(home / told.start.run / SCENARIO, members.scenario.dumps())
            members.save_policies(home / told.start.run, {name: told.start})
    return Message(letters.write_answer(told, answer), reply_to=message)


def _client(context: Context, blocks: tuple[str, ...]) -> tuple[Wire, Members]:
    """Whose node this is, with how to read what it is told. Of other clients it need not know a thing."""
    scenario = _scenario(context)
    key = scenario.dumps(), _name(scenario, context), _state(context), blocks
    if key not in _ready:
        _, name, folder, _ = key
        task = task_of(scenario, name)
        commons = commons_for(scenario, task, blocks)
        while len(_ready) >= MOST:
            _, oldest = _ready.pop(next(iter(_ready)))
            oldest.close()
        _ready[key] = Wire(commons, scenario), Members(scenario, commons, [task], Home(folder))
    return _ready[key]


def _scenario(context: Context) -> Scenario:
    return scenario_of(str(context.run_config["scenario"]))


def _name(scenario: Scenario, context: Context) -> str:
    """Of this node's client; ValueError if it has none in the scenario."""
    names = [name for settings in scenario.clients for name in settings.names]
    name, place = context.node_config.get("client"), context.node_config.get("partition-id")
    if name is None and isinstance(place, int) and 0 <= place < len(names):
        return names[place]
    if name not in names:
        said = f"client = {name!r}" if name is not None else f"no client, partition-id = {place!r}"
        raise ValueError(f"node-config says {said}; scenario {scenario.name} has {', '.join(names)}")
    return str(name)


def _state(context: Context) -> Path:
    """The folder for what clients remember: the node's own, the environment's, or the user's."""
    given = context.node_config.get("state") or os.environ.get("GRPO_FED_STATE")
    users = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(str(given)) if given else Path(users) / "grpo_fed"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A message that comes while another process is still busy with the one before has to wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
