"""Repeats the order of events of a run whose rounds did not wait, on this machine, and compares what came out.

A deployed run depends on which client answered first. Its `order.jsonl` says so, and everything else follows from the
scenario, so that the same shared blocks come out again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.threads import one_thread
from grpo_fed.federation.arrivals import RecordedOrder
from grpo_fed.runs.folder import SCENARIO, read_engine_state
from grpo_fed.runs.merge_order import read_orders
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class RepeatedOrder:
    """What became of a repeated run."""

    merges: int
    """How many merges were repeated."""
    first_difference: int | None
    """The first merge after which the shared blocks have other bits; None if all are the same."""


class _OrderEnded(Exception):
    """The last recorded merge was repeated."""


def replay_order(run: Path, out: Path, replace: bool, watch: Callable[[RoundRecord], None]) -> RepeatedOrder:
    """Repeat a run in a folder of its own, without the evaluations between rounds.

    ValueError if the run has no recorded order. A run of the local engine is repeated with the same stacks of clients;
    in a deployment each client learned alone, and so it does here.
    """
    orders = read_orders(run)
    if not orders:
        raise ValueError(f"{run}: it ended before its first merge")
    scenario = Scenario.load(run / SCENARIO, ["evaluate.every=0", "stop.patience=0"])
    scenario = scenario.model_copy(update={"stop": scenario.stop.model_copy(update={"target": None})})
    state = read_engine_state(run)
    is_local = "workers" in state

    def stop_after_last(record: RoundRecord) -> None:
        watch(record)
        if record.round == len(orders):
            raise _OrderEnded

    with one_thread():
        engine = LocalEngine(
            scenario,
            out,
            engine_state=state if is_local else None,
            workers=None if is_local else 0,
            replace=replace,
            arrivals=lambda transport: RecordedOrder(transport, orders, scenario.round),
            alone=not is_local,
        )
    with engine, contextlib.suppress(_OrderEnded), one_thread():
        engine.run(stop_after_last)
    repeated = read_orders(out)
    differing = (merge for merge, order in orders.items() if repeated[merge].digest != order.digest)
    return RepeatedOrder(len(orders), next(differing, None))
