"""What a node and the server tell each other before the first instruction: whose node it is, and what is shared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod

from flwr.app import ConfigRecord, RecordDict

from grpo_fed.engines.wire.validation import FieldReader, InvalidMessageError, check_records, show
from grpo_fed.policy.language.shape import ModelShape
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.own_arguments import digest_entry
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import ACTION_KINDS, NO_STEP_LIMIT, ActionKind, TaskShape

HELLO = "query.hello"
"""The type of the Flower message that asks a node for the name of its client."""
SHARED_BLOCKS = "shared_blocks"
"""The record of an instruction's message that names the shared blocks."""
MAX_SIZE = 2**18
"""The most entries of an observation or an action that the server believes a client to have."""


@dataclass(frozen=True)
class Hello:
    """A node's answer to `HELLO`."""

    client: str
    shape: TaskShape | None = None
    """The shape of the client's task; None if the node cannot make it, which the client's first answer explains."""


def write_hello(hello: Hello) -> RecordDict:
    """Encode a node's answer to `HELLO`."""
    fields = ConfigRecord({"client": hello.client})
    if hello.shape is not None:
        fields["observation_size"], fields["kind"] = hello.shape.observation_size, hello.shape.kind
        fields["sizes"], fields["episode_limit"] = list(hello.shape.sizes), hello.shape.episode_limit
        if hello.shape.base:
            fields["base"] = hello.shape.base
        if hello.shape.picture:
            fields["picture"] = list(hello.shape.picture)
    return RecordDict({"hello": fields})


def read_hello(content: RecordDict) -> Hello:
    """Decode a node's answer to `HELLO`; InvalidMessageError for a task that cannot be."""
    check_records(content, {"hello"})
    fields = FieldReader(content, "hello", ConfigRecord)
    hello = Hello(fields.take("client", str), _read_shape(fields) if fields.has("kind") else None)
    fields.refuse_rest()
    return hello


def _read_shape(fields: FieldReader) -> TaskShape:
    observation_size, name = fields.take_count("observation_size", 1, MAX_SIZE), fields.take("kind", str)
    kind: ActionKind | None = next((kind for kind in ACTION_KINDS if kind == name), None)
    if kind is None:
        raise InvalidMessageError(f"hello.kind is {show(name)}; there are {', '.join(ACTION_KINDS)}")
    sizes = fields.take("sizes", list)
    are_counts = all(type(size) is int and size > 0 for size in sizes) and 0 < sum(sizes) <= MAX_SIZE
    if kind == "tokens":
        return _read_model_shape(fields, observation_size, sizes, are_counts)
    fits = len(sizes) > 1 if kind == "hybrid" else len(sizes) == 1 or kind == "multi-categorical"
    if not are_counts or not fits:
        raise InvalidMessageError(
            f"hello.sizes is {show(sizes)}; they have to be the sizes of a {kind} action, at most {MAX_SIZE} together"
        )
    limit = fields.take_count("episode_limit", 0, NO_STEP_LIMIT)
    return TaskShape(observation_size, kind, tuple(sizes), limit, picture=_read_picture(fields, observation_size))


def _read_picture(fields: FieldReader, observation_size: int) -> tuple[int, ...]:
    """Read the shape of an observation that is a picture; () without one."""
    if not fields.has("picture"):
        return ()
    shape = fields.take("picture", list)
    if len(shape) not in (2, 3) or any(type(size) is not int for size in shape) or prod(shape) != observation_size:
        raise InvalidMessageError(
            f"hello.picture is {show(shape)}; it has to be two or three sizes whose product is {observation_size}"
        )
    return tuple(shape)


def _read_model_shape(fields: FieldReader, context: int, sizes: list[int], are_counts: bool) -> TaskShape:
    """Read the shape of a language model's task: its sizes, and the digest of the frozen base."""
    base = fields.take("base", str)
    try:
        if not are_counts:
            raise ValueError(f"sizes are whole numbers above 0, at most {MAX_SIZE} together")
        ModelShape.from_sizes(tuple(sizes))
    except ValueError as error:
        raise InvalidMessageError(f"hello.sizes is {show(sizes)}; they are no language model's: {error}") from None
    if not re.fullmatch("[0-9a-f]{64}", base):
        raise InvalidMessageError(f"hello.base is {show(base)}; it has to be a SHA-256 digest")
    return TaskShape(context, "tokens", tuple(sizes), fields.take_count("episode_limit", 1, NO_STEP_LIMIT), base)


def write_shared_blocks(shared_blocks: SharedBlocks) -> ConfigRecord:
    """Encode the names and the digest of the shared blocks.

    A client that knows its own task alone needs the names; by the digest it finds out whether it has the same blocks.
    """
    fields = ConfigRecord({"blocks": json.dumps(shared_blocks.blocks), "digest": shared_blocks.digest})
    if shared_blocks.base:
        fields["base"] = shared_blocks.base
    return fields


def write_own_entry(fields: ConfigRecord, scenario: Scenario, client: str) -> ConfigRecord:
    """Add the digest of a client's own entry of the scenario to a copy of what `write_shared_blocks` returns."""
    return ConfigRecord({**fields, "entry": digest_entry(scenario, client)})


def check_own_entry(content: RecordDict, scenario: Scenario, client: str) -> None:
    """Raise InvalidMessageError if the server means another entry of the scenario than this client has."""
    fields = FieldReader(content, SHARED_BLOCKS, ConfigRecord) if SHARED_BLOCKS in content else None
    if fields is None or not fields.has("entry"):
        return
    if fields.take("entry", str) != digest_entry(scenario, client):
        raise InvalidMessageError(
            f"client {client} was not given the arguments of its own entry of the scenario, as a SuperLink gives them"
            " to a node with this client's key: connect with that key, and use the same version of grpo_fed everywhere"
        )


def read_shared_blocks(content: RecordDict) -> tuple[str, ...]:
    """Read the names of the shared blocks from an instruction's message; `Codec.read_instruction` checks the digest.

    InvalidMessageError if the message does not name any.
    """
    if SHARED_BLOCKS not in content:
        raise InvalidMessageError(f"the records are {show(sorted(content))}; {SHARED_BLOCKS} is missing")
    text = FieldReader(content, SHARED_BLOCKS, ConfigRecord).take("blocks", str)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidMessageError(f"{SHARED_BLOCKS}.blocks is {show(text)}; it has to be a JSON list of names")
    return tuple(names)
