"""The server's side of secure aggregation in a round: keys and shares before clients learn, and shares again after.

A round whose masks cannot be taken off is left out: nothing is merged, and the run goes on with the next one.
"""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Self, TypeAlias, final

import numpy as np

from grpo_fed.aggregation.secure.participant import LEAST_NEIGHBOURS, REVEALED_BYTES, SHARES_BYTES
from grpo_fed.aggregation.secure.primitives import KEY_BYTES
from grpo_fed.aggregation.secure.recovery import SecureSumError, Session, choose_neighbours
from grpo_fed.federation.messages import (
    Answer,
    Instruction,
    MaskPlan,
    SecureParts,
    SecureStep,
    SecureStepName,
    Start,
    Train,
)
from grpo_fed.federation.secure_merge import SecureMerge
from grpo_fed.federation.trained_round import TrainedRound

Ask: TypeAlias = Callable[[Mapping[str, Instruction]], Iterable[tuple[str, Answer]]]
"""Sends instructions to clients, and iterates over the answers that came."""
SESSION_BYTES = 16
COMMITMENT_BYTES = 32


@final
class SecureRound:
    """One round's session, from the keys to the sum."""

    @classmethod
    @contextmanager
    def around(
        cls, trained: TrainedRound, starts: Mapping[str, Start], ask: Ask, notes: list[str]
    ) -> Iterator[Self | None]:
        """Hold a session around the training of a round whose merge is a secure one; None for other merges.

        starts: of the round's clients. notes: gets messages for a person.
        """
        if not isinstance(trained.merge, SecureMerge) or not starts:
            yield None
            return
        first = next(iter(starts.values()))
        secure = cls(trained.merge, first.run, first.round, ask)
        yield secure
        trained.problem = secure.finish(trained.expected)
        notes += secure.notes

    def __init__(self, merge: SecureMerge, run: str, round: int, ask: Ask) -> None:
        """ask: of a client without a valid answer the caller notes why."""
        self._merge, self._ask = merge, ask
        self._start = Start(run, round, np.zeros(0, np.float32))
        self.session = Session(secrets.token_bytes(SESSION_BYTES), {}, {})
        self._shares: dict[str, dict[str, bytes]] = {}
        """By client, the shares that its neighbours have encrypted for it."""
        self.problem: str | None = None
        """Why there is no sum; None as long as there may be one."""
        self.notes: list[str] = []
        """Messages for a person."""

    def agree(self, instructions: Mapping[str, Train]) -> dict[str, Instruction]:
        """Let clients agree on keys and share their secrets; return the instructions to those that did, with masks."""
        clients = sorted(instructions)
        if len(clients) > LEAST_NEIGHBOURS:
            self._agree_on_keys(clients)
            self._share()
        too_few = [
            name for name in self.session.commitments if len(self.session.peers_of(name)) < self.session.threshold(name)
        ]
        if not self.session.commitments or too_few:
            self.problem = (
                f"secure aggregation: of {len(clients)} clients {len(self.session.commitments)} agreed on keys; at"
                " least three have to, and more than two thirds of each one's neighbours, so nothing is merged in this"
                " round"
            )
            return {}
        count = len(self.session.commitments)
        return {
            name: replace(
                instructions[name],
                mask=MaskPlan(self.session.id.hex(), self.session.peers_of(name), count, self._merge.bounds),
            )
            for name in self.session.commitments
        }

    def _agree_on_keys(self, clients: Sequence[str]) -> None:
        keys: dict[str, bytes] = {}
        for name, answer in self._take("keys", {name: {} for name in clients}):
            with self._noting(name):
                keys[name] = _decode(answer.own, 2 * KEY_BYTES)
        if len(keys) > LEAST_NEIGHBOURS:
            self.session = replace(self.session, keys=keys, neighbours=choose_neighbours([*keys]))

    def _share(self) -> None:
        """Let the clients share their secrets, and sort the shares by the clients that they are for."""
        neighbours = self.session.neighbours
        asked = {name: {peer: self.session.keys[peer] for peer in peers} for name, peers in neighbours.items()}
        commitments: dict[str, bytes] = {}
        for name, answer in self._take("shares", asked):
            with self._noting(name):
                sent = {
                    peer: _decode(part, SHARES_BYTES) for peer, part in zip(answer.names, answer.parts, strict=True)
                }
                if {*sent} != {*neighbours[name]}:
                    raise ValueError("has shares for other clients than its neighbours")
                commitments[name] = _decode(answer.own, COMMITMENT_BYTES)
                for peer, part in sent.items():
                    self._shares.setdefault(peer, {})[name] = part
        self.session = replace(self.session, commitments=commitments)

    def finish(self, expected: int) -> str | None:
        """Take the masks off what clients have sent; return why that could not be done, None if it was.

        expected: how many clients were to take part.
        """
        answered = sorted(self._merge.weights)
        if self.problem is None:
            try:
                plain = self._unmask(self._merge.masked, answered)
                self.notes += self._merge.finish(plain, len(self.session.commitments))
            except SecureSumError as error:
                self.problem = (
                    f"secure aggregation: {error}; the numbers of {len(answered)} of {expected} clients came, and"
                    " nothing is merged in this round"
                )
        self.notes += [] if self.problem is None else [self.problem]
        return self.problem

    def _unmask(self, total: np.ndarray, answered: Sequence[str]) -> np.ndarray:
        """Take the masks off the sum [N] uint32 of these clients' vectors; SecureSumError if that cannot be done."""
        asked = {
            name: {peer: part for peer, part in self._shares.get(name, {}).items() if peer in self.session.commitments}
            for name in answered
        }
        revealed: dict[str, dict[str, bytes]] = {}
        for name, answer in self._take("reveal", asked, tuple(answered)):
            with self._noting(name):
                parts = zip(answer.names, answer.parts, strict=True)
                revealed[name] = {each: _decode(part, REVEALED_BYTES) for each, part in parts}
        for name in self.session.commitments:
            unread = [each for each, parts in revealed.items() if name in asked[each] and name not in parts]
            if unread:
                self.notes.append(
                    f"secure aggregation: {len(unread)} clients cannot read the shares that {name} sent them"
                )
        plain, wrong = self.session.unmask(total, answered, revealed)
        self.notes += [f"secure aggregation: the shares that {name} handed out are wrong" for name in wrong]
        return plain

    def _take(
        self, step: SecureStepName, parts: Mapping[str, Mapping[str, bytes]], answered: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, SecureParts]]:
        """Ask clients to take a step, each with its parts by name."""
        instructions = {
            name: SecureStep(
                self._start,
                step,
                self.session.id.hex(),
                tuple(each),
                tuple(b64encode(part).decode() for part in each.values()),
                tuple(peer for peer in answered if peer in self.session.neighbours[name]),
            )
            for name, each in parts.items()
        }
        for name, answer in self._ask(instructions):
            assert isinstance(answer, SecureParts)
            yield name, answer

    @contextmanager
    def _noting(self, client: str) -> Iterator[None]:
        """Do without the answer of a client that cannot be one, and note that."""
        try:
            yield
        except ValueError as error:
            self.notes.append(f"secure aggregation: the answer of {client} is left out: it {error}")


def _decode(text: str, size: int) -> bytes:
    """Decode so many bytes of keys or shares; ValueError for anything else."""
    try:
        content = b64decode(text, validate=True)
    except ValueError:
        content = b""
    if len(content) != size:
        raise ValueError(f"has something else than {size} bytes of keys or shares")
    return content
