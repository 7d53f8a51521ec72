"""ClientApp: takes a message, lets its client answer, and replies. It is for Flower's own SuperNodes."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grpo_fed.engines.flower.node import NodeHandler
from grpo_fed.engines.wire.packing import is_packed, pack_into_record, unpack_from_record

app = ClientApp()
node = NodeHandler()


@app.query("hello")
@app.train()
@app.query("measure")
@app.query("secure")
@app.evaluate()
def reply(message: Message, context: Context) -> Message:
    """Reply with the client's answer."""
    packed = is_packed(message.content)
    content = unpack_from_record(message.content) if packed else message.content
    scenario = str(context.run_config["scenario"])
    answer = node.answer(message.metadata.message_type, content, scenario, context.node_config)
    return Message(pack_into_record(answer) if packed else answer, reply_to=message)
