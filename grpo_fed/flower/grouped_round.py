"""What happened in a round of `Grouped`, and the numbers of it that MLflow gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_fed.aggregation.proximity import AcceptedStep
from grpo_fed.runs.metrics import CLIENTS_FAILED, CLIENTS_OK, DEPARTED_GROUPS


@dataclass(eq=False)
class GroupedRound:
    """What happened in a round, by the names of the clients."""

    round: int
    weights: Mapping[str, float] = field(default_factory=dict)
    """The weight of each client that answered."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why others did not, or were not understood."""
    step: AcceptedStep | None = None
    """How far each block went, and its KL; None for a round without an answer."""
    kl: Mapping[str, float] = field(default_factory=dict)
    """The KL of the step as each client measured it."""
    rho: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """With the rule `persistence`, rho of each client and group, from the second round on."""
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The groups that clients left in this round."""
    departed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """All groups that clients are out of; only clients that are out of some."""
    train: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """What each client reported of its training."""
    evaluate: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """What each client reported of its evaluation."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""


def tracked_numbers(
    record: GroupedRound, block_of_group: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the numbers of the whole, and those of each client, by the keys of our own runs.

    What clients report themselves has a prefix, `train/` or `eval/`. A client's `rho/` of a block is the greatest of
    the block's groups.
    """
    whole: dict[str, float] = {
        CLIENTS_OK: len(record.weights),
        CLIENTS_FAILED: len(record.failures),
        DEPARTED_GROUPS: sum(len(groups) for groups in record.departed.values()),
    }
    if record.step is not None:
        for block in record.step.blocks:
            whole[f"alpha/{block.block}"] = block.alpha
            if block.kl is not None:
                whole[f"kl/{block.block}"] = block.kl
        if record.step.joint is not None:
            whole["kl/joint"] = record.step.joint
    clients: dict[str, dict[str, float]] = {}
    for name in sorted({*record.train, *record.evaluate}):
        numbers = clients[name] = {DEPARTED_GROUPS: len(record.departed.get(name, ()))}
        numbers |= {f"train/{key}": value for key, value in record.train.get(name, {}).items()}
        numbers |= {f"eval/{key}": value for key, value in record.evaluate.get(name, {}).items()}
        if name in record.kl:
            numbers["kl/joint"] = record.kl[name]
        for group, rho in record.rho.get(name, {}).items():
            key = f"rho/{block_of_group[group]}"
            numbers[key] = max(rho, numbers.get(key, rho))
    for kind in ("train", "eval"):
        for key in sorted({key for numbers in clients.values() for key in numbers if key.startswith(f"{kind}/")}):
            values = [numbers[key] for numbers in clients.values() if key in numbers]
            whole[key] = sum(values) / len(values)
    return whole, clients
