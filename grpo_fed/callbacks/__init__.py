"""Callbacks: code of the user that the server calls while a run goes on.

    moments.py      Callback, the protocol with the moments, and the records that the moments get
    control.py      RunControl: what a callback sees of the run and may do with it
    calls.py        CallbackList: makes the callbacks, calls them, and keeps their states
    values.py       a metric of a round by its key, for callbacks that watch one
    plateau.py      StopOnPlateau: ends a run whose metric does not improve
    keep_best.py    KeepBest: keeps the policies of the best round
    tensorboard.py  TensorBoard: writes what a run records for TensorBoard

Begin with moments.py. A scenario names a callback by its import path, and `run(..., callbacks=[...])` takes objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.callbacks.calls import CallbackError, CallbackList
    from grpo_fed.callbacks.control import RunControl
    from grpo_fed.callbacks.keep_best import KeepBest
    from grpo_fed.callbacks.moments import Callback, MergedRound, TrainedClient
    from grpo_fed.callbacks.plateau import StopOnPlateau
    from grpo_fed.callbacks.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "CallbackError",
    "CallbackList",
    "KeepBest",
    "MergedRound",
    "RunControl",
    "StopOnPlateau",
    "TensorBoard",
    "TrainedClient",
]

MODULES = {
    "Callback": "grpo_fed.callbacks.moments",
    "CallbackError": "grpo_fed.callbacks.calls",
    "CallbackList": "grpo_fed.callbacks.calls",
    "TrainedClient": "grpo_fed.callbacks.moments",
    "KeepBest": "grpo_fed.callbacks.keep_best",
    "MergedRound": "grpo_fed.callbacks.moments",
    "RunControl": "grpo_fed.callbacks.control",
    "StopOnPlateau": "grpo_fed.callbacks.plateau",
    "TensorBoard": "grpo_fed.callbacks.tensorboard",
}

__getattr__ = lazy_getattr(__name__, MODULES)
