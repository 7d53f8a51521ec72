"""Our merge for any Flower app: a strategy of Flower's own kind, which needs no scenario and none of our clients.

    strategy.py     Grouped: departures and budgets, in the place of FedAvg
    grouped_round.py what happened in a round
    measurement.py  answer_query: how a client measures the KL of a step, as a query of Flower
    block_server.py BlockServer: merges the arrays of an app's clients, block by block
    array_blocks.py which of an app's arrays are shared, and in which blocks

`engines/` runs our federations over Flower; this package runs inside Flower's. Begin with strategy.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.flower.grouped_round import GroupedRound
    from grpo_fed.flower.measurement import answer_query
    from grpo_fed.flower.strategy import Grouped

__all__ = ["Grouped", "GroupedRound", "answer_query"]

MODULES = {
    "Grouped": "grpo_fed.flower.strategy",
    "GroupedRound": "grpo_fed.flower.grouped_round",
    "answer_query": "grpo_fed.flower.measurement",
}

__getattr__ = lazy_getattr(__name__, MODULES)
