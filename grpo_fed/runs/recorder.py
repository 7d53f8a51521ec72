"""Recorder: writes a run's folder while the run goes on, and counts what the results report.

A round is recorded in one order, for a federation and for clients that learn alone: first the checkpoint, then the
round's line, then the call of `watch`. A checkpoint holds its own round's record, so a run that goes on from there
writes that round's line first.

A round's record may have to wait for evaluations, if clients are evaluated with the next round's training: then its
checkpoint is written at once, and its line when the scores have arrived.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, final

from grpo_fed.policy.shared_names import SharedNames
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Arrays, Checkpoint
from grpo_fed.runs.evaluations import Evaluations, with_evaluations
from grpo_fed.runs.files import append_line, write_atomic
from grpo_fed.runs.folder import FAILURE, ROUNDS, SCENARIO, SHARED, read_lines, remove_run
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.runs.records import Failure, RoundRecord, record_to_line
from grpo_fed.runs.results import ENDED, RESULTS, ClientResult, Result, status_of
from grpo_fed.runs.totals import RunTotals
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import scales_of

Watch: TypeAlias = Callable[[RoundRecord], None]
"""A function that is called with every round's record, the first being 0."""


@dataclass
class RecorderState:
    """Holds the recorder's part of a checkpoint, from which it goes on."""

    totals: RunTotals
    pending: RoundRecord | None
    """The record of the checkpoint's own round, whose line is not written yet."""
    waits: bool
    """Whether that line waits for scores."""


@dataclass(frozen=True)
class CheckpointContent:
    """Holds the loop's part of a checkpoint, beside the recorder's own state."""

    parts: Mapping[str, Any]
    """The loop's state, by part: JSON, and dataclasses that become JSON."""
    clients: Mapping[str, Arrays] = field(default_factory=dict)
    """Every client's state, as arrays."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Every client's state, as files that are never written to again."""
    shared: Arrays | None = None
    """The shared blocks of a federation."""
    best: int | None = None
    """The best round, whose checkpoint is not removed; None if there is none yet."""


@final
class Recorder:
    """Writes a run's folder, round by round; without a folder it only counts."""

    def __init__(
        self,
        scenario: Scenario,
        folder: Path | None,
        device: str,
        method: str = "local",
        after: Checkpoint | None = None,
    ) -> None:
        """Prepare to record a new run, or one that goes on `after` a checkpoint. Nothing is written yet.

        method: how the clients share, for the results. ValueError if the checkpoint's state is damaged.
        """
        self.scenario, self.folder, self.device, self.method, self.after = scenario, folder, device, method, after
        self.state = RecorderState(RunTotals(), None, waits=False)
        if after is not None:
            self.state = after.part("recorder", RecorderState)
        self._watch: Watch = lambda record: None
        self._size_before_line: int | None = None
        """The size of the file of rounds before the pending round's line, while that is written."""
        self._began = time.perf_counter() - self.totals.seconds
        self._bytes_before = self.totals.bytes_up, self.totals.bytes_down

    @property
    def totals(self) -> RunTotals:
        """The counts so far."""
        return self.state.totals

    @property
    def waits(self) -> bool:
        """Whether the latest round's line waits for scores."""
        return self.state.waits

    @property
    def env_steps(self) -> int:
        """Environment steps of all clients so far."""
        return sum(self.totals.steps.values())

    # In the order of a run -------------------------------------------------------------------------------------------

    def open(self, watch: Watch, shared: SharedNames | None = None) -> None:
        """Begin a new folder, in which an earlier run is removed, or go on after the checkpoint's round.

        If the run was stopped between the checkpoint and the round's line, `watch` is called for that round now.

        shared: the names of the shared blocks and of their parameter groups; None without a federation.
        """
        self._watch = watch
        if self.after is None:
            self._begin_folder(shared)
            return
        was_written = True
        if self.folder is not None:
            (self.folder / RESULTS).unlink(missing_ok=True)
            (self.folder / FAILURE).unlink(missing_ok=True)
            lines = read_lines(self.folder)
            was_written = self.after.round in lines
            kept = [f"{lines[number]}\n" for number in sorted(lines) if number < self.after.round]
            write_atomic(self.folder / ROUNDS, "".join(kept))
        if self.waits or self.state.pending is None:
            return
        if was_written:
            self._write_pending()
        else:
            self._write_and_notify()

    def _begin_folder(self, shared: SharedNames | None) -> None:
        """Remove an earlier run, and write the files that do not change.

        However early the process is killed, the folder may be used again, or its run resumed: see `folder._holds_run`.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_run(self.folder)
        write_atomic(self.folder / ROUNDS, "")
        write_atomic(self.folder / SCENARIO, self.scenario.dumps())
        if shared is not None:
            write_atomic(self.folder / SHARED, json.dumps(shared.to_json(), indent=2) + "\n")

    def client_failed(self, round: int, client: str, failure: Failure) -> None:
        """Count that a client gave no valid answer."""
        self.totals.missing.setdefault(client, []).append((round, failure.kind, failure.reason))

    def count_bytes(self, up: int, down: int) -> None:
        """Set the bytes that were sent so far in this process; those from before a resume are added."""
        self.totals.bytes_up, self.totals.bytes_down = self._bytes_before[0] + up, self._bytes_before[1] + down

    def round_finished(
        self, record: RoundRecord, content: Callable[[], CheckpointContent] | None, waits: bool = False
    ) -> None:
        """Write the round's checkpoint, if one is due, then its line, and call `watch`.

        content: is called if a checkpoint is due; None writes no checkpoints. waits: whether the line is written by
            `scores_arrived`.
        """
        self.state.pending, self.state.waits = record, waits
        settings = self.scenario.checkpoint
        if (
            content is not None
            and self.folder is not None
            and record.round
            and settings.every
            and record.round % settings.every == 0
        ):
            self._write_checkpoint(record.round, content())
        if not waits:
            self._write_and_notify()

    def scores_arrived(
        self, evaluations: Evaluations, amend: Callable[[RoundRecord], RoundRecord] = lambda record: record
    ) -> RoundRecord:
        """Complete the record that waited with the clients' scores, write its line and call `watch`.

        amend: adds to the complete record.
        """
        assert self.state.pending is not None, "a record waits"
        record = self.state.pending = amend(with_evaluations(self.state.pending, evaluations))
        self.state.waits = False
        self._write_and_notify()
        return record

    def first_scores_arrived(self, evaluations: Evaluations) -> None:
        """Count the scores before the first round of clients that answered later than others; see `RunTotals`."""
        self.totals.first = {**evaluations.scores, **self.totals.first}
        self.totals.adapted_first = {**evaluations.adapted, **self.totals.adapted_first}

    def finish(
        self,
        error: BaseException | None = None,
        sampled: Mapping[str, float] | None = None,
        departed: Mapping[str, Sequence[str]] | None = None,
        clusters: Mapping[str, Mapping[str, int]] | None = None,
        before_results: Callable[[], Mapping[str, str]] = dict,
        reason: str | None = None,
        privacy: PrivacyCost | None = None,
    ) -> Result:
        """Write the results, last of all, so that a folder with results is complete.

        error: what ended the run. reason: why it was stopped. sampled: each client's mean return with sampled actions.
        departed, clusters: each client's at the end. before_results: writes all other files, and returns why policies
        could not be saved, by client; whatever it raises, there are results. privacy: what was spent of the budget.
        """
        self._write_pending()
        notes, interruption = [] if self.after is None else [*self.after.passed_over], None
        try:
            notes += (f"the policy of {name} could not be saved: {why}" for name, why in before_results().items())
        except BaseException as failure:  # noqa: BLE001, noted below, and raised if it is no error
            notes.append(f"the policies could not be saved: {type(failure).__name__}: {failure}".rstrip(": "))
            interruption = None if isinstance(failure, Exception) else failure
        reason = None if error is not None or self.totals.rounds == self.scenario.rounds else reason
        result = self._result(error, reason, sampled or {}, departed or {}, clusters or {})
        result = replace(result, notes=tuple(notes), privacy=privacy)
        if self.folder is not None:
            write_atomic(self.folder / RESULTS, json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
        if interruption is not None:
            raise interruption
        return result

    # Parts -----------------------------------------------------------------------------------------------------------

    def _write_and_notify(self) -> None:
        """Write the pending round's line, and call `watch`."""
        record = self.state.pending
        assert record is not None, "there is a record to write"
        self._write_pending()
        self._watch(record)

    def _write_pending(self) -> None:
        """Write the line of the pending round and count it, once, even if Ctrl-C interrupts an attempt."""
        record = self.state.pending
        if record is None:
            return
        if self.folder is not None and record.round > 0:
            path, line = self.folder / ROUNDS, json.dumps(record_to_line(record), allow_nan=False)
            if self._size_before_line is None:
                self._size_before_line = path.stat().st_size
            append_line(path, line, durable=True, size=self._size_before_line)
        self.state.pending = self._size_before_line = None
        self.totals.add(record)

    def _write_checkpoint(self, round: int, content: CheckpointContent) -> None:
        assert self.folder is not None, "there is a folder to write to"
        self.totals.seconds = time.perf_counter() - self._began
        saved = Checkpoint(
            round,
            {"recorder": self.state, **content.parts},
            clients=content.clients,
            files=content.files,
            shared=content.shared,
        )
        checkpoint.write(self.folder, saved, self.scenario.checkpoint.keep, content.best)

    def _result(
        self,
        error: BaseException | None,
        reason: str | None,
        sampled: Mapping[str, float],
        departed: Mapping[str, Sequence[str]],
        clusters: Mapping[str, Mapping[str, int]],
    ) -> Result:
        totals, status = self.totals, status_of(error, reason)
        is_complete = status in ENDED or totals.rounds == self.scenario.rounds
        # otherwise clients have learned since their last evaluation
        after, costs = (totals.last, totals.last_costs) if is_complete else ({}, {})
        entries = {name: settings for settings in self.scenario.clients for name in settings.names}
        scales = scales_of(self.scenario)
        clients = {
            name: ClientResult(
                env=settings.task,
                before=totals.first.get(name),
                after=after.get(name),
                sampled=sampled.get(name),
                best=totals.best.get(name),
                episodes=totals.episodes.get(name, 0),
                env_steps=totals.steps.get(name, 0),
                personal_groups=tuple(departed.get(name, ())),
                clusters=dict(clusters.get(name, {})),
                departures=totals.departures.get(name, {}),
                unit="steps" if settings.prompts is None else "completions",
                adapted_first=totals.adapted_first.get(name, ()),
                adapted_last=totals.adapted_last.get(name, ()),
                trains=settings.trains,
                sharing=totals.sharing.get(name),
                joined=totals.joined.get(name, 0),
                scale=scales.get(settings.name),
                cost=costs.get(name),
            )
            for name, settings in entries.items()
        }
        return Result(
            scenario=self.scenario.name,
            seed=self.scenario.seed,
            device=self.device,
            status=status,
            error=None if error is None else f"{type(error).__name__}: {error}".rstrip(": "),
            rounds=totals.rounds,
            seconds=time.perf_counter() - self._began,
            env_steps=self.env_steps,
            clients=clients,
            out=self.folder,
            method=self.method,
            bytes_up=totals.bytes_up,
            bytes_down=totals.bytes_down,
            comparison_episodes=totals.comparison_episodes,
            missing=totals.missing,
            equal=totals.equal,
            sites=totals.sites,
            reason=reason,
        )
