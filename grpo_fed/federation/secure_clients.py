"""A client's side of secure aggregation: it carries out each step of a session once, and remembers which on its disk.

If a message comes again, it is answered again, as long as it asks for the same: a client that masked other numbers in
the same way, or handed out shares for two lists of those that answered, would give away what the masks hide.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np

from grpo_fed.aggregation.secure.participant import Participant, threshold_of
from grpo_fed.federation.masked_vectors import MaskedVectors
from grpo_fed.federation.messages import Answer, Instruction, SecureParts, SecureStep, Start, Train, Trained
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.files import write_atomic
from grpo_fed.scenario.scenario import Scenario

NONE = np.zeros(0, np.float32)
"""In the place of a point that does not leave its client."""


@dataclass(frozen=True)
class _Memory:
    """What a client remembers of a session, as JSON."""

    session: str
    round: int
    secrets: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    """Its neighbours' public keys."""
    masked: str = ""
    """A hash of what it has masked, and with whom."""
    revealed: str = ""
    """A hash of the lists for which it has handed out shares."""


@final
class SecureClients:
    """Follows the steps of secure aggregation for the clients of a store."""

    def __init__(self, scenario: Scenario, shared_blocks: SharedBlocks, store: StateStore) -> None:
        self._scenario, self._store = scenario, store
        self._vectors = MaskedVectors.of(scenario, shared_blocks)

    def follow(self, name: str, instruction: SecureStep) -> SecureParts:
        """Follow an instruction; ValueError if it asks for what the client must not do."""
        if not self._scenario.privacy.secure:
            raise ValueError(f"client {name}: the scenario has no privacy.secure, so there are no keys to agree on")
        match instruction.step:
            case "keys":
                participant = Participant.new(name, bytes.fromhex(instruction.session))
                secrets = (participant.encryption_key, participant.masking_key, participant.own_secret)
                memory = _Memory(instruction.session, instruction.start.round, _texts(*secrets))
                self._write(instruction.start, name, memory)
                return SecureParts((), (), *_texts(participant.public_keys))
            case "shares":
                return self._share(name, instruction)
            case "reveal":
                return self._reveal(name, instruction)

    def _share(self, name: str, instruction: SecureStep) -> SecureParts:
        """Share the client's secrets with its neighbours."""
        memory = self._read(instruction.start, name, instruction.session)
        keys = dict(zip(instruction.names, instruction.parts, strict=True))
        threshold_of(len(keys))
        if memory.keys and dict(memory.keys) != keys:
            raise ValueError(f"client {name}: it has shared its secrets in this session, with other keys")
        self._write(instruction.start, name, replace(memory, keys=keys))
        participant = _participant(name, memory)
        sent = participant.share(_bytes(keys))
        return SecureParts(tuple(sent), _texts(*sent.values()), *_texts(participant.commitment))

    def _reveal(self, name: str, instruction: SecureStep) -> SecureParts:
        """Hand out shares of its neighbours' secrets, for one list of those that answered."""
        memory = self._read(instruction.start, name, instruction.session)
        threshold, answered = threshold_of(len(memory.keys)), sorted({*instruction.answered} & {*memory.keys})
        if not memory.masked:
            raise ValueError(f"client {name}: it has sent no numbers in this session")
        if len(answered) < threshold:
            raise ValueError(
                f"client {name}: the server has the numbers of {len(answered)} of its {len(memory.keys)} neighbours,"
                f" and for fewer than {threshold} it hands out no shares"
            )
        digest = hashlib.sha256(json.dumps([answered, sorted(instruction.names)]).encode()).hexdigest()
        if memory.revealed not in ("", digest):
            raise ValueError(f"client {name}: it has handed out shares in this session, for other lists of clients")
        self._write(instruction.start, name, replace(memory, revealed=digest))
        parts = zip(instruction.names, instruction.parts, strict=True)
        sent = {each: b64decode(part) for each, part in parts if each in memory.keys}
        revealed = _participant(name, memory).reveal(_bytes(memory.keys), sent, answered)
        return SecureParts(tuple(revealed), _texts(*revealed.values()))

    def protect(self, instructions: Mapping[str, Instruction], answers: Mapping[str, Answer]) -> dict[str, Answer]:
        """Mask what clients have learned, if the scenario says so; ValueError if the server would have it unmasked."""
        protected = dict(answers)
        for name, answer in answers.items() if self._scenario.privacy.secure else ():
            instruction = instructions[name]
            if isinstance(answer, Trained) and isinstance(instruction, Train):
                protected[name] = self._mask(name, instruction, answer)
        return protected

    def _mask(self, name: str, train: Train, trained: Trained) -> Trained:
        """Put a client's masked vector into the place of its point."""
        plan = train.mask
        if plan is None:
            raise ValueError(f"client {name}: with privacy.secure it sends nothing that is not masked")
        memory = self._read(train.start, name, plan.session)
        threshold = threshold_of(len(memory.keys))
        if not {*plan.peers} <= {*memory.keys} or len({*plan.peers}) < threshold:
            raise ValueError(
                f"client {name}: its numbers are masked with {threshold} at least of its {len(memory.keys)} neighbours,"
                f" not with {len(plan.peers)}"
            )
        words = self._vectors.write(train.start.shared, trained.point, plan.bounds, plan.clients)
        digest = hashlib.sha256(json.dumps(sorted(plan.peers)).encode() + words.tobytes()).hexdigest()
        if memory.masked not in ("", digest):
            raise ValueError(f"client {name}: it has masked other numbers in this session")
        self._write(train.start, name, replace(memory, masked=digest))
        keys = {peer: b64decode(memory.keys[peer]) for peer in plan.peers}
        return replace(trained, point=NONE, difference=None, masked=_participant(name, memory).mask(words, keys))

    def _path(self, start: Start, name: str) -> Path:
        return self._store.session_path(start.run, name)

    def _read(self, start: Start, name: str, session: str) -> _Memory:
        """Read what a client remembers; ValueError if that is of another session."""
        path, memory = self._path(start, name), None
        if path.is_file():
            memory = _Memory(**json.loads(path.read_text(encoding="utf-8")))
        if memory is None or (memory.session, memory.round) != (session, start.round):
            raise ValueError(
                f"client {name}: it has no keys of this session of round {start.round}; it takes part again in the next"
                " round"
            )
        return memory

    def _write(self, start: Start, name: str, memory: _Memory) -> None:
        write_atomic(self._path(start, name), json.dumps(asdict(memory)), private=True)


def _participant(name: str, memory: _Memory) -> Participant:
    return Participant(name, bytes.fromhex(memory.session), *map(b64decode, memory.secrets))


def _texts(*parts: bytes) -> tuple[str, ...]:
    return tuple(b64encode(part).decode() for part in parts)


def _bytes(parts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: b64decode(part) for name, part in parts.items()}
