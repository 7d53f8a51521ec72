"""The policies of clients with prompts: their adapters, evaluated and measured as one stacked computation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.language.examples import make_examples
from grpo_fed.rl.language.learner import MEASUREMENT_ROWS, LanguageLearner, evaluate_completions, open_texts
from grpo_fed.rl.language.measurement import completion_kl
from grpo_fed.rl.language.model import open_language_model
from grpo_fed.rl.language.texts import ClientTexts
from grpo_fed.rl.learner import (
    ADAPTED,
    PERSONAL,
    TWIN,
    ClientPolicies,
    Role,
    State,
    plain_updates,
    sub_state,
    without_sharing,
)
from grpo_fed.rl.records import Evaluation, Example
from grpo_fed.rl.rng import Purpose, client_seed
from grpo_fed.rl.stacked_policies import MOST_BATCHES
from grpo_fed.rl.start import first_parameters
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.language_task import LanguageTask


@final
class LanguagePolicies(ClientPolicies):
    """Adapters of clients as rows of one tensor, on the one base that this process has."""

    def __init__(self, tasks: Sequence[LanguageTask], scenario: Scenario, shared_blocks: SharedBlocks) -> None:
        """Open the model, and the prompts and rewards of these clients."""
        self.scenario = scenario
        self.tasks = {task.client: task for task in tasks}
        self.model = open_language_model(scenario)
        self.policy, self.device = self.model.policy, self.model.device
        self.columns = shared_blocks.columns_in(self.policy.layout).to(self.device)
        self._texts = dict(zip(self.tasks, open_texts(tasks, self.model, self._seeds(list(self.tasks))), strict=True))

    def make_learner(self, clients: Sequence[str], round: int = 1, role: Role = "shared") -> LanguageLearner:
        """A learner of some clients, which begin with their first parameters."""
        tasks = [self.tasks[name] for name in clients]
        if role == "shared":
            texts, seeds = self._texts_of(clients), self._seeds(clients)
            return LanguageLearner(tasks, self.scenario, self.model, texts, seeds, self.columns)
        seeds = self._seeds([f"{name} {PERSONAL if role == 'personal' else TWIN}" for name in clients])
        scenario, pull = self.scenario, self.scenario.personal.pull
        if role == "twin":
            (scenario, tasks), pull = without_sharing(scenario, tasks), 0.0
        return LanguageLearner(
            tasks, scenario, self.model, open_texts(tasks, self.model, seeds), seeds, self.columns, pull
        )

    def make_adapting_learner(
        self, clients: Sequence[str], parameters: Tensor, states: Sequence[State | None], round: int
    ) -> LanguageLearner:
        """A learner that begins with copies of these adapters [K, P]."""
        tasks, seeds = [self.tasks[name] for name in clients], self._seeds([f"{name} {ADAPTED}" for name in clients])
        texts = open_texts(tasks, self.model, seeds)
        learner = LanguageLearner(tasks, plain_updates(self.scenario), self.model, texts, seeds, self.columns)
        learner.parameters.copy_(parameters)
        for row, state in enumerate(states):
            if state is not None:
                learner.load_constraints(row, state)
        return learner

    def parameters(self, clients: Sequence[str], states: Sequence[State | None]) -> Tensor:
        """The policies in these states, [K, P]; a client's first parameters where it has no state."""
        first = first_parameters(self.policy, self.scenario, self._seeds(clients))
        rows = [
            fresh if state is None else torch.from_numpy(np.array(state["parameters"]))
            for fresh, state in zip(first, states, strict=True)
        ]
        return torch.stack(rows).to(self.device)

    def evaluate(
        self,
        clients: Sequence[str],
        parameters: Tensor,
        states: Sequence[State | None],
        number: int,
        deterministic: bool,
        compared: int = 0,
        batch: int = 0,
    ) -> list[Evaluation]:
        """Answer `evaluate.episodes` prompts for evaluation; to compare policies, prompts as in training."""
        return evaluate_completions(
            self.model,
            self._texts_of(clients),
            parameters,
            Purpose.COMPARISON if compared else Purpose.EVALUATION,
            number * MOST_BATCHES + batch if compared else number,
            compared or self.scenario.evaluate.episodes,
            deterministic,
        )

    def can_measure(self, state: State) -> bool:
        """Whether a state has completions of its last batch."""
        return len(state.get(f"{MEASUREMENT_ROWS}.tokens", ())) > 0

    def measure_kl(self, states: Sequence[State], old: Tensor, new: Iterable[Tensor]) -> Tensor:
        """The mean KL(old, new) of a token on each client's completions, [K, P], M of [K, P] -> [M, K]."""
        return completion_kl(self.model, [sub_state(state, MEASUREMENT_ROWS) for state in states], old, new)

    def observation_moments(self, client: str, state: State | None) -> State | None:
        """None: tokens are not normalised."""
        return None

    def examples(self, client: str, parameters: Tensor) -> Sequence[Example]:
        """Prompts with the likeliest completions of the client's first policy and of this one [P]."""
        return make_examples(self.model, self._texts[client], self.scenario, parameters)

    def close(self) -> None:
        """Nothing is open: the model stays in the process."""

    def _texts_of(self, clients: Sequence[str]) -> list[ClientTexts]:
        return [self._texts[name] for name in clients]

    def _seeds(self, names: Sequence[str]) -> list[int]:
        return [client_seed(self.scenario.seed, name) for name in names]
