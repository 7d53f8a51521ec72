"""The figures of a run, drawn from its folder alone.

    learning.py  returns by round
    adaptation.py  returns by local update, of policies that adapt to their tasks
    completions.py  of language models: rewards by function, equal groups, completions cut off
    twins.py     what sharing brings each client, as its twin tells
    constraints.py  costs beside their limit, and their prices
    sharing.py   departures from groups, and clusters of clients
    sparsity.py  what a group penalty leaves
    evidence.py  rho of the merge rule `persistence`, and who left a block on it
    stepping.py  the server's steps: KL against budgets, and the fractions that were taken
    privacy.py   epsilon beside its budget, and the bounds of differences
    cost.py      bytes and time
    callbacks.py metrics that callbacks have logged
    write.py     draws all figures of a run and writes their files

Begin with write.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.reports.figures.write import draw_figures

__all__ = ["draw_figures"]

__getattr__ = lazy_getattr(__name__, {"draw_figures": "grpo_fed.reports.figures.write"})
