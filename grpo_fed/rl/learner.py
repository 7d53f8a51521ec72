"""What a federation needs of clients that learn: two interfaces, and no word about how they learn.

Clients whose policies have the same shape are learned, evaluated and measured together. `ClientPolicies` holds what
they have in common (a network's shape, environments, or one frozen base model) and answers every question about
policies that come as arrays: it evaluates them, measures the KL between them, and makes learners. A `Learner` trains
some of these clients, one row of every tensor for each.

Between two rounds a client is its state: named arrays that a learner writes and reads. A federation stores a state and
hands it back without looking inside. It may hold data that must not leave the client, such as the observations (or
completions) that the KL of a server step is measured on.

K clients, P parameters of one policy, S of them shared, M candidate policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.rl.levels import ClientLevels
from grpo_fed.rl.records import Evaluation, Example, TrainingReport
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import Task

AnyTask = TypeVar("AnyTask", bound=Task)
State: TypeAlias = Mapping[str, np.ndarray]
"""Arrays of one client by name, from which a learner in any process goes on bit for bit."""

ADAPTED = "adapted"
"""Names the random streams of a client's policy that is adapted on a copy."""
PERSONAL = "own"
"""Names what belongs to a client's second policy: its arrays in the client's state, and its random streams."""
TWIN = "twin"
"""Names what belongs to a client's twin, which learns alone: its arrays in the state, and its random streams."""
Role: TypeAlias = Literal["shared", "personal", "twin"]
"""Which of a client's policies: the one that it shares, its second one (`personal.model`), or its twin, which learns
the same task without sharing (`evaluate.twins`)."""


class Learner(ABC):
    """Trains K clients side by side, each with parameters, an optimiser and random streams of its own."""

    scenario: Scenario
    policy: Policy
    """The policies' common shape."""
    tasks: Sequence[Task]
    """[K]: the clients' tasks, in the order of the rows."""
    names: Sequence[str]
    """[K]: names of the clients."""
    parameters: Tensor
    """[K, P]: the policies. The caller may write into it before `train`, to put shared blocks in place."""
    anchor: Tensor
    """[K, P]: the point that the last call of `train` penalised the distance to."""
    drift: Tensor | None
    """[K, P]: what each step of Adam has added, with `merge.correct_drift`; the caller may write into it."""
    optimiser_steps: np.ndarray
    """[K, 1]: how many steps of Adam each client has made."""
    steps_done: np.ndarray
    """[K] int64: the steps that each client has learned from."""
    steps_due: np.ndarray
    """[K] int64: the steps that it had to, which a batch may go beyond."""
    levels: ClientLevels | None
    """What the clients with a curriculum train on; None for a kind of task that has no levels."""

    @abstractmethod
    def skip_to(self, steps: int) -> None:
        """Count every client as one that was trained for `steps` steps in all, whether it took part or not.

        A round seldom ends with a whole batch, and what is over counts for the next one. This way clients that missed
        different rounds need the same number of batches.
        """

    @abstractmethod
    def train(
        self, steps: int, begin: float = 0.0, end: float = 0.0, anchor: Tensor | None = None
    ) -> list[TrainingReport]:
        """Train every client on `steps` more steps of its task, and report on each.

        begin, end: progress of the run, 0 to 1, between which the schedules move.
        anchor: [K, P], the point that penalties and KL are measured from; by default the parameters at the start.
        """

    @abstractmethod
    def scale_learning_rates(self, factors: np.ndarray) -> None:
        """Multiply the clients' own learning rates by factors [K] from now on."""

    @abstractmethod
    def evaluate(self, episodes: int | None = None, deterministic: bool = True, number: int = 0) -> list[Evaluation]:
        """Play episodes of every client without learning.

        episodes: by default `evaluate.episodes`.
        number: names the episodes; these are the same for any policy.
        """

    @abstractmethod
    def state(self, row: int) -> dict[str, np.ndarray]:
        """Copies of all that one client needs to go on."""

    @abstractmethod
    def load(self, states: Sequence[State]) -> None:
        """Go on from one state for each client, some of which may not have stepped yet."""

    @abstractmethod
    def fisher(self, number: int) -> Tensor:
        """The diagonal of each policy's Fisher matrix on the client's measurement states, [K, P].

        number: names the random stream of the sampled actions; a round's number.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the environments."""


class ClientPolicies(ABC):
    """Evaluates, measures and trains the policies of clients whose policies have the same shape."""

    policy: Policy
    """The policies' common shape."""
    columns: Tensor
    """[S] int64: the columns of the parameters that clients share, in the order of the shared blocks."""
    device: torch.device

    @abstractmethod
    def make_learner(self, clients: Sequence[str], round: int = 1, role: Role = "shared") -> Learner:
        """A learner of some clients, which begin with their first parameters.

        round: the clients learn the tasks that they have in this round. The learner can be used until one of these
        tasks changes; another one then goes on from its clients' states.
        role: which of the clients' policies learn. All but the shared ones have random streams of their own. Second
        policies are pulled to the anchor by `personal.pull`; twins make plain updates, and nothing pulls them.
        """

    @abstractmethod
    def make_adapting_learner(
        self, clients: Sequence[str], parameters: Tensor, states: Sequence[State | None], round: int
    ) -> Learner:
        """A learner that begins with copies of these policies [K, P] and a new optimiser, on random streams of its own.

        It makes plain updates, without what a server adds to those of a round. states: what the policies' inputs are
        normalised with, where they are. round: whose tasks the clients learn.
        """

    @abstractmethod
    def parameters(self, clients: Sequence[str], states: Sequence[State | None]) -> Tensor:
        """The policies in these states, [K, P]; a client's first parameters where it has no state."""

    @abstractmethod
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
        """Play `evaluate.episodes` episodes of every client without learning.

        parameters: [K, P], the policies that act.
        states: what the policies' inputs are normalised with, where they are.
        number: the round that has ended, 0 before the first. The clients play the tasks of this round, and it names the
            episodes; these are the same for any policy.
        compared: a number of other episodes to play instead, on which a client compares policies to choose one.
        batch: which of several such sets of episodes.
        """

    @abstractmethod
    def can_measure(self, state: State) -> bool:
        """Whether a state has measurement states: data of its last batch that a KL can be measured on."""

    @abstractmethod
    def measure_kl(self, states: Sequence[State], old: Tensor, new: Iterable[Tensor]) -> Tensor:
        """The mean KL(old, new) on each client's measurement states, [M, K].

        old: [K, P]; new: M of [K, P].
        """

    @abstractmethod
    def observation_moments(self, client: str, state: State | None) -> State | None:
        """The running moments that a policy's observations are normalised with, as arrays; None without them."""

    @abstractmethod
    def examples(self, client: str, parameters: Tensor) -> Sequence[Example]:
        """Examples for people of what a policy [P] does, beside what the client did before it learned; may be empty."""

    @abstractmethod
    def close(self) -> None:
        """Close the environments; not those of the learners, which are closed first."""


def plain_updates(scenario: Scenario) -> Scenario:
    """The scenario of clients that are adapted on a copy: without inner steps, and without corrected drift."""
    merge = scenario.merge.model_copy(update={"correct_drift": False})
    personal = scenario.personal.model_copy(update={"inner_rate": 0.0})
    return scenario.model_copy(update={"merge": merge, "personal": personal})


def without_sharing(scenario: Scenario, tasks: Sequence[AnyTask]) -> tuple[Scenario, list[AnyTask]]:
    """The scenario and the tasks of clients that learn alone: with plain updates, and nothing refers to shared values.

    A penalty toward zero stays as it is: it is a part of what a client minimises.
    """
    plain = plain_updates(scenario)
    plain = plain.model_copy(update={"personal": plain.personal.model_copy(update={"first": 0.0})})
    if scenario.penalty.toward == "zero":
        return plain, list(tasks)
    penalty = scenario.penalty.model_copy(update={"weight": 0.0, "l1": 0.0, "outer": 0.0})
    return plain.model_copy(update={"penalty": penalty}), [replace(task, penalty=0.0) for task in tasks]


def sub_state(state: State, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of a state, whose names begin with the part's name and a dot."""
    return {name.removeprefix(f"{part}."): array for name, array in state.items() if name.startswith(f"{part}.")}


def join_states(parts: Mapping[str, State]) -> dict[str, np.ndarray]:
    """One state of several parts; `sub_state` takes them apart again."""
    return {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}
