"""What a node and a server must know of each other before there are instructions: whose node it is, what is shared."""

from __future__ import annotations

import json
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from grpo_fed.engines.wire.validation import FieldReader, InvalidMessageError, check_records, show
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.tasks.task import ACTION_KINDS, NO_STEP_LIMIT, ActionKind, TaskShape

HELLO = "query.hello"
"""The type of a Flower message that asks a node for the name of its client."""
WIDEST = 2**18
"""Entries of an observation, or of an action, that a server takes a client's word for."""


@dataclass(frozen=True)
class Hello:
    """What a node says of itself."""

    client: str
    shape: TaskShape | None = None
    """Of its task; None where that cannot be made there, which it will say when it is told to train."""


def write_hello(hello: Hello) -> RecordDict:
    """A node's answer to `HELLO`."""
    told = ConfigRecord({"client": hello.client})
    if hello.shape is not None:
        told["observation_size"], told["kind"] = hello.shape.observation_size, hello.shape.kind
        told["sizes"], told["episode_limit"] = list(hello.shape.sizes), hello.shape.episode_limit
    return RecordDict({"hello": told})


def read_hello(content: RecordDict) -> Hello:
    """What a node answered; `Refused` for a task that cannot be."""
    check_records(content, {"hello"})
    fields = FieldReader(content, "hello", ConfigRecord)
    hello = Hello(fields.take("client", str), _read_form(fields) if fields.has("kind") else None)
    fields.end()
    return hello


def _read_form(fields: FieldReader) -> TaskShape:
    size, told = fields.count("observation_size", 1, WIDEST), fields.take("kind", str)
    kind: ActionKind | None = next((kind for kind in ACTION_KINDS if kind == told), None)
    if kind is None:
        raise InvalidMessageError(f"hello.kind is {show(told)}; there are {', '.join(ACTION_KINDS)}")
    sizes = fields.take("sizes", list)
    right = all(type(one) is int and one > 0 for one in sizes) and 0 < sum(sizes) <= WIDEST
    if not right or (len(sizes) > 1 and kind != "multi-categorical"):
        raise InvalidMessageError(
            f"hello.sizes is {show(sizes)}; they have to be what a {kind} action has, {WIDEST} at most"
        )
    return TaskShape(size, kind, tuple(sizes), fields.count("episode_limit", 0, NO_STEP_LIMIT))


def write_shared_blocks(commons: SharedBlocks) -> ConfigRecord:
    """What a client must be told that knows no other's task: `commons` in an instruction's message."""
    return ConfigRecord({"blocks": json.dumps(commons.blocks), "digest": commons.digest})


def read_shared_blocks(content: RecordDict) -> tuple[str, ...]:
    """The names of the shared blocks, which come with an instruction; that they are the right ones is for the `Wire`.

    `Refused` if there are none.
    """
    if "commons" not in content:
        raise InvalidMessageError(f"the records are {show(sorted(content))}; commons is missing")
    text = FieldReader(content, "commons", ConfigRecord).take("blocks", str)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidMessageError(f"commons.blocks is {show(text)}; it has to be a JSON list of names")
    return tuple(names)
