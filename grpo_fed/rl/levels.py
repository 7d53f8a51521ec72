"""The levels that clients train on, round by round: drawn before a round, and judged by its episodes afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np

from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.records import Batch, Episode
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.rl.rollout import Collector
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.curriculum import advance, describe_state, draw_levels, first_state, gather_evidence
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.level_replay import remember_scores


@final
class ClientLevels:
    """Draws the levels of K clients, each from its own curriculum; clients without one are left alone.

    An episode keeps the level with which it begins, over the end of a round too. So the first episode in each copy of a
    client's environment, which may begin before anybody knows the round, is of the levels that a run begins with.
    """

    def __init__(
        self, tasks: Sequence[GymTask], seeds: Sequence[int], scenario: Scenario, collector: Collector
    ) -> None:
        """Take the clients of these tasks. seeds: names of their random streams."""
        self.curricula = {row: task.curriculum for row, task in enumerate(tasks) if task.curriculum is not None}
        """By the row of the client."""
        self.states = {row: first_state(curriculum) for row, curriculum in self.curricula.items()}
        """What each curriculum remembers, by the row of the client."""
        self.evidence: dict[int, np.ndarray] = {}
        """[2, S]: what the last round's episodes say, by the row of the client."""
        self._errors: dict[int, dict[float, tuple[float, int]]] = {
            row: {} for row, curriculum in self.curricula.items() if curriculum.settings.kind == "replay"
        }
        """By row of a client that replays levels: the sum of the critic's errors at each seed, and the steps there."""
        self._seeds, self._collector = seeds, collector
        self._is_steered = scenario.curriculum.by == "server"
        self._alike = scenario.group.size if scenario.objective.advantage == "group" else 1
        """Neighbouring copies whose episodes are judged against each other, and so are of one level."""
        for row in self.curricula:
            self._set_levels(row, 0, 0.0)

    def begin_round(self, numbers: np.ndarray, progress: float) -> None:
        """Draw the levels of the episodes that begin from now on. numbers: [K], updates that each client has made."""
        for row in self.curricula:
            self._set_levels(row, int(numbers[row]) + 1, progress)

    def end_round(self, row: int, episodes: Sequence[Episode], progress: float) -> Mapping[str, float]:
        """Judge a client's levels by the episodes that ended; return the metrics of those that it had in the round.

        progress: of the run, 0 to 1, where the round began.
        """
        if row not in self.curricula:
            return {}
        curriculum, state = self.curricula[row], self.states[row]
        if row in self._errors:
            self.states[row] = self._replay(row)
            return describe_state(curriculum, self.states[row], progress)
        levels = np.array([episode.level for episode in episodes], np.float64).reshape(-1, len(curriculum.level_names))
        returns = np.array([episode.score for episode in episodes], np.float64)
        self.evidence[row] = gather_evidence(curriculum, state, progress, levels, returns)
        if not self._is_steered:
            self.states[row] = advance(curriculum, state, self.evidence[row])
        return describe_state(curriculum, state, progress)

    def observe_errors(self, rows: slice, active: np.ndarray, batch: Batch, targets: LearningTargets) -> None:
        """Add up how far the critic was off in the steps of a batch, by the levels that these were played at.

        rows: of the clients in the batch. active: [K] bool, which of them learn from it.
        """
        replaying = [client for client in np.flatnonzero(active).tolist() if rows.start + client in self._errors]
        if not replaying:
            return
        errors = (targets.returns - batch.values).abs().cpu().numpy().astype(np.float64)
        ends, valid = batch.ends.cpu().numpy(), batch.valid.cpu().numpy()
        for client in replaying:
            row = rows.start + client
            before, coming = self._collector.levels_before[row][:, 0], self._collector.coming_levels[row][:, 0]
            seeds = np.where(np.cumsum(ends[client], 0) - ends[client] > 0, coming, before)
            for seed in np.unique(seeds[valid[client]]).tolist():
                of_level = errors[client][valid[client] & (seeds == seed)]
                total, steps = self._errors[row].get(seed, (0.0, 0))
                self._errors[row][seed] = total + float(of_level.sum()), steps + of_level.size

    def _replay(self, row: int) -> np.ndarray:
        """Score the levels that a client played in a round by their mean errors; return the state after it."""
        errors, self._errors[row] = self._errors[row], {}
        seeds, scores = np.array(list(errors)), np.array([total / steps for total, steps in errors.values()])
        return remember_scores(self.curricula[row].settings, self.states[row], seeds, scores)

    def _set_levels(self, row: int, number: int, progress: float) -> None:
        """Draw a client's levels from the `number`-th stream of its own."""
        curriculum, copies = self.curricula[row], self._collector.shape[1]
        draws = generator(self._seeds[row], Purpose.LEVELS, number)
        levels = draw_levels(curriculum, self.states[row], progress, draws, copies // self._alike)
        self._collector.set_levels(row, curriculum.level_names, levels.repeat(self._alike, axis=0))
