"""A learner of another kind: adapters on a frozen base that write text, one token at a time.

The vocabulary has as many tokens as the adapter has parameters: a client's policy writes tokens from softmax(base +
adapter), and its reward is the share of its favourite token. The KL of a step is measured on text that the client has
written, which does not leave it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.learner import PERSONAL, ClientPolicies, Learner, State
from grpo_fed.rl.records import Episode, Evaluation, TrainingReport
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym_task import GymTask

LENGTH = 16
"""Tokens of a completion."""


class TextPolicies(ClientPolicies):
    """Policies that write text; the layout of the adapters is that of the scenario's network."""

    def __init__(self, tasks: Sequence[GymTask], scenario: Scenario, shared_blocks: SharedBlocks) -> None:
        self.policy = make_policy(tasks[0], scenario.policy)
        self.columns = shared_blocks.columns_in(self.policy.layout)
        self.device = torch.device("cpu")
        self.base = torch.from_numpy(np.random.default_rng(0).normal(size=self.policy.layout.size)).float()
        """[P]: frozen."""

    def log_probs(self, adapters: Tensor) -> Tensor:
        """Log-probabilities of all tokens, [K, P] -> [K, P]."""
        return torch.log_softmax(self.base + adapters, 1)

    def make_learner(self, clients: Sequence[str], round: int = 1, personal: bool = False) -> TextLearner:
        return TextLearner(self, [f"{name} {PERSONAL}" if personal else name for name in clients])

    def parameters(self, clients: Sequence[str], states: Sequence[State | None]) -> Tensor:
        size = self.policy.layout.size
        return torch.stack([torch.zeros(size) if state is None else torch.tensor(state["adapter"]) for state in states])

    def evaluate(
        self,
        clients: Sequence[str],
        parameters: Tensor,
        states: Sequence[State | None],
        number: int,
        deterministic: bool,
    ) -> list[Evaluation]:
        rewards = self.log_probs(parameters).exp()
        scores = [np.full(2, float(rewards[row, favourite(name, rewards)])) for row, name in enumerate(clients)]
        return [Evaluation(name, deterministic, scores[row], np.full(2, LENGTH)) for row, name in enumerate(clients)]

    def can_measure(self, state: State) -> bool:
        return len(state["completions"]) > 0

    def measure_kl(self, states: Sequence[State], old: Tensor, new: Iterable[Tensor]) -> Tensor:
        tokens = torch.stack([torch.tensor(state["completions"]) for state in states])
        before = self.log_probs(old).gather(1, tokens)
        return torch.stack([(before - self.log_probs(each).gather(1, tokens)).mean(1) for each in new])

    def observation_moments(self, state: State | None) -> State | None:
        return None

    def close(self) -> None:
        pass


class TextLearner(Learner):
    """Follows the exact policy gradient of the reward."""

    def __init__(self, policies: TextPolicies, names: list[str]) -> None:
        self.policies, self.names = policies, names
        self.parameters = torch.zeros(len(names), policies.policy.layout.size)
        self.anchor = self.parameters.clone()
        self.completions = [np.zeros(0, np.int64) for _ in names]
        self.steps = np.zeros(len(names), np.int64)

    def skip_to(self, steps: int) -> None:
        self.steps[:] = steps

    def train(
        self, steps: int, begin: float = 0.0, end: float = 0.0, anchor: Tensor | None = None
    ) -> list[TrainingReport]:
        self.anchor.copy_(self.parameters if anchor is None else anchor)
        reports = []
        for row, name in enumerate(self.names):
            probs = self.policies.log_probs(self.parameters[row : row + 1])[0].exp()
            goal = favourite(name, probs[None])
            rng = np.random.default_rng([zlib.crc32(name.encode()), int(self.steps[row])])
            weights = probs.double().numpy()
            self.completions[row] = rng.choice(len(weights), LENGTH, p=weights / weights.sum())
            gradient = -probs[goal] * probs
            gradient[goal] += probs[goal]
            self.parameters[row] += 10 * gradient
            reward = float((self.completions[row] == goal).mean())
            reports.append(TrainingReport(name, steps, (Episode(reward, LENGTH, True),), {"policy_loss": -reward}))
        self.steps += steps
        return reports

    def state(self, row: int) -> dict[str, np.ndarray]:
        return {
            "adapter": self.parameters[row].numpy().copy(),
            "completions": self.completions[row].copy(),
            "steps": self.steps[row : row + 1].copy(),
        }

    def load(self, states: Sequence[State]) -> None:
        for row, state in enumerate(states):
            self.parameters[row] = torch.tensor(state["adapter"])
            self.completions[row], self.steps[row] = state["completions"], state["steps"][0]

    def fisher(self, number: int) -> Tensor:
        probs = self.policies.log_probs(self.parameters).exp()
        return probs * (1 - probs)

    def close(self) -> None:
        pass


def favourite(client: str, like: Tensor) -> int:
    """The token that a client is rewarded for, of as many as `like` [K, P] has columns."""
    return zlib.crc32(client.encode()) % like.shape[1]
