"""Answers as Flower's records, and back: what a client writes and the server reads.

The server does not trust a client: an answer that cannot be true is refused, whatever in it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from grpo_fed.engines.wire.arrays import GroupSelection, check_finite, decode_vector, encode_vector
from grpo_fed.engines.wire.secure import SecureCodec
from grpo_fed.engines.wire.validation import LARGEST, FieldReader, InvalidMessageError, check_records, show
from grpo_fed.federation.comparison import TIMES
from grpo_fed.federation.compression import add_difference
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    SecureParts,
    SecureStep,
    SharingComparison,
    Train,
    Trained,
)
from grpo_fed.federation.withheld_metrics import are_withheld
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.metrics import is_reported
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.curriculum import PER_SLOT

MOST_METRICS = 10_000
"""Numbers that a client may report in an answer: names of blocks may be any."""
LONGEST_EPISODE = 1_000_000
"""Steps of an episode that a client may report, however long its task lets it be: a node names that limit itself."""
NO_POINT = np.zeros(0, np.float32)
"""In the place of a point that is masked."""
MAX_DISTANCE = 100.0
"""The largest distance of a client's point from the shared blocks s, in units of 1 + ||s||."""


@final
class AnswerCodec:
    """Encodes and decodes the answers of one federation's clients.

    The answer to `Train` has the records `arrays` (the point, or with `wire.dtype = "float16"` its difference; the
    Fisher diagonal; with secure aggregation a masked vector alone), `selection` (the point's groups that travel; not of
    a masked vector), `training` (counts, returns, KL) and `metrics`; to `Measure`, `measurement`; to `Evaluate`,
    `evaluation`, which the answer to `Train` has too where it was asked for, as it may have a `comparison`.
    """

    def __init__(self, shared_blocks: SharedBlocks, scenario: Scenario, groups: GroupSelection) -> None:
        self._scenario, self._groups = scenario, groups
        self._size, self._blocks = shared_blocks.size, len(shared_blocks.blocks)
        self._secure = SecureCodec(shared_blocks, scenario)
        self._withholds = are_withheld(scenario)
        self._max_episode_steps = shared_blocks.max_episode_steps
        self._needs_fisher = scenario.merge.rule == "fisher" or scenario.proximity.mode == "quadratic"

    def write(self, instruction: Instruction, answer: Answer) -> RecordDict:
        """Encode an answer to the instruction."""
        match answer:
            case Trained():
                return self._write_trained(instruction.start.shared, answer)
            case Measured():
                return RecordDict({"measurement": MetricRecord({"kl": [float(kl) for kl in answer.kl]})})
            case Evaluated():
                return RecordDict({"evaluation": _write_summary(answer.summary)})
            case SecureParts():
                return self._secure.write_parts(answer)

    def read(self, instruction: Instruction, content: RecordDict) -> Answer:
        """Decode a reply; InvalidMessageError if it does not answer the instruction, or cannot be true."""
        match instruction:
            case Train():
                return self._read_trained(instruction, content)
            case Measure():
                check_records(content, {"measurement"})
                fields = FieldReader(content, "measurement", MetricRecord)
                kl = fields.take_divergences("kl", len(instruction.fractions))
                fields.refuse_rest()
                return Measured(kl)
            case Evaluate():
                check_records(content, {"evaluation"})
                return Evaluated(self._read_summary(content, instruction.plan))
            case SecureStep():
                return self._secure.read_parts(instruction, content)

    # The answer to `Train`

    def _write_trained(self, shared: np.ndarray, trained: Trained) -> RecordDict:
        if trained.masked is not None:
            return self._with_numbers(trained, {"masked": encode_vector(trained.masked, "uint32")})
        point = np.asarray(trained.point, np.float32)
        groups = self._groups.select_changed(point, shared)
        if self._scenario.wire.dtype == "float16":
            assert trained.difference is not None, "clients round what they have learned"
            arrays = {"difference": encode_vector(self._groups.extract(trained.difference, groups), "float16")}
        else:
            arrays = {"point": encode_vector(self._groups.extract(point, groups))}
        if trained.fisher is not None:
            arrays["fisher"] = encode_vector(trained.fisher)
        return self._with_numbers(trained, arrays, groups)

    def _with_numbers(
        self, trained: Trained, arrays: Mapping[str, Array], groups: np.ndarray | None = None
    ) -> RecordDict:
        """Encode an answer with these arrays; groups: those that travel, [G] bool; None for a masked vector."""
        training = MetricRecord({"steps": int(trained.steps), "episodes": int(trained.episodes)})
        training["gain"], training["spread"] = float(trained.gain), float(trained.spread)
        training["low"] = int(trained.low)
        if trained.since is not None:
            training["since"] = int(trained.since)
        if trained.evidence:
            training["evidence"] = [float(value) for value in trained.evidence]
        if trained.kl is not None:
            training["kl"] = [float(kl) for kl in trained.kl]
        content = RecordDict(
            {
                "arrays": ArrayRecord(dict(arrays)),
                "training": training,
                "metrics": MetricRecord({name: float(value) for name, value in trained.metrics.items()}),
            }
        )
        if groups is not None:
            content["selection"] = ConfigRecord({"groups": self._groups.pack(groups)})
        if trained.evaluation is not None:
            content["evaluation"] = _write_summary(trained.evaluation)
        if trained.comparison is not None:
            content["comparison"] = _write_comparison(trained.comparison)
        return content

    def _read_trained(self, train: Train, content: RecordDict) -> Trained:
        more = {"evaluation"} if train.evaluate_first else set()
        more |= {"comparison"} if train.compare and "comparison" in content else set()
        more |= {"selection"} if train.mask is None else set()
        check_records(content, {"arrays", "training", "metrics"} | more)
        arrays = FieldReader(content, "arrays", ArrayRecord)
        point, fisher, masked = NO_POINT, None, None
        if train.mask is None:
            selection = FieldReader(content, "selection", ConfigRecord)
            point, fisher = self._read_point(arrays, selection, train.start.shared), self._read_fisher(arrays)
            selection.refuse_rest()
        else:
            masked = self._secure.read_masked(arrays)
        arrays.refuse_rest()
        fields = FieldReader(content, "training", MetricRecord)
        steps = fields.take_count("steps", 0, self._max_steps(train.start.round))
        has_kl = train.measure_last_step and fields.has("kl")
        episodes = fields.take_count("episodes", 0, steps)
        trained = Trained(
            point=point,
            steps=steps,
            episodes=episodes,
            gain=fields.take_float("gain"),
            spread=fields.take_float("spread", 0),
            metrics=_read_metrics(content, 0 if self._withholds else MOST_METRICS),
            fisher=fisher,
            kl=fields.take_divergences("kl", 1 + self._blocks) if has_kl else None,
            evaluation=self._read_summary(content, train.evaluate_first) if train.evaluate_first else None,
            low=bool(fields.take_count("low", 0, 1)),
            since=fields.take_count("since", 0, train.start.round - 2) if fields.has("since") else None,
            comparison=self._read_comparison(content) if "comparison" in more else None,
            evidence=_read_evidence(fields, len(train.curriculum) // PER_SLOT, episodes) if train.curriculum else (),
            masked=masked,
        )
        fields.refuse_rest()
        return trained

    def _read_point(self, arrays: FieldReader, selection: FieldReader, shared: np.ndarray) -> np.ndarray:
        """Read a client's point [S]; the groups that did not travel are those of the shared blocks."""
        groups = self._groups.unpack("selection.groups", selection.take("groups", bytes))
        size, begin = self._groups.count_columns(groups), self._groups.extract(shared, groups)
        with np.errstate(over="ignore", invalid="ignore"):
            if self._scenario.wire.dtype == "float16":
                name = "arrays.difference"
                sent = decode_vector(name, arrays.take("difference", Array), size, "float16")
                values, step = add_difference(begin, sent), sent.astype(np.float32)
            else:
                name = "arrays.point"
                values = decode_vector(name, arrays.take("point", Array), size)
                step = values - begin
            distance, limit = math.sqrt(step @ step), MAX_DISTANCE * (1 + math.sqrt(shared @ shared))
        if not distance <= limit or distance == math.inf:
            check_finite(name, values)
            raise InvalidMessageError(
                f"{name} is {distance:.3g} from the shared blocks; it has to be within {limit:.3g}"
            )
        return self._groups.fill(values, groups, shared)

    def _read_fisher(self, arrays: FieldReader) -> np.ndarray | None:
        """Read the diagonal [S] of a client's Fisher matrix, where the scenario needs it."""
        if not self._needs_fisher or (self._size == 0 and not arrays.has("fisher")):
            return None
        fisher = decode_vector("arrays.fisher", arrays.take("fisher", Array), self._size).copy()
        check_finite("arrays.fisher", fisher)
        if self._size and fisher.min() < 0:
            raise InvalidMessageError(
                f"arrays.fisher is {fisher.min():.3g} at entry {fisher.argmin()}; a mean of squares is not negative"
            )
        return fisher

    def _max_steps(self, number: int) -> int:
        """The most steps that a client does in a round, by the round's number.

        In batches of a fixed size, all policies have done the least number of whole batches for the steps that are due
        up to a round. With whole episodes a client goes on until the last episodes end.
        """
        scenario = self._scenario
        if scenario.objective.advantage == "group":
            longest = min(self._max_episode_steps, LONGEST_EPISODE)
            return scenario.steps + (2 if scenario.personal.model else 1) * scenario.rollout.num_envs * longest
        batch = scenario.rollout.num_envs * scenario.rollout.horizon
        second = round(scenario.personal.steps * scenario.steps) if scenario.personal.model else 0
        return sum(
            (-(-number * steps // batch) + (-(number - 1) * steps // batch)) * batch
            for steps in (scenario.steps - second, second)
        )

    # Evaluations

    @cached_property
    def _longest_evaluation(self) -> int:
        """The most steps of an episode for evaluation, or tokens of a completion."""
        writes = any(client.prompts is not None for client in self._scenario.clients)
        limit = self._scenario.evaluate.step_limit
        return max(limit, self._scenario.language.length) if writes else limit

    def _read_comparison(self, content: RecordDict) -> SharingComparison:
        fields = FieldReader(content, "comparison", MetricRecord)
        comparison = SharingComparison(
            own=fields.take_float("own"),
            shared=fields.take_float("shared"),
            error=fields.take_float("error", 0),
            learned=fields.take_float("learned"),
            episodes=fields.take_count("episodes", 2, 2 * TIMES * self._scenario.merge.episodes),
            shares=bool(fields.take_count("shares", 0, 1)),
            is_open=bool(fields.take_count("is_open", 0, 1)),
        )
        fields.refuse_rest()
        return comparison

    def _read_summary(self, content: RecordDict, plan: EvaluationPlan) -> EvaluationSummary:
        settings, fields = self._scenario.evaluate, FieldReader(content, "evaluation", MetricRecord)
        adapts = settings.adapt and plan.deterministic and not self._withholds
        least = fields.take_float("least")
        most = fields.take_float("most", least)
        slack = 1e-6 * max(1.0, abs(least), abs(most))
        summary = EvaluationSummary(
            mean=fields.take_float("mean", least - slack, most + slack),
            std=fields.take_float("std", 0, most - least + slack),
            least=least,
            most=most,
            episodes=fields.take_count("episodes", 0 if self._withholds else 1, settings.episodes),
            length=fields.take_float("length", 0, self._longest_evaluation),
            adapted=fields.take_floats("adapted", settings.adapt) if adapts else (),
            cost=fields.take_float("cost") if self._scenario.objective.cost.limit is not None else None,
        )
        fields.refuse_rest()
        return summary


def _write_summary(summary: EvaluationSummary) -> MetricRecord:
    adapted = {"adapted": [float(value) for value in summary.adapted]} if summary.adapted else {}
    return MetricRecord(
        {
            "mean": float(summary.mean),
            "std": float(summary.std),
            "least": float(summary.least),
            "most": float(summary.most),
            "episodes": int(summary.episodes),
            "length": float(summary.length),
            **adapted,
            **({} if summary.cost is None else {"cost": float(summary.cost)}),
        }
    )


def _write_comparison(comparison: SharingComparison) -> MetricRecord:
    return MetricRecord(
        {
            "own": float(comparison.own),
            "shared": float(comparison.shared),
            "error": float(comparison.error),
            "learned": float(comparison.learned),
            "episodes": int(comparison.episodes),
            "shares": int(comparison.shares),
            "is_open": int(comparison.is_open),
        }
    )


def _read_evidence(fields: FieldReader, slots: int, episodes: int) -> tuple[float, ...]:
    """Read what a client's returns say of its levels: for each slot a number of episodes, and a sum."""
    evidence = fields.take_floats("evidence", 2 * slots)
    if not all(0 <= count <= episodes for count in evidence[:slots]):
        raise InvalidMessageError(
            f"training.evidence is {show(evidence)}; it has to begin with {slots} numbers of episodes, 0 to {episodes}"
        )
    return evidence


def _read_metrics(content: RecordDict, most: int) -> Mapping[str, float]:
    """Read the metrics of a client: finite, so many at most, and of the names that clients may report."""
    record = content["metrics"]
    if not isinstance(record, MetricRecord):
        raise InvalidMessageError(f"metrics is a {type(record).__name__}; it has to be a MetricRecord")
    if len(record) > most:
        raise InvalidMessageError(f"metrics has {len(record)} numbers; at most {most} are allowed")
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if not is_reported(name):
            raise InvalidMessageError(f"metrics has {show(name)}, which clients may not report")
        if not (isinstance(value, float) and abs(value) <= LARGEST):
            raise InvalidMessageError(
                f"metrics.{name} is {show(value)}; it has to be a finite float, at most {LARGEST:g} in size"
            )
        metrics[name] = value
    return metrics
