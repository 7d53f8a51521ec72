"""ClientApp: a message -> what one client makes of it -> a reply."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from grpo_fed.engines.flower.forward import MessageForwarder

app = ClientApp()
messenger = MessageForwarder()


@app.query("hello")
@app.train()
@app.query("measure")
@app.evaluate()
def follow(message: Message, context: Context) -> Message:
    """Do what the message says."""
    return Message(messenger.answer(message, context), reply_to=message)
