"""Hostile clients: answers that a scenario's `[[clients]] attack` has them give.

A client that lies by itself does so where it runs, on any engine (`lie`). Clients that collude need what the honest
ones sent, which no real client sees before the server does; so they are simulated between the transport and the
server, as the literature does (`ColludingTransport`), on the local engine alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.attacks import COLLUDING, HonestRound, random_step, reverse, scale
from grpo_fed.aggregation.merge import Merged, Replies, Reply
from grpo_fed.aggregation.merge.rules import RULES_WITH_EVIDENCE, bind_rule
from grpo_fed.federation.compression import add_difference, round_difference
from grpo_fed.federation.messages import Answer, Evaluated, EvaluationSummary, Instruction, Measured, Train, Trained
from grpo_fed.federation.transport import Transport
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

DEFAULT_STRENGTH = {"sign-flip": 1.0, "scaled": 100.0, "random": 10.0}
"""The strengths of attacks on the parameters."""
LIE = 1000.0
"""The strength of lies: how many times the truth a client says, or the KL that it reports."""
FINITE = float(np.finfo(np.float32).max) / 4
"""The largest parameter that a hostile client sends: an answer that is not finite is refused anyway."""


@dataclass(frozen=True)
class ClientAttack:
    """The attack of one client."""

    kind: str
    strength: float | None = None
    """How strong; None for the attack's own default."""


def attacks_of(scenario: Scenario) -> dict[str, ClientAttack]:
    """List the hostile clients of a scenario by name, with their attacks."""
    return {
        name: ClientAttack(settings.attack, settings.strength)
        for settings in scenario.clients
        if settings.attack != "none"
        for name in settings.names
    }


def colluding_clients(scenario: Scenario) -> dict[str, ClientAttack]:
    """List the clients that need what the others sent."""
    return {name: attack for name, attack in attacks_of(scenario).items() if attack.kind in COLLUDING}


def refuse_collusion(scenario: Scenario, engine: str) -> None:
    """Raise a ValueError if clients collude, on an engine on which nobody knows what the honest clients sent."""
    for name, attack in colluding_clients(scenario).items():
        raise ValueError(
            f'client {name}: attack = "{attack.kind}": clients that collude need what all honest clients sent, which'
            f" nobody knows with {engine}; use --engine local, or an attack such as sign-flip"
        )


# Alone ---------------------------------------------------------------------------------------------------------------


def lies(
    instructions: Mapping[str, Instruction],
    answers: Mapping[str, Answer],
    attacks: Mapping[str, ClientAttack],
    scenario: Scenario,
) -> dict[str, Answer]:
    """Return what the hostile ones of some clients answer in place of their honest answers."""
    return {
        name: lie(name, instructions[name], answers[name], attacks[name], scenario)
        for name in attacks.keys() & answers.keys()
    }


def lie(client: str, instruction: Instruction, answer: Answer, attack: ClientAttack, scenario: Scenario) -> Answer:
    """Return what a hostile client answers in place of its honest answer."""
    strength = DEFAULT_STRENGTH.get(attack.kind, LIE) if attack.strength is None else attack.strength
    if isinstance(answer, Measured) and attack.kind == "kl":
        return Measured((strength,) * len(answer.kl))
    if isinstance(answer, Evaluated) and attack.kind == "returns":
        return Evaluated(_boast(answer.summary, strength))
    if not isinstance(answer, Trained) or not isinstance(instruction, Train):
        return answer
    lied = _lie_after_training(client, instruction, answer, attack.kind, strength, scenario)
    if lied.difference is None:
        return lied
    difference, _ = round_difference(lied.point - instruction.start.shared)
    return replace(lied, point=add_difference(instruction.start.shared, difference), difference=difference)


def _lie_after_training(
    client: str, train: Train, answer: Trained, kind: str, strength: float, scenario: Scenario
) -> Trained:
    """Change an answer to `Train`; attacks by a task, and by clients that collude, change nothing here."""
    point = torch.from_numpy(answer.point.copy()).double()
    shared = torch.from_numpy(train.start.shared.copy()).double()
    if kind in ("weight", "fisher", "returns"):
        answer = _with_point(answer, reverse(point, shared, 1.0))
    changed: dict[str, Callable[[], Trained]] = {
        "sign-flip": lambda: _with_point(answer, reverse(point, shared, strength)),
        "scaled": lambda: _with_point(answer, scale(point, shared, strength)),
        "random": lambda: _with_point(
            answer, random_step(point, shared, strength, _generator(client, train, scenario))
        ),
        "kl": lambda: answer if answer.kl is None else replace(answer, kl=(strength,) * len(answer.kl)),
        "weight": lambda: _lie_about_weight(answer, strength, scenario),
        "fisher": lambda: _lie_about_fisher(answer, strength),
        "returns": lambda: _lie_about_returns(answer, strength),
    }
    return changed.get(kind, lambda: answer)()


def _generator(client: str, train: Train, scenario: Scenario) -> torch.Generator:
    """Make the random stream of a client's attack in a round, which no other draw depends on."""
    key = zlib.crc32(f"{client} attack".encode())
    words = np.random.SeedSequence([scenario.seed, key, train.start.round]).generate_state(1)
    return torch.Generator().manual_seed(int(words[0]))


def _lie_about_weight(answer: Trained, strength: float, scenario: Scenario) -> Trained:
    """Claim as much work as the server believes, many times the episodes, and a great gain.

    In batches of a fixed size the server knows how many steps a client does; with whole episodes, how many it asked
    for. Of episodes it knows only that each has a step.
    """
    asked = scenario.steps if scenario.objective.advantage == "group" else 0
    steps = max(answer.steps, asked)
    episodes = min(int(answer.episodes * strength), steps)
    return replace(answer, steps=steps, episodes=episodes, gain=strength, spread=1.0)


def _lie_about_fisher(answer: Trained, strength: float) -> Trained:
    """Claim to know each parameter many times as well, where a Fisher diagonal is asked for."""
    if answer.fisher is None:
        return answer
    return replace(answer, fisher=np.minimum(answer.fisher * np.float32(strength), np.float32(FINITE)))


def _lie_about_returns(answer: Trained, strength: float) -> Trained:
    """Claim many times the return that was reached, and many times the gain."""
    metrics = dict(answer.metrics)
    if TRAINING_RETURN in metrics:
        metrics[TRAINING_RETURN] += (strength - 1) * abs(metrics[TRAINING_RETURN])
    played = None if answer.evaluation is None else _boast(answer.evaluation, strength)
    return replace(answer, metrics=metrics, evaluation=played, gain=strength * abs(answer.gain))


def _boast(played: EvaluationSummary, strength: float) -> EvaluationSummary:
    """Claim an evaluation whose best episodes reached many times as much."""
    mean = played.mean + (strength - 1) * abs(played.mean)
    return replace(played, mean=mean, most=max(played.most, mean))


def _with_point(answer: Trained, point: Tensor) -> Trained:
    """Put another point into an answer, [S] of any float type; numbers beyond float32's are cut."""
    cut = point.nan_to_num(nan=0.0).clamp(-FINITE, FINITE)
    return replace(answer, point=cut.float().numpy())


# Together ------------------------------------------------------------------------------------------------------------


@final
class ColludingTransport:
    """Replaces what colluding clients send by an attack that is made of what all honest clients sent in that round.

    Every other answer passes as it came. All answers to `Train` are held until the last is there.
    """

    def __init__(self, transport: Transport, scenario: Scenario, shared_blocks: SharedBlocks) -> None:
        self._transport, self._scenario, self._shared_blocks = transport, scenario, shared_blocks
        self._attacks = colluding_clients(scenario)
        self._hostile = attacks_of(scenario).keys()

    @property
    def bytes_up(self) -> int:
        """Bytes that came from clients so far."""
        return self._transport.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes that went to clients so far."""
        return self._transport.bytes_down

    def reachable(self) -> tuple[str, ...]:
        """Return the clients that can be sent to now."""
        return self._transport.reachable()

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Yield every client's answer, those of colluding clients to `Train` with another point."""
        answers = self._transport.send(instructions, deadline)
        if not any(isinstance(instruction, Train) for instruction in instructions.values()):
            yield from answers
            return
        held = dict(answers)
        yield from (held | self._forged(instructions, held)).items()

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        """Refuse: in rounds that do not wait, no client can know what all others sent."""
        raise ValueError("clients that collude need rounds that wait for all clients; leave out their attack")

    def collect(self, timeout: float) -> Iterable[tuple[str, Answer | Failure]]:
        """Return nothing, as nothing can be submitted."""
        return ()

    def _forged(
        self, instructions: Mapping[str, Instruction], answers: Mapping[str, Answer | Failure]
    ) -> dict[str, Answer | Failure]:
        """Forge the answers of colluding clients that answered at all; without an honest answer they stay."""
        trained = {
            name: answer for name, answer in answers.items() if isinstance(answer, Trained) and answer.point.size
        }
        honest = {name: answer for name, answer in trained.items() if name not in self._hostile}
        colluding = {name: answer for name, answer in trained.items() if name in self._attacks}
        if not honest or not colluding:
            return {}
        shared = torch.from_numpy(instructions[next(iter(honest))].start.shared.copy())
        points = torch.stack([torch.from_numpy(answer.point.copy()).double() for answer in honest.values()])
        groups, rule = self._shared_blocks.groups, self._rule()

        def merge(point: Tensor) -> Tensor:
            sent = {name: replace(answer) for name, answer in honest.items()}
            sent |= {name: _with_point(answer, point) for name, answer in colluding.items()}
            replies = Replies.of(Reply(name, torch.from_numpy(each.point.copy()), 1.0) for name, each in sent.items())
            return rule(replies, shared, groups).point.double()

        round = HonestRound(points, shared.double(), len(colluding), merge)
        made: dict[ClientAttack, Tensor] = {}
        for name in colluding:
            attack = self._attacks[name]
            if attack not in made:
                made[attack] = COLLUDING[attack.kind](round, attack.strength)
        return {name: _with_point(answer, made[self._attacks[name]]) for name, answer in colluding.items()}

    def _rule(self) -> Callable[..., Merged]:
        """Return the server's rule; the mean in place of those that a single round does not define."""
        settings = self._scenario.merge
        if settings.rule in (*RULES_WITH_EVIDENCE, "fisher"):
            settings = settings.model_copy(update={"rule": "mean"})
        return bind_rule(settings)
