"""Grouped: a strategy of Flower's own kind, for any Flower app, in the place of FedAvg.

    from grpo_fed.flower import Grouped
    strategy = Grouped(FedAvg(fraction_train=0.5), blocks={"torso": ["torso.*"], "actor": ["actor.*"]})
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=30)

It asks FedAvg which nodes take part, how they are configured and how metrics are averaged; the arrays are merged by our
rules. A node gets all arrays of its model, the shared blocks and of the rest what it sent last, so an app's clients
need no state and no change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from grpo_fed.aggregation.proximity import StepFractions
from grpo_fed.flower.array_blocks import cut_array_blocks
from grpo_fed.flower.block_server import (
    ArraysMerge,
    ArraysReply,
    BlockServer,
    Candidate,
    check_merge_settings,
)
from grpo_fed.flower.grouped_round import GroupedRound, tracked_numbers
from grpo_fed.flower.measurement import make_query, read_answer, to_arrays, to_record
from grpo_fed.policy.groups import GroupKind
from grpo_fed.policy.patterns import values_by_name
from grpo_fed.runs.tracking.nested_runs import NestedRuns
from grpo_fed.scenario.settings import MergeSettings, ProximitySettings
from grpo_fed.scenario.tables import is_import_path
from grpo_fed.scenario.toml.text import short_toml, shorten

NAME = "client-name"
"""The key of a reply's configuration by which a client names itself; a node without one is called by its number."""

NO_FUNCTION = "No query function registered"
"""What Flower says of an app without a function for queries."""

log = logging.getLogger("flwr")


@final
class Grouped(Strategy):
    """Merges the clients of a Flower app block by block, within budgets, and lets clients depart."""

    def __init__(
        self,
        strategy: FedAvg | None = None,
        *,
        blocks: Mapping[str, Sequence[str]] | None = None,
        chains: Sequence[Sequence[str]] = (),
        groups: GroupKind = "block",
        rule: str | MergeSettings = "persistence",
        budget: float | Mapping[str, float] | None = None,
        joint_budget: float | None = None,
        over: Literal["mean", "median", "worst"] = "mean",
        measure: Literal["clients", "distance"] = "clients",
        measure_timeout: float = 600.0,
        mlflow: str | None = None,
        experiment: str = "grouped",
    ) -> None:
        """Merge by a rule, within budgets if some are given.

        strategy: Flower's FedAvg, or one that chooses nodes, configures them or averages metrics in its own way.
        blocks: for each shared block patterns of its arrays; arrays in no block stay with each client. None makes
        a block of each module, and shares all.
        chains: blocks that follow each other from input to output; of a chain in conflict a client leaves the first
        block that explains it. groups: what a client leaves as one.
        rule: a merge rule's name, or `MergeSettings` with its keys.
        budget: of the step of each block, or by patterns of blocks; joint_budget: of all blocks together.
        over: whose KL counts: the clients' mean, their median, or the worst.
        measure: `clients` asks them for the KL of a step, and they answer by `answer_query`; `distance` takes half the
        squared distance in its place, which is the KL of a policy whose Fisher matrix is the identity.
        measure_timeout: seconds that such a question waits.
        mlflow: a server or a database for a run with one for each client inside it, in the experiment of this name.

        ValueError for values that contradict each other.
        """
        self.strategy = FedAvg() if strategy is None else strategy
        if getattr(type(self.strategy), "aggregate_train", None) is not FedAvg.aggregate_train:
            raise ValueError(
                f"strategy: {type(self.strategy).__name__} merges arrays in its own way; give FedAvg, or FedProx, and"
                " choose a rule"
            )
        self.blocks, self.chains, self.groups = blocks, chains, groups
        for name, value in _budgets(budget, joint_budget):
            if not value >= 0:
                raise ValueError(f"{name} = {value}: a budget is 0, which moves nothing, or more")
        self.rule = MergeSettings(rule=rule) if isinstance(rule, str) else rule
        check_merge_settings(self.rule)
        self.budget, self.joint_budget, self.over = budget, joint_budget, over
        self.measure, self.measure_timeout = measure, measure_timeout
        for name, reason in self._idle_arguments():
            raise ValueError(f"{name}: has no effect, {reason}; leave it out")
        self.history: list[GroupedRound] = []
        """The rounds so far."""
        self._server: BlockServer | None = None
        self._names: dict[int, str] = {}
        """The names of the nodes that have answered."""
        self._grid: Grid | None = None
        self._asked: frozenset[int] = frozenset()
        """The nodes that were asked to train in this round."""
        params = {"rule": self.rule.rule, "budget": budget, "joint_budget": joint_budget, "over": over}
        self._tracked = None if mlflow is None else NestedRuns(mlflow, experiment, f"Grouped {self.rule.rule}", params)

    @property
    def departed(self) -> dict[str, tuple[str, ...]]:
        """The groups that each client is out of; only clients that are out of some."""
        if self._server is None:
            return {}
        groups = self._server.shared_blocks.groups.names
        left = self._server.departed
        return {client: tuple(groups[group] for group in numbers) for client, numbers in left.items() if numbers}

    def arrays_of(self, client: str | int) -> ArrayRecord:
        """Return the model that a client would begin with now. client: its name, or the number of its node."""
        return to_record(self._begun.arrays_of(self._name(client) if isinstance(client, int) else client))

    def summary(self) -> None:
        """Log what the strategy does."""
        self.strategy.summary()
        budgets = "none" if self._mode == "off" else f"{self.budget} a block, {self.joint_budget} together"
        unit = {"off": "", "measured": ", KL measured by clients", "quadratic": ", half a squared distance"}[self._mode]
        log.info("\t├──> Grouped:")
        log.info("\t│\t├── Rule: %s", self.rule.rule)
        log.info("\t│\t├── Blocks: %s", "one for each module" if self.blocks is None else ", ".join(self.blocks))
        log.info("\t│\t└── Budgets: %s%s", budgets, unit)

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run all rounds, as Flower's own strategies do, and end the runs of MLflow. The arguments are Flower's."""
        status = "FAILED"
        try:
            result = super().start(*args, **kwargs)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if self._tracked is not None:
                self._tracked.close(status)
        return result

    # Training ------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each chosen node its own model."""
        self._grid = grid
        if self._server is None:
            self._server = self._begin(arrays)
        else:
            self._server.arrays = to_arrays(arrays)  # another strategy around this one may have changed them
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._asked = frozenset(message.metadata.dst_node_id for message in messages)
        return [self._with_own_arrays(message) for message in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what the nodes have learned, and average their metrics."""
        record = GroupedRound(server_round)
        self.history.append(record)
        answers, contents = self._read_replies(replies, record)
        if not answers:
            return None, None
        server = self._begun
        before = self.departed
        merged = server.merge(answers, self._ask)
        self._describe(record, merged, answers, before)
        for note in record.notes:
            log.info("\t> %s", note)
        for name, left in record.left.items():
            log.info("\t> %s leaves %s", name, ", ".join(left))
        key = self.strategy.weighted_by_key
        has_weight = any(answer.weight for answer in answers.values())
        metrics = self.strategy.train_metrics_aggr_fn(contents, key) if has_weight else None
        return to_record(server.arrays), metrics

    def _read_replies(
        self, replies: Iterable[Message], record: GroupedRound
    ) -> tuple[dict[str, ArraysReply], list[RecordDict]]:
        """Read the valid replies by client, in the order of their names, and note why others are not."""
        answers: dict[str, ArraysReply] = {}
        contents: dict[str, RecordDict] = {}
        given = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        silent = self._asked - {reply.metadata.src_node_id for reply in given}
        failures = {self._name(node): "it did not answer in time" for node in sorted(silent)}
        for reply in given:
            node = reply.metadata.src_node_id
            try:
                answer = self._read_reply(reply)
            except ValueError as error:
                failures[self._name(node)] = shorten(str(error), 300)
                log.info("\t> %s: %s", self._name(node), failures[self._name(node)])
                continue
            name = self._claim_name(node, _read_name(reply) or str(node))
            answers[name], contents[name] = answer, reply.content
            record.train[name] = _numbers(reply.content)
        record.failures = failures
        log.info("aggregate_train: %s results, %s failures", len(answers), len(failures))
        return {name: answers[name] for name in sorted(answers)}, [contents[name] for name in sorted(contents)]

    def _read_reply(self, reply: Message) -> ArraysReply:
        """Read a reply; ValueError saying why it cannot be merged."""
        if reply.has_error():
            raise ValueError(reply.error.reason)
        content, key = reply.content, self.strategy.weighted_by_key
        arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1:
            raise ValueError("it sent other than one ArrayRecord and one MetricRecord")
        weight = metrics[0].get(key)
        if weight is None or isinstance(weight, list):
            raise ValueError(f'its MetricRecord has no number "{key}", which is its weight')
        return self._begun.read_reply(to_arrays(arrays[0]), float(weight))

    # Evaluation ----------------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each chosen node its own model."""
        messages = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return [self._with_own_arrays(message) for message in messages]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the nodes' metrics."""
        given = list(replies)
        if self.history:
            of_round = self.history[-1].evaluate
            for reply in given:
                if not reply.has_error():
                    of_round[self._name(reply.metadata.src_node_id)] = _numbers(reply.content)
            if self._tracked is not None:
                whole, clients = tracked_numbers(self.history[-1], self._begun.shared_blocks.names.block_of_group)
                self._tracked.round(server_round, whole, clients)
        return self.strategy.aggregate_evaluate(server_round, given)

    # What both need ------------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> BlockServer:
        assert self._server is not None, "Flower configures a round before it aggregates it"
        return self._server

    @property
    def _mode(self) -> Literal["measured", "quadratic", "off"]:
        """The mode of `proximity` that the budgets mean."""
        if self.budget is None and self.joint_budget is None:
            return "off"
        return "measured" if self.measure == "clients" else "quadratic"

    def _idle_arguments(self) -> Iterator[tuple[str, str]]:
        """Name the arguments that are given and have no effect beside the others, with the reason."""
        rule = self.rule.rule
        if self.chains and rule != "persistence":
            yield "chains", f'as only rule="persistence" asks which block comes first, and not "{rule}"'
        if self.groups != "block" and rule not in ("persistence", "huber") and not is_import_path(rule):
            yield "groups", f'as with rule="{rule}" no client leaves any'
        if self._mode == "off" and self.measure != "clients":
            yield "measure", "without a budget or a joint_budget"
        if self._mode != "measured" and self.over != "mean":
            yield "over", "where clients measure nothing"

    def _begin(self, arrays: ArrayRecord) -> BlockServer:
        """Cut the app's initial arrays into blocks; ValueError for settings that do not fit them."""
        initial = to_arrays(arrays)
        shared_blocks = cut_array_blocks(initial, self.blocks, self.chains, self.groups)
        by_pattern = {"*": self.budget} if isinstance(self.budget, int | float) else self.budget or {}
        budgets = dict(values_by_name(by_pattern, shared_blocks.blocks, "budget", "block"))
        proximity = ProximitySettings(
            mode=self._mode, kl_block=None, kl_joint=self.joint_budget, blocks={**budgets}, over=self.over
        )
        return BlockServer(shared_blocks, initial, self.rule, proximity)

    def _with_own_arrays(self, message: Message) -> Message:
        """Return a message with the model of its node."""
        metadata = message.metadata
        arrays = to_record(self._begun.arrays_of(self._name(metadata.dst_node_id)))
        content = RecordDict({**message.content, self.strategy.arrayrecord_key: arrays})
        return _message(content, metadata.dst_node_id, metadata.message_type)

    def _ask(self, candidates: Mapping[str, Candidate], fractions: Sequence[StepFractions]) -> dict[str, list[float]]:
        """Ask nodes for the KL of steps; return the valid answers.

        ValueError where no node has a function for this question: without one nothing would ever move.
        """
        assert self._grid is not None, "Flower configures a round before it aggregates it"
        layout = self._begun.shared_blocks.layout
        node_of = {name: node for node, name in self._names.items()}
        messages = [
            _message(make_query(candidate, fractions, layout), node_of[name], MessageType.QUERY)
            for name, candidate in candidates.items()
        ]
        answers: dict[str, list[float]] = {}
        reasons: list[str] = []
        for reply in self._grid.send_and_receive(messages, timeout=self.measure_timeout):
            name = self._name(reply.metadata.src_node_id)
            try:
                if reply.has_error():
                    raise ValueError(reply.error.reason)
                answers[name] = read_answer(reply.content, len(fractions))
            except ValueError as error:
                reasons.append(str(error))
                log.info("\t> %s does not measure: %s", name, shorten(str(error), 300))
        if not answers and reasons and all(NO_FUNCTION in reason for reason in reasons):
            raise ValueError(
                "budget: no client measures KL; register grpo_fed.flower.answer_query as the app's query function, or"
                ' set measure="distance"'
            )
        return answers

    def _describe(
        self,
        record: GroupedRound,
        merged: ArraysMerge,
        answers: Mapping[str, ArraysReply],
        before: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Write what a merge came to into the round's record. before: the groups that clients were out of."""
        names = self._begun.shared_blocks.groups.names
        record.weights = {client: answer.weight for client, answer in answers.items()}
        record.step, record.notes, record.departed = merged.step, merged.notes, self.departed
        record.kl = merged.kl
        record.rho = {
            client: {group: value for group, value in zip(names, rho.tolist(), strict=True) if math.isfinite(value)}
            for client, rho in merged.findings.rho.items()
        }
        left = {
            client: tuple(group for group in groups if group not in before.get(client, ()))
            for client, groups in record.departed.items()
        }
        record.left = {client: groups for client, groups in left.items() if groups}

    def _claim_name(self, node: int, name: str) -> str:
        """Return the name of a node that has answered, as it gave it first.

        A name belongs to the first node that has it, since another one would get that client's own parameters, and a
        number to the node of this number.
        """
        if node not in self._names:
            is_taken = name in self._names.values() or (name.isdigit() and name != str(node))
            self._names[node] = f"{name}@{node}" if is_taken else name
        return self._names[node]

    def _name(self, node: int) -> str:
        """Return the name of a node's client."""
        return self._names.get(node, str(node))


def _budgets(budget: float | Mapping[str, float] | None, joint: float | None) -> Iterator[tuple[str, float]]:
    """Yield each budget with its name."""
    if isinstance(budget, Mapping):
        yield from ((f"budget[{short_toml(pattern)}]", value) for pattern, value in budget.items())
    elif budget is not None:
        yield "budget", budget
    if joint is not None:
        yield "joint_budget", joint


def _read_name(reply: Message) -> str | None:
    """Return the name that a client gives itself, if it does."""
    names = (config.get(NAME) for config in reply.content.config_records.values())
    return next((name for name in names if isinstance(name, str)), None)


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content=content, dst_node_id=node, message_type=kind)


def _numbers(content: RecordDict) -> dict[str, float]:
    """Return the single numbers that a reply reports."""
    return {
        key: float(value)
        for metrics in content.metric_records.values()
        for key, value in metrics.items()
        if not isinstance(value, list)
    }
