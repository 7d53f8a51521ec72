"""K clients' adapters on one frozen language model, trained as one stacked computation.

`LanguageLearner.train` is the loop: write, judge, update. Every client draws prompts and tokens from its own random
streams, so what it learns does not depend on the other clients of the stack. Steps are completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.rl.advantages import equal_groups
from grpo_fed.rl.client_stack import (
    BEGINS_LATE,
    ENTROPY_WEIGHTS,
    ClientTensors,
    PenaltyGroups,
    make_parameter_stack,
    own_learning_rates,
    token_entropy_weights,
)
from grpo_fed.rl.constraints import adapt_entropy
from grpo_fed.rl.language.batches import (
    CompletionBatch,
    completion_groups,
    replace_equal_groups,
    sampled_entropies,
    write_completions,
)
from grpo_fed.rl.language.measurement import completion_fisher
from grpo_fed.rl.language.model import LanguageModel, open_language_model, pack_rows
from grpo_fed.rl.language.objective import completion_targets
from grpo_fed.rl.language.texts import ClientTexts
from grpo_fed.rl.language.update import update_adapters
from grpo_fed.rl.learner import Learner, State, join_states, sub_state
from grpo_fed.rl.measurement import measures_steps
from grpo_fed.rl.records import Episode, Evaluation, TrainingReport
from grpo_fed.rl.rng import Purpose, client_seed, generator
from grpo_fed.rl.stacked_learner import DivergedError
from grpo_fed.rl.start import first_parameters
from grpo_fed.rl.training_record import mean_by_name
from grpo_fed.rl.update import measure_penalty
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.language_task import LanguageTask

MEASUREMENT_ROWS = "measurement_rows"
"""The part of a client's state with the completions that a server's step is measured on."""


@final
class LanguageLearner(Learner):
    """Trains K clients' adapters as rows of the same tensors."""

    def __init__(
        self,
        tasks: Sequence[LanguageTask],
        scenario: Scenario,
        model: LanguageModel | None = None,
        texts: Sequence[ClientTexts] | None = None,
        seeds: Sequence[int] | None = None,
        shared: Tensor | None = None,
        proximal_weight: float | None = None,
    ) -> None:
        """Make the clients' first adapters.

        model, texts: opened by default.
        seeds: name the clients' random streams; by default they follow from the scenario's seed and the names.
        shared: [S] int64, the columns that clients share; by default those of all blocks that may be shared.
        proximal_weight: how strongly these are pulled to the anchor; by default `penalty.squared`.
        """
        self.scenario, self.tasks = scenario, tuple(tasks)
        self.names = [task.client for task in tasks]
        self.seeds = [client_seed(scenario.seed, name) for name in self.names] if seeds is None else list(seeds)
        self.model = open_language_model(scenario) if model is None else model
        self.texts = open_texts(tasks, self.model, self.seeds) if texts is None else list(texts)
        self.policy, layout = self.model.policy, self.model.policy.layout
        self._tensors = ClientTensors.start(
            first_parameters(self.policy, scenario, self.seeds).to(self.model.device),
            scenario,
            layout.mask(layout.shared).nonzero().squeeze(1) if shared is None else shared,
            scenario.penalty.squared if proximal_weight is None else proximal_weight,
            token_entropy_weights(self.tasks, scenario),
            layout.frozen,
        )
        self.parameters, self.anchor = self._tensors.parameters, self._tensors.anchor
        self.drift, self.optimiser_steps = self._tensors.drift, self._tensors.adam.count
        groups = PenaltyGroups.resolve(self.policy, scenario, self.model.device)
        self.stack = make_parameter_stack(scenario, self.tasks, self.seeds, self._tensors, groups)
        counts = np.zeros((len(tasks), 4), np.int64)
        self.steps_done, self.updates_done, self.steps_due, self.draws_done = counts.T
        self.levels = None
        """[K] each: a batch may take a client beyond the steps that are due, and the next round has less to do then."""
        self.measurement_rows: list[dict[str, np.ndarray]] = [{} for _ in tasks]
        """For each client some completions of its last batch, to measure server steps on; they stay with the client."""
        self._state_arrays: Mapping[str, Tensor | np.ndarray] = {
            "parameters": self.parameters,
            "adam.mean": self._tensors.adam.mean,
            "adam.square": self._tensors.adam.square,
            "adam.count": self._tensors.adam.count,
            "kl_coefficient": self._tensors.kl_coefficient[:, None],
            "progress": counts,
            **({"adam.turns": self._tensors.phase_counts} if scenario.personal.first else {}),
            **({ENTROPY_WEIGHTS: self._tensors.entropy} if scenario.objective.entropy_target is not None else {}),
        }
        """A client's state is its row of each, and its measurement rows."""

    def train(
        self, steps: int, begin: float = 0.0, end: float = 0.0, anchor: Tensor | None = None
    ) -> list[TrainingReport]:
        """Train every client on `steps` more completions; schedules go from progress `begin` to `end`.

        anchor: [K, P], the point that penalties and KL are measured from; by default the parameters at the start.
        """
        self.anchor.copy_(self.parameters if anchor is None else anchor)
        self.steps_due += steps
        records = [_TrainingRecord() for _ in self.tasks]
        batch: CompletionBatch | None = None
        # batches are equally large, so all clients need the same number of them
        while (self.steps_done < self.steps_due).any():
            progress = begin + (end - begin) * (1 - (self.steps_due - self.steps_done).clip(0) / steps)
            batch, drawn = self.collect()
            targets = completion_targets(
                batch.rewards, self._groups(batch.rewards), batch.rows.valid, ~batch.ended, self.scenario
            )
            constraints = adapt_entropy(self.stack, partial(sampled_entropies, batch))
            losses = update_adapters(self.stack, self.model, batch, targets, self.updates_done, progress)
            for client, record in enumerate(records):
                record.add(batch, client, losses[client], drawn)
                record.constraints.append({key: float(value[client]) for key, value in constraints.items()})
            self._refuse_divergence()
            self.steps_done += batch.rewards.shape[1]
            self.updates_done += 1
        if batch is not None:
            self._keep_measurement_rows(batch)
        penalties = measure_penalty(self.stack)
        return [record.report(name, more) for record, name, more in zip(records, self.names, penalties, strict=True)]

    def scale_learning_rates(self, factors: np.ndarray) -> None:
        """Multiply the clients' own learning rates by factors [K] from now on."""
        self.stack.learning_rate[:] = own_learning_rates(self.tasks) * factors[:, None]

    def collect(self) -> tuple[CompletionBatch, Drawn]:
        """Write a batch of completions; gives also what was drawn for it.

        With `group.equal = "redraw"` a client replaces its groups with equal rewards by others, as far as these differ.
        """
        settings, everyone = self.scenario.group, np.arange(len(self.tasks))
        batch = self._write(everyone)
        equal = self._equal(batch.rewards)
        drawn = Drawn(
            equal.float().mean(1).cpu().numpy(), np.zeros(len(self.tasks), int), np.zeros(len(self.tasks), int)
        )
        drawn.count(batch, everyone)
        for _ in range(settings.redraws if settings.equal == "redraw" else 0):
            clients = equal.any(1).cpu().numpy().nonzero()[0]
            if not len(clients):
                break
            other = self._write(clients)
            drawn.count(other, clients)
            batch = replace_equal_groups(batch, equal, other, ~self._equal(other.rewards), clients)
            equal = self._equal(batch.rewards)
        return batch, drawn

    def evaluate(self, episodes: int | None = None, deterministic: bool = True, number: int = 0) -> list[Evaluation]:
        """Answer prompts for evaluation; `number` names them, and they are the same for any policy."""
        return evaluate_completions(
            self.model,
            self.texts,
            self.parameters,
            Purpose.EVALUATION,
            number,
            self.scenario.evaluate.episodes if episodes is None else episodes,
            deterministic,
        )

    def fisher(self, number: int) -> Tensor:
        """The diagonal of each policy's Fisher matrix on the client's measurement rows, [K, P]."""
        return completion_fisher(self.model, self.measurement_rows, self.parameters)

    def skip_to(self, steps: int) -> None:
        """Count every client as one that was trained for `steps` completions in all, whether it took part or not."""
        batch = self.scenario.rollout.num_envs
        self.steps_due[:] = steps
        self.steps_done[:] = -(-steps // batch) * batch

    def state(self, row: int) -> dict[str, np.ndarray]:
        """Copies of all that one client needs to go on, bit for bit, in another process."""
        arrays = {
            name: np.array(rows[row].cpu().numpy() if isinstance(rows, Tensor) else rows[row])
            for name, rows in self._state_arrays.items()
        }
        return arrays | join_states({MEASUREMENT_ROWS: self.measurement_rows[row]})

    def load(self, states: Sequence[State]) -> None:
        """Go on from one state for each client, some of which may not have learned yet."""
        for row, state in enumerate(states):
            for name, rows in self._state_arrays.items():
                if name in BEGINS_LATE and name not in state:
                    continue
                if isinstance(rows, Tensor):
                    rows[row] = torch.from_numpy(np.array(state[name]))
                else:
                    rows[row] = state[name]
            self.measurement_rows[row] = sub_state(state, MEASUREMENT_ROWS)

    def load_constraints(self, row: int, state: State) -> None:
        """Go on from the constraints of a client's state alone."""
        for name in BEGINS_LATE & self._state_arrays.keys() & state.keys():
            self._state_arrays[name][row] = torch.from_numpy(np.array(state[name]))

    def close(self) -> None:
        """Nothing is open: the model stays in the process."""

    def _write(self, clients: np.ndarray) -> CompletionBatch:
        """Let some clients, rows of the stack, write a batch."""
        settings, completions = self.scenario.group, self.scenario.rollout.num_envs
        group = settings.size if settings.by == "start" else 1
        batch = write_completions(
            self.model,
            [self.texts[client] for client in clients],
            self.parameters[torch.from_numpy(clients).to(self.parameters.device)],
            Purpose.PROMPTS,
            self.draws_done[clients].tolist(),
            completions // group,
            group,
        )
        self.draws_done[clients] += 1
        return batch

    def _groups(self, rewards: Tensor) -> Tensor:
        return completion_groups(rewards, self.scenario.group)

    def _equal(self, rewards: Tensor) -> Tensor:
        """Which completions are in a group with equal rewards, or in one without any reward, [K, N] bool."""
        groups = self._groups(rewards)
        equal = equal_groups(rewards, groups.masked_fill(rewards.isnan(), -1))
        size = self.scenario.group.size if self.scenario.group.by == "start" else rewards.shape[1]
        none = rewards.isnan().view(len(rewards), -1, size).all(-1).repeat_interleave(size, 1)
        return equal | none

    def _keep_measurement_rows(self, batch: CompletionBatch) -> None:
        """Keep some completions of each client's last batch, drawn from its own stream."""
        if not measures_steps(self.scenario):
            return
        for client, seed in enumerate(self.seeds):
            draws = generator(seed, Purpose.STATES, int(self.updates_done[client]))
            completions = batch.rewards.shape[1]
            count = min(self.scenario.proximity.states, completions)
            chosen = draws.choice(completions, count, replace=False)
            self.measurement_rows[client] = pack_rows(batch.rows, client, chosen)

    def _refuse_divergence(self) -> None:
        if math.isfinite(self.parameters.sum()):
            return
        for task, number, finite in zip(self.tasks, self.updates_done, self.parameters.isfinite().all(1), strict=True):
            if not finite:
                raise DivergedError(
                    f"client {task.client}: its adapters are no longer finite after update {number + 1}; lower its"
                    f" learning_rate, which is {task.learning_rate:g}, or objective.max_grad_norm"
                )


def open_texts(tasks: Sequence[LanguageTask], model: LanguageModel, seeds: Sequence[int]) -> list[ClientTexts]:
    """Open the prompts and rewards of clients, whose random streams these seeds name."""
    context = model.policy.shape.context
    return [ClientTexts(task, model.tokenizer, context, seed) for task, seed in zip(tasks, seeds, strict=True)]


def evaluate_completions(
    model: LanguageModel,
    texts: Sequence[ClientTexts],
    parameters: Tensor,
    purpose: Purpose,
    number: int,
    count: int,
    deterministic: bool,
) -> list[Evaluation]:
    """Answer `count` prompts of every client without learning; a completion without a reward scores 0."""
    batch = write_completions(model, texts, parameters, purpose, [number] * len(texts), count, 1, deterministic)
    rewards = batch.rewards.nan_to_num(0.0).double().cpu().numpy()
    lengths = batch.rows.valid.sum(-1).cpu().numpy()
    return [
        Evaluation(text.task.client, deterministic, rewards[client], lengths[client])
        for client, text in enumerate(texts)
    ]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What K clients have drawn and written for a batch."""

    equal: np.ndarray
    """[K]: share of the groups drawn first whose rewards are equal."""
    completions: np.ndarray
    """[K] int: completions written, with those of groups that were drawn again."""
    tokens: np.ndarray
    """[K] int: their tokens."""

    def count(self, batch: CompletionBatch, clients: np.ndarray) -> None:
        """Count a batch that some clients have written."""
        self.completions[clients] += batch.rewards.shape[1]
        self.tokens[clients] += batch.rows.valid.sum((1, 2)).cpu().numpy()


@dataclass
class _TrainingRecord:
    """What one client does while it is trained."""

    steps: int = 0
    written: int = 0
    tokens: int = 0
    episodes: list[Episode] = field(default_factory=list)
    losses: list[Mapping[str, float]] = field(default_factory=list)
    constraints: list[Mapping[str, float]] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)

    def add(self, batch: CompletionBatch, client: int, losses: Mapping[str, float], drawn: Drawn) -> None:
        """Add a batch, what was drawn for it, and the losses of its update."""
        lengths = batch.rows.valid[client].sum(-1).tolist()
        rewards, ended = batch.rewards[client].tolist(), batch.ended[client].tolist()
        self.steps += len(rewards)
        self.written += int(drawn.completions[client])
        self.tokens += int(drawn.tokens[client])
        self.episodes += [
            Episode(reward, length, end)
            for reward, length, end in zip(rewards, lengths, ended, strict=True)
            if math.isfinite(reward)
        ]
        self.losses.append(losses)
        self.parts.append(batch.parts[client])
        self.equal.append(float(drawn.equal[client]))

    def report(self, client: str, penalty: Mapping[str, float]) -> TrainingReport:
        if not self.losses:
            return TrainingReport(client, 0, (), {}, penalty)
        means = {name: float(np.mean([losses[name] for losses in self.losses])) for name in self.losses[0]}
        more = {f"reward/{name}": _mean_of_finite([part[name] for part in self.parts]) for name in self.parts[0]}
        more |= mean_by_name(self.constraints)
        more["charts/equal_groups"] = float(np.mean(self.equal))
        if self.written > self.steps:
            more["charts/completions_written"] = float(self.written)
        if self.episodes:
            more["charts/cut"] = float(np.mean([not episode.terminated for episode in self.episodes]))
        floor = min((episode.score for episode in self.episodes), default=math.nan)
        return TrainingReport(client, self.steps, tuple(self.episodes), means, penalty, more, self.tokens, floor)


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
