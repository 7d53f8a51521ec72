"""ClientApp: takes a message, lets its client answer, and replies."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grpo_fed.engines.flower.forward import MessageForwarder

app = ClientApp()
forwarder = MessageForwarder()


@app.query("hello")
@app.train()
@app.query("measure")
@app.evaluate()
def reply(message: Message, context: Context) -> Message:
    """Reply with the client's answer."""
    return Message(forwarder.answer(message, context), reply_to=message)
