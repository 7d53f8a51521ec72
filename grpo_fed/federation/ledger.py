"""TODO docstring of grpo_fed.federation.ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np

from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_record import RoundOutcome
from grpo_fed.federation.server_state import ServerState
from grpo_fed.federation.transport import Transport
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs import folder as journal
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.recorder import Journal, Totals
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord, interquartile_mean, note_of
from grpo_fed.runs.results import Result, Status
from grpo_fed.scenario.scenario import Scenario

Watch = Callable[[RoundRecord], None]
NOTED = ("best", "stale", "enough", "untold", "waits")
"""What a checkpoint has of it, beside the totals."""


@final
class Ledger:
    """Of one federation."""

    def __init__(
        self,
        scenario: Scenario,
        commons: SharedBlocks,
        post: Transport,
        folder: Path | None,
        after: Checkpoint | None,
        device: str | None = None,
    ) -> None:
        self.scenario, self.commons, self.post, self.folder = scenario, commons, post, folder
        if folder is not None:
            journal.check_usable(folder)
        self.totals = Totals(scenario, device or scenario.device)
        self.entries = {name: settings.name for settings in scenario.clients for name in settings.names}
        self.failures: dict[str, Failure] = {}
        """Of the round that goes on, the first of each client."""
        self.best: tuple[int, float] | None = None
        """The round with the best evaluation, and that."""
        self.stale = 0
        """Evaluations since."""
        self.enough = False
        """Whether `stop` ends the run before its last round."""
        self.untold: RoundRecord | None = None
        """The latest round's note, until it is written."""
        self.waits = False
        """Whether it waits for what clients play when they train again."""
        self._watch: Watch = lambda note: None
        self._after = after
        if after is not None:
            self.totals.load(after.counters)
            for name in NOTED:
                setattr(self, name, after.counters["ledger"][name])
            self.untold = note_of(after.counters["ledger"]["untold"])
        self._before = self._counted = self.totals.up, self.totals.down
        """Bytes up and down before this process began, and before this round did."""

    def open(self, watch: Watch) -> None:
        """Begin to write, or go on after the checkpoint: what it says of its own round first."""
        self._watch = watch
        if self._after is None:
            self._journal = Journal.open(self.folder, self.scenario)
            return
        self._journal = Journal.reopen(self.folder, self._after.round - 1)
        if not self.waits:
            self._write()

    def miss(self, number: int, client: str, failure: Failure) -> None:
        """A client has no answer."""
        self.failures.setdefault(client, failure)
        self.totals.miss(number, client, failure)

    def note(
        self,
        outcome: RoundOutcome,
        position: ServerState,
        scores: Mapping[str, float],
        waits: bool,
    ) -> None:
        """A round has come to this; `waits` if it is told only when `complete` has the scores."""
        clients = [self._of_client(name, outcome, position, scores) for name in self.commons.clients]
        env_steps = self.totals.env_steps + sum(reply.steps for reply in outcome.replies.values())
        rounds, server = self.scenario.rounds, self._of_server(outcome)
        self.untold = RoundRecord(outcome.round, rounds, outcome.seconds, env_steps, clients, server)
        self.waits = waits
        if not waits:
            self._judge(self.untold)

    def complete(self, replies: Mapping[str, Trained]) -> None:
        """Tell of the round that waited, now that its clients have played."""
        assert self.untold is not None, "a note waits"
        scores = {name: reply.played.mean for name, reply in replies.items() if reply.played is not None}
        clients = [replace(note, score=scores.get(note.client)) for note in self.untold.clients]
        self.untold, self.waits = replace(self.untold, clients=clients), False
        self._judge(self.untold)
        self.tell()

    def tell(self) -> None:
        """Write the latest note down, and let who watches have it."""
        note = self.untold
        assert note is not None, "there is something to tell"
        self._write()
        self._watch(note)

    def noted(self) -> dict[str, Any]:
        """What a checkpoint has of it as JSON, beside the totals."""
        return {name: getattr(self, name) for name in NOTED}

    def count(self) -> None:
        """Bring the totals of bytes up to date."""
        self.totals.up, self.totals.down = self._before[0] + self.post.bytes_up, self._before[1] + self.post.bytes_down

    def settle(self, status: Status, position: ServerState, error: BaseException | None) -> Result:
        """What has become of it all; what has not been told yet is at least written."""
        self._write()
        self.count()
        left = {name: self._names(groups) for name, groups in position.departed.items()}
        clusters = {name: self._clusters(name, position) for name in self.commons.clients}
        return self.totals.result(status, self.folder, error, self.scenario.method, left, clusters)

    def close(self, result: Result) -> None:
        """The last of all that is written."""
        self._journal.close(result)

    # A note ----------------------------------------------------------------------------------------------------------

    def _of_client(
        self, name: str, outcome: RoundOutcome, position: ServerState, scores: Mapping[str, float]
    ) -> ClientRecord:
        note = ClientRecord(
            client=name,
            task=self.entries[name],
            score=scores.get(name),
            kl=None if outcome.step is None else outcome.step.kl.get(name),
            departed=self._names(position.departed.get(name, ())),
            clusters=self._clusters(name, position),
            failure=self.failures.get(name),
        )
        reply = outcome.replies.get(name)
        if reply is None:
            return note
        return replace(note, steps=reply.steps, episodes=reply.episodes, metrics=dict(reply.metrics))

    def _names(self, groups: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.commons.groups.names[group] for group in groups)

    def _clusters(self, name: str, position: ServerState) -> dict[str, int]:
        """By block; none where the merge makes no clusters, or this client was not in the latest."""
        found = position.clusters.get(name)
        return {} if found is None else dict(zip(self.commons.groups.as_blocks.names, found, strict=True))

    def _of_server(self, outcome: RoundOutcome) -> ServerRecord:
        self.count()
        up, down = self.totals.up - self._counted[0], self.totals.down - self._counted[1]
        self._counted = self.totals.up, self.totals.down
        kept = None if outcome.step is None else outcome.step.accepted
        return ServerRecord(kept, outcome.last_kl, up, down, self.totals.up + self.totals.down, outcome.notes)

    def _judge(self, note: RoundRecord) -> None:
        """Whether this is the best evaluation so far, and whether it is time to stop."""
        scores, stop = np.array(list(note.scores.values())), self.scenario.stop
        if not scores.size or note.round == 0:
            return
        score = interquartile_mean(scores)
        if self.best is None or score > self.best[1]:
            self.best, self.stale = (note.round, score), 0
        else:
            self.stale += 1
        reached = stop.target is not None and score >= stop.target
        self.enough = reached or 0 < stop.patience <= self.stale

    def _write(self) -> None:
        """The latest note, once."""
        note, self.untold = self.untold, None
        if note is not None:
            self.totals.add(note)
            self._journal.write(note)
