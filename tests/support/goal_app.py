"""A Flower app whose clients move their arrays towards goals, for tests of strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from grpo_fed.flower import answer_query
from grpo_fed.flower.measurement import to_arrays, to_record
from tests.support.in_memory_grid import InMemoryGrid

ARRAYS = {
    "torso.weight": np.zeros((20, 3), np.float32),
    "torso.bias": np.zeros(3, np.float32),
    "actor.weight": np.zeros((3, 20), np.float32),
    "critic.weight": np.zeros(4, np.float32),
    "steps": np.zeros((), np.int64),
}
BLOCKS = {"torso": ["torso.*"], "actor": ["actor.*"]}


def half_square(before: ArrayRecord, after: ArrayRecord) -> float:
    """Half of the squared distance of the shared arrays: the KL between Gaussians of variance 1 with these means."""
    old, new = to_arrays(before), to_arrays(after)
    return sum(float(((new[name] - old[name]) ** 2).sum()) / 2 for name in old if name.startswith(("torso", "actor")))


class GoalClient:
    """A client that goes a part of the way to its goals, with some noise, and counts its steps."""

    def __init__(self, node: int, goals: Mapping[str, float], weight: float = 1.0, name: str = "", kl: bool = True):
        """goals: the value of all entries of an array, by its name."""
        self.goals, self.weight, self.name = goals, weight, name
        self.noise = np.random.default_rng(node)
        self.received: list[dict[str, np.ndarray]] = []
        """The models that came with instructions to train, in order."""
        self.configs: list[dict[str, object]] = []
        self.app = app = ClientApp()
        app.train()(self.train)
        app.evaluate()(self.evaluate)
        if kl:
            app.query()(lambda message, context: answer_query(message, half_square))

    def __call__(self, message: Message) -> RecordDict:
        context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        return self.app(message, context).content

    def train(self, message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        self.received.append(arrays)
        self.configs.append(dict(message.content["config"]))
        trained = {"steps": arrays["steps"] + 1}
        for name, goal in self.goals.items():
            noise = 0.05 * self.noise.normal(size=arrays[name].shape).astype(np.float32)
            trained[name] = arrays[name] + np.float32(0.25) * (np.float32(goal) - arrays[name]) + noise
        content = {
            "arrays": to_record({**arrays, **trained}),
            "metrics": MetricRecord({"num-examples": self.weight, "loss": float(self.weight)}),
        }
        if self.name:
            content["config"] = ConfigRecord({"client-name": self.name})
        return Message(RecordDict(content), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        actor = float(to_arrays(message.content["arrays"])["actor.weight"].mean())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "actor": actor})}), reply_to=message)


def run_rounds(strategy: Strategy, grid: InMemoryGrid, rounds: int, arrays: Mapping[str, np.ndarray] = ARRAYS):
    """Run a strategy over a grid, as an app's server does."""
    return strategy.start(grid=grid, initial_arrays=to_record(arrays), num_rounds=rounds, timeout=1.0)


def train_messages(grid: InMemoryGrid, messages: Iterable[Message]) -> list[Message]:
    """Send messages of training and return the replies."""
    given = list(messages)
    assert {message.metadata.message_type for message in given} <= {MessageType.TRAIN}
    return list(grid.send_and_receive(given))
