"""Takes replies from a grid one by one; what a client has sent is measured before it is decoded.

Flower's grid decodes all replies to a question together: one that cannot be decoded would end the run with all others,
and an object of a megabyte may stand for an array of gigabytes, since an array names its chunks as often as it likes.
What is named here as the reply to a message is what the SuperLink has checked, not what the reply says of itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self, final

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid

from grpo_fed.engines.wire.flower_private import (
    ConfirmMessageReceivedRequest,
    ObjectPullError,
    ObjectTree,
    PullAppMessagesRequest,
    get_object_body,
    get_object_head_values_from_object_content,
    inflate_object_from_contents,
    iterate_object_tree,
    make_pull_object_fn_protobuf,
    pull_objects,
)
from grpo_fed.engines.wire.grids import to_one_line
from grpo_fed.engines.wire.validation import InvalidMessageError
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.records import Failure

CHUNK = 1_000_000
"""Bytes of an array to which a reply may have an object: Flower's own chunks have five times as many."""
FEW_OBJECTS = 32
"""Objects of a reply besides the chunks of its arrays: the message, its records and arrays."""
RECORDS = 1_000_000
"""Bytes of a reply besides its arrays, however little is shared: numbers and names, which take more when decoded."""
UPLOAD_PATIENCE = 60.0
"""Seconds that the parts of a reply may take to arrive at the SuperLink after the reply itself."""
KINDS = {"Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array", "ArrayChunk"}


@final
@dataclass(frozen=True)
class ReplyLimits:
    """Limits what a client may send in a reply."""

    arrays: int
    """Bytes of all arrays together, as they are decoded."""
    records: int
    """Bytes of everything else."""

    @classmethod
    def of(cls, shared_blocks: SharedBlocks) -> Self:
        """Allow a point and a Fisher diagonal of the shared blocks, and numbers for each block and group."""
        names = len(shared_blocks.blocks) + len(shared_blocks.groups.names)
        return cls(2 * 4 * shared_blocks.size + 10_000, RECORDS + 1000 * names)

    @property
    def total(self) -> int:
        """Bytes of the whole reply."""
        return self.arrays + self.records

    @property
    def objects(self) -> int:
        """The number of objects that the message may consist of."""
        return FEW_OBJECTS + self.arrays // CHUNK


def pull_replies(
    grid: Any, message_ids: Collection[str], limits: ReplyLimits, wait: float = 0.0
) -> Iterator[tuple[str, Message | Failure]]:
    """Ask a grid for replies once; yield the id of each message that has one, with the reply.

    A reply that is too large or cannot be decoded is a failure of kind `refused`, and one that never arrives whole is
    `late`; the others do not depend on it.

    wait: seconds for which a grid that can wait for replies, `flower.superlink_grid.SuperLinkGrid`, may do so.
    """
    if getattr(grid, "waits", False):
        yield from grid.pull_replies(message_ids, limits, wait)
        return
    if hasattr(type(grid), "_runtime_client"):
        yield from _pull_from_superlink(grid, message_ids, limits)
        return
    try:
        replies = list(grid.pull_messages(list(message_ids)))
    except Exception:  # noqa: BLE001, one of them could not be decoded, so each is asked for by itself
        yield from _pull_one_by_one(grid, message_ids)
        return
    for reply in replies:
        yield reply.metadata.reply_to_message_id, reply


def _pull_one_by_one(grid: Grid, message_ids: Collection[str]) -> Iterator[tuple[str, Message | Failure]]:
    """Pull from a grid that decodes in its own way."""
    for message_id in message_ids:
        try:
            for reply in grid.pull_messages([message_id]):
                yield message_id, reply
        except Exception as error:  # noqa: BLE001, whatever the decoding raises is this client's
            yield message_id, _refused(error)


def _pull_from_superlink(
    grid: Any, message_ids: Collection[str], limits: ReplyLimits
) -> Iterator[tuple[str, Message | Failure]]:
    """Pull as Flower's `HttpGrid.pull_messages` does, with our checks in between."""
    client, node, run = grid._runtime_client, grid.node, grid.run.run_id
    response = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
    for reply, tree in zip(response.messages_list, response.message_object_trees, strict=True):
        fetch = _limited(make_pull_object_fn_protobuf(client.PullObject, node, run), limits)
        reply_id, answered = reply.metadata.message_id, reply.metadata.reply_to_message_id
        outcome: Message | Failure
        try:
            contents = pull_objects(_list_objects(tree, limits), fetch, max_time=UPLOAD_PATIENCE)
        except ObjectPullError as error:
            yield answered, Failure("late", to_one_line(f"its reply never arrived whole: {error}"))
            continue
        except InvalidMessageError as error:
            outcome = _refused(error)
        else:
            try:
                outcome = _decode(reply_id, contents, limits)
            except Exception as error:  # noqa: BLE001, whatever the decoding raises is this client's
                outcome = _refused(error)
        client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=reply_id))
        yield answered, outcome


def _list_objects(tree: ObjectTree, limits: ReplyLimits) -> list[str]:
    """List the ids of a reply's objects; InvalidMessageError if there are too many."""
    ids: dict[str, None] = {}
    for count, part in enumerate(iterate_object_tree(tree), 1):
        if count > limits.objects:
            raise InvalidMessageError(f"it consists of more than {limits.objects} objects")
        ids[part.object_id] = None
    return list(ids)


def _limited(pull: Any, limits: ReplyLimits) -> Any:
    """Pull objects until they are too large together; InvalidMessageError then."""
    lock, total = Lock(), 0

    def pull_object(object_id: str) -> bytes:
        nonlocal total
        content: bytes = pull(object_id)
        with lock:
            total += len(content)
            if total > limits.total:
                raise InvalidMessageError(f"it has more than {limits.total:,} bytes")
        return content

    return pull_object


def _decode(message_id: str, contents: dict[str, bytes], limits: ReplyLimits) -> Message:
    """Decode a reply once it is known how large it will be; an error of any kind if it is none."""
    check_size(contents, limits)
    message = inflate_object_from_contents(message_id, contents)
    if not isinstance(message, Message) or not (message.has_error() or isinstance(message.content, RecordDict)):
        raise InvalidMessageError("it is no message with records")
    return message


def check_size(contents: Mapping[str, bytes], limits: ReplyLimits) -> None:
    """InvalidMessageError if objects would be too large once they are decoded; they are by their ids."""
    arrays = records = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind not in KINDS:
            raise InvalidMessageError(f"it has an object of type {to_one_line(kind)}")
        if kind == "Array":
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            arrays += sum(len(contents[children[index]]) for index in chunks)
        if kind != "ArrayChunk":
            records += len(content)
    # a packed content is one record, with its arrays in it
    if arrays > limits.arrays or arrays + records > limits.total:
        raise InvalidMessageError(
            f"its arrays have {arrays:,} bytes and all else {records:,}; at most {limits.arrays:,} and"
            f" {limits.records:,} are allowed"
        )


def _refused(error: Exception) -> Failure:
    """Refuse a reply for what its decoding has raised."""
    text = str(error) if isinstance(error, InvalidMessageError) else f"{type(error).__name__}: {error}"
    return Failure("refused", to_one_line(f"its reply cannot be decoded: {text}"))
