"""A Flower app whose clients are learners of another library.

    def make(client: ClientInfo) -> TorchLearner: ...

    app = client_app(make)

`make` is called for every instruction. The app answers training, evaluation, and the queries by which
`grpo_fed.flower.Grouped` keeps within KL budgets.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from grpo_fed.adapters.learner import TorchLearner, load_module, module_arrays, policy_kl
from grpo_fed.adapters.memory import recall, recall_observations, remember
from grpo_fed.flower.measurement import answer_query, to_arrays, to_record
from grpo_fed.flower.strategy import NAME

STATES = 256
"""Observations that a client keeps to measure KL on."""


@dataclass(frozen=True)
class ClientInfo:
    """Says for which client a learner is made, and for which round."""

    name: str
    """The client's name: `name` of its node's configuration, else `client-` and its number."""
    number: int = 0
    """The number of its part of the data, `partition-id`, where the node has one."""
    round: int = 0
    """The server's round."""
    seed: int = 0
    """A seed of its own for every client and round, from `seed` of the run's configuration."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration."""


MakeLearner: TypeAlias = Callable[[ClientInfo], TorchLearner]


def client_app(make: MakeLearner, states: int = STATES) -> ClientApp:
    """Make the app. states: observations that a client keeps to measure KL on."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, learner = _make(make, message, context, "arrays")
        report = learner.train()
        remember(learner, report, context.state, states, client.seed)
        return Message(
            RecordDict(
                {
                    "arrays": to_record(module_arrays(learner.module)),
                    "metrics": MetricRecord({**report.metrics, "num-examples": report.examples}),
                    "config": ConfigRecord({NAME: client.name}),
                }
            ),
            reply_to=message,
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        _, learner = _make(make, message, context, "arrays")
        if learner.evaluate is None:
            raise ValueError("the learner has no function `evaluate`; give it one, or set fraction_evaluate=0")
        metrics = MetricRecord({**learner.evaluate(), "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        _, learner = _make(make, message, context, "before")
        observations = recall_observations(context.state)
        return answer_query(
            message, lambda before, after: policy_kl(learner, to_arrays(before), to_arrays(after), observations)
        )

    return app


def initial_arrays(make: MakeLearner, config: Mapping[str, Any] | None = None) -> ArrayRecord:
    """Make the arrays that a server begins with. config: the run's configuration."""
    return to_record(module_arrays(make(_info("server", 0, 0, config or {})).module))


def _make(make: MakeLearner, message: Message, context: Context, arrays: str) -> tuple[ClientInfo, TorchLearner]:
    """Make a client's learner, with the server's arrays and what the client remembers."""
    number, node = int(context.node_config.get("partition-id", 0)), context.node_config
    config = message.content.config_records.get("config", ConfigRecord())
    round = int(str(config.get("server-round", 0)))
    client = _info(str(node.get("name", f"client-{number}")), number, round, context.run_config)
    learner = make(client)
    load_module(learner.module, to_arrays(message.content.array_records[arrays]))
    recall(learner, context.state)
    return client, learner


def _info(name: str, number: int, round: int, config: Mapping[str, Any]) -> ClientInfo:
    entropy = [int(config.get("seed", 0)), zlib.crc32(name.encode()), round]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
    return ClientInfo(name, number, round, seed, config)
