"""CallbackList: makes a run's callbacks, calls them in their order, and keeps their states."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from grpo_fed.callbacks.control import RunControl
from grpo_fed.callbacks.moments import MergedRound, TrainedClient
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.continuation import CALLBACKS
from grpo_fed.runs.records import ClientRecord, RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.importing import describe_exception, import_object
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean

MOMENTS = ("on_run_start", "on_round_start", "on_client_trained", "on_merge", "on_round_end", "on_run_end")


class CallbackError(RuntimeError):
    """A callback raised an exception; the text names the callback, the moment and the exception."""


@dataclass(frozen=True)
class SavedCallbacks:
    """Holds the callbacks' part of a checkpoint."""

    labels: tuple[str, ...] | None = None
    """The names of the callbacks, in order; None in a run that goes on with changes, which may have others."""
    rate_factor: float = 1.0
    """What the learning rates are multiplied by."""
    stop_reason: str | None = None
    """Why one of them has stopped the run."""
    states: dict[str, Any] = field(default_factory=dict)
    """The state of each callback that has one."""


@final
class CallbackList:
    """The callbacks of a run: those that the scenario names, then those that were given as objects."""

    def __init__(self, scenario: Scenario, given: Sequence[object] = ()) -> None:
        """Make the callbacks that the scenario names; ValueError for one that cannot be made or has no moment."""
        self.callbacks: dict[str, object] = {}
        """By name: the import path of its class, numbered if there are several."""
        for index, entry in enumerate(scenario.callbacks):
            path, kwargs = (entry, {}) if isinstance(entry, str) else (entry["path"], entry.get("kwargs", {}))
            where = f"callbacks.{index} = {path}"
            try:
                callback = import_object(path)(**kwargs)
            except Exception as error:
                text = str(error) if isinstance(error, ValueError) else describe_exception(error)
                raise ValueError(f"{where}: {text}") from error
            self._add(path, callback, where)
        for index, callback in enumerate(given):
            kind = type(callback)
            self._add(f"{kind.__module__}:{kind.__qualname__}", callback, f"callbacks[{index}] = {kind.__qualname__}")

    def _add(self, name: str, callback: object, where: str) -> None:
        """Add a callback under its name; ValueError if it is none. where: what errors begin with."""
        if isinstance(callback, type):
            raise ValueError(f"{where}: is a class; give an instance of it, {callback.__qualname__}(...)")
        methods = [method for method in dir(callback) if method.startswith("on_")]
        for method in methods:
            if method not in MOMENTS:
                cure = did_you_mean(closest_match(method, MOMENTS))
                raise ValueError(
                    f"{where}: {method} is no moment of a run{cure or '; there are ' + ', '.join(MOMENTS)}"
                )
        if not methods:
            raise ValueError(f"{where}: has none of the methods {', '.join(MOMENTS)}")
        if hasattr(callback, "state") != hasattr(callback, "restore"):
            raise ValueError(f"{where}: has only one of the methods state and restore, which come together")
        same = sum(label.partition("#")[0] == name for label in self.callbacks)
        self.callbacks[name if not same else f"{name}#{same + 1}"] = callback

    def restore(self, after: Checkpoint | None, run: RunControl) -> None:
        """Take up the states of a checkpoint; ValueError if they are those of other callbacks."""
        if after is None or CALLBACKS not in after.parts:
            return
        saved = after.part(CALLBACKS, SavedCallbacks)
        if saved.labels is not None and saved.labels != tuple(self.callbacks):
            had, has = ", ".join(saved.labels) or "none", ", ".join(self.callbacks) or "none"
            raise ValueError(
                f"{after.folder}: the run had the callbacks {had}, and now has {has}; give the same ones,"
                " resume(folder, callbacks=[...]) where the scenario does not name them"
            )
        run.rate_factor, run.stop_reason = saved.rate_factor, saved.stop_reason
        for name, state in saved.states.items():
            if name in self.callbacks:
                self._call(name, "restore", run, state)

    def saved(self, run: RunControl) -> SavedCallbacks:
        """Return the states for a checkpoint."""
        states = {
            name: self._call(name, "state", run)
            for name, callback in self.callbacks.items()
            if hasattr(callback, "state")
        }
        for name, state in states.items():
            try:
                json.dumps(state, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise CallbackError(f"callback {name}: its state cannot be saved as JSON: {error}") from error
        return SavedCallbacks(tuple(self.callbacks), run.rate_factor, run.stop_reason, states)

    # The moments -----------------------------------------------------------------------------------------------------

    def run_start(self, run: RunControl) -> None:
        """Call on_run_start."""
        self._call_all("on_run_start", run, run)

    def round_start(self, run: RunControl) -> None:
        """Call on_round_start."""
        self._call_all("on_round_start", run, run)

    def clients_trained(self, run: RunControl, works: Sequence[TrainedClient]) -> None:
        """Call on_client_trained for each client."""
        for work in works:
            self._call_all("on_client_trained", run, run, work)

    def merged(self, run: RunControl, make: Callable[[], MergedRound]) -> None:
        """Call on_merge. make: makes its record, if there is any callback."""
        if any(hasattr(callback, "on_merge") for callback in self.callbacks.values()):
            self._call_all("on_merge", run, run, make())

    def round_end(self, run: RunControl, record: RoundRecord) -> RoundRecord:
        """Call on_round_end; return the record with the metrics that callbacks have logged for it.

        Each callback sees the metrics of those before it. The record may be of an earlier round than the one that goes
        on, whose metrics wait.
        """
        now, waiting = run.round, (run.whole, run.of_clients)
        if record.round != now:
            run.round, run.whole, run.of_clients = record.round, {}, {}
        for name in self.callbacks:
            record = with_logged(record, run)
            self._call(name, "on_round_end", run, run, record)
        record = with_logged(record, run)
        run.whole, run.of_clients = ({}, {}) if record.round == now else waiting
        run.round = now
        return record

    def round_waits(self, run: RunControl, record: RoundRecord) -> RoundRecord:
        """Return the record of a round that ends later, with what callbacks have logged so far."""
        record = with_logged(record, run)
        run.whole, run.of_clients = {}, {}
        return record

    def run_end(self, run: RunControl, result: Result, error: BaseException | None) -> None:
        """Call on_run_end of all callbacks, then raise the first error of any, or note it on the one that ended the
        run.
        """
        run.records = False
        failures: list[CallbackError] = []
        for name in self.callbacks:
            try:
                self._call(name, "on_run_end", run, run, result)
            except CallbackError as failure:
                failures.append(failure)
        for each in failures:
            if error is None:
                raise each
            error.add_note(str(each))

    def _call_all(self, moment: str, run: RunControl, *arguments: object) -> None:
        for name in self.callbacks:
            self._call(name, moment, run, *arguments)

    def _call(self, name: str, method: str, run: RunControl, *arguments: object) -> Any:
        """Call a method of a callback, if it has it; CallbackError names both if that raises."""
        function = getattr(self.callbacks[name], method, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else describe_exception(error)
            raise CallbackError(f"callback {name}: {method}, round {run.round}: {text}") from error


def with_logged(record: RoundRecord, run: RunControl) -> RoundRecord:
    """Add to a record what callbacks have logged so far."""
    if not run.whole and not run.of_clients:
        return record
    return replace(
        record,
        logged={**record.logged, **run.whole},
        clients=[_with_client_metrics(client, run.of_clients.get(client.client, {})) for client in record.clients],
    )


def _with_client_metrics(record: ClientRecord, metrics: Mapping[str, float]) -> ClientRecord:
    return replace(record, logged={**record.logged, **metrics}) if metrics else record
