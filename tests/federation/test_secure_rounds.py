"""Rounds with secure aggregation: exact sums, lost clients, and a server that learns no single client's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fed.aggregation.secure.participant import threshold_of
from grpo_fed.engines.wire import Codec, content_size, message_type
from grpo_fed.engines.wire.flower_private import pack
from grpo_fed.federation.masked_vectors import MaskedVectors
from grpo_fed.federation.messages import Answer, Instruction, MaskPlan, SecureParts, SecureStep, Start, Train, Trained
from grpo_fed.federation.round_merge import RoundMerge
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.secure_clients import SecureClients
from grpo_fed.federation.secure_merge import SecureMerge
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.reports.explain_secure import explain_secure, secure_bytes
from grpo_fed.runs.checkpoint import latest
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from tests.support.numeric_clients import NumericTransport, numeric_scenario

SECURE = ("privacy.secure=true", "privacy.reach=4.0")
Lost = Callable[[str, Instruction], Failure | None]


@dataclass
class SecureTransport:
    """Numeric clients with a real one's side of secure aggregation; all that the server gets is written down."""

    scenario: Scenario
    shared_blocks: SharedBlocks
    folder: Path
    lost: Lost = lambda name, instruction: None
    forge: Callable[[str, Answer], Answer] = lambda name, answer: answer
    """Changes what a client answers."""
    received: bytearray = field(default_factory=bytearray)
    learned: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    """By client and round, where a client arrived."""
    up: int = 0
    down: int = 0

    def __post_init__(self) -> None:
        self.numbers = NumericTransport(self.shared_blocks)
        self.clients = SecureClients(self.scenario, self.shared_blocks, StateStore(self.folder, durable=False))
        self.codec = Codec(self.shared_blocks, self.scenario)

    @property
    def bytes_up(self) -> int:
        return self.up

    @property
    def bytes_down(self) -> int:
        return self.down

    def reachable(self) -> tuple[str, ...]:
        return self.numbers.reachable()

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name in sorted(instructions):
            sent = self.codec.write_instruction(instructions[name])
            self.down += content_size(sent)
            instruction = self.codec.read_instruction(message_type(instructions[name]), sent)
            if (failure := self.lost(name, instruction)) is not None:
                yield name, failure
                continue
            try:
                answer = self.forge(name, self.answer(name, instruction))
            except ValueError as error:
                yield name, Failure("raised", str(error))
                continue
            content = self.codec.write_answer(instruction, answer)
            self.up += content_size(content)
            self.received += pack(content).tobytes()
            yield name, self.codec.read_answer(instruction, content)

    def answer(self, name: str, instruction: Instruction) -> Answer:
        if isinstance(instruction, SecureStep):
            return self.clients.follow(name, instruction)
        ((_, answer),) = self.numbers.send({name: instruction}, None)
        assert not isinstance(answer, Failure)
        if isinstance(answer, Trained):
            self.learned[name, instruction.start.round] = answer.point
            answer = replace(answer, fisher=None)
        return self.clients.protect({name: instruction}, {name: answer})[name]


def make(tmp_path: Path, *overrides: str, count: int = 8) -> tuple[Scenario, SharedBlocks, SecureTransport]:
    scenario = numeric_scenario(*SECURE, *overrides, count=count)
    shared_blocks = resolve_shared_blocks(scenario)
    return scenario, shared_blocks, SecureTransport(scenario, shared_blocks, tmp_path / "clients")


def lose(*names: str, kind: type = Train, rounds: tuple[int, ...] = (2,)) -> Lost:
    """Lose clients when they are asked something of a kind in some rounds."""

    def lost(name: str, instruction: Instruction) -> Failure | None:
        is_lost = name in names and isinstance(instruction, kind) and instruction.start.round in rounds
        return Failure("died", "its cable was cut") if is_lost else None

    return lost


def run(federation: Federation) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    federation.run(records.append)
    return records


def points_by_hand(transport: SecureTransport, shared: np.ndarray, rounds: int, missing: Mapping[int, set[str]]):
    """Follow the shared blocks with plain sums of what clients learned, round by round."""
    names = transport.shared_blocks.clients
    points = [shared.astype(np.float32)]
    for round in range(1, rounds + 1):
        present = [name for name in names if name not in missing.get(round, set())]
        begin = points[-1].astype(np.float64)
        mean = sum(transport.learned[name, round].astype(np.float64) - begin for name in present) / len(present)
        points.append((begin + mean).astype(np.float32))
    return points


def test_the_sum_is_that_of_plain_numbers_to_the_fixed_point(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path)
    federation = Federation(scenario, shared_blocks, transport)
    begin = federation.state.shared.copy()
    records = run(federation)
    expected = points_by_hand(transport, begin, 4, {})[-1]
    # half a step for each of eight clients, by eight of them, in four rounds, and float32's own rounding
    step = 4.0 / ((2**31 - 1) // 8)
    np.testing.assert_allclose(federation.state.shared, expected, rtol=3e-7, atol=4 * 0.5 * step)
    assert all(not record.notes for record in records)


@pytest.mark.parametrize("kind", [SecureStep, Train], ids=["while keys are agreed on", "after that"])
def test_two_of_eight_are_lost_and_the_round_completes(tmp_path: Path, kind: type):
    scenario, shared_blocks, transport = make(tmp_path)
    transport.lost = lose("c-3", "c-6", kind=kind)
    federation = Federation(scenario, shared_blocks, transport)
    begin = federation.state.shared.copy()
    records = run(federation)
    assert {each.client for each in records[2].clients if each.failure} == {"c-3", "c-6"}
    expected = points_by_hand(transport, begin, 4, {2: {"c-3", "c-6"}})[-1]
    np.testing.assert_allclose(federation.state.shared, expected, rtol=3e-7, atol=1e-7)


def test_a_round_that_loses_too_many_is_left_out_and_the_run_goes_on(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path)
    transport.lost = lose("c-1", "c-3", "c-6")
    federation = Federation(scenario, shared_blocks, transport)
    kept: list[np.ndarray] = []
    records: list[RoundRecord] = []

    def watch(record: RoundRecord) -> None:
        records.append(record)
        kept.append(federation.state.shared.copy())

    result = federation.run(watch)
    np.testing.assert_array_equal(kept[2], kept[1])
    assert not np.array_equal(kept[3], kept[2])
    (note,) = records[2].notes
    assert note.startswith(
        "secure aggregation: too many clients were lost: 5 shares of the mask of c-0 are needed, and 0"
    )
    assert note.endswith("the numbers of 5 of 8 clients came, and nothing is merged in this round")
    assert (result.rounds, result.status) == (4, "finished")


def test_with_two_clients_left_nothing_is_merged(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path, "round.quorum=0.1", count=4)
    transport.lost = lose("c-0", "c-1", kind=SecureStep)
    records = run(Federation(scenario, shared_blocks, transport))
    (note,) = records[2].notes
    assert "of 4 clients 0 agreed on keys; at least three have to" in note
    assert not any(name == "c-2" and round == 2 for name, round in transport.learned)


def test_a_wrong_share_is_noticed_and_named(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path)

    def forge(name: str, answer: Answer) -> Answer:
        if name != "c-0" or not isinstance(answer, SecureParts) or answer.own:
            return answer
        return replace(
            answer, parts=tuple(f"{part[:40]}{'BAAA'[part[40] == 'B' :][0]}{part[41:]}" for part in answer.parts)
        )

    transport.forge = forge
    federation = Federation(scenario, shared_blocks, transport)
    begin = federation.state.shared.copy()
    records = run(federation)
    assert records[1].notes == ("secure aggregation: the shares that c-0 handed out are wrong",)
    expected = points_by_hand(transport, begin, 4, {})[-1]
    np.testing.assert_allclose(federation.state.shared, expected, rtol=3e-7, atol=1e-7)


def test_a_client_that_sends_no_shares_at_all_is_done_without(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path)

    def forge(name: str, answer: Answer) -> Answer:
        is_sharing = isinstance(answer, SecureParts) and answer.names and answer.own
        return replace(answer, parts=("zz",) * len(answer.parts)) if name == "c-2" and is_sharing else answer  # type: ignore

    transport.forge = forge
    records = run(Federation(scenario, shared_blocks, transport))
    assert "the answer of c-2 is left out: it has something else than 150 bytes" in records[1].notes[0]
    assert {name for name, _ in transport.learned} == {*shared_blocks.clients} - {"c-2"}


def test_a_client_whose_shares_nobody_can_read_is_named(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path, "rounds=1")

    def forge(name: str, answer: Answer) -> Answer:
        is_sharing = isinstance(answer, SecureParts) and answer.names and answer.own
        return replace(answer, parts=("A" * 200,) * len(answer.parts)) if name == "c-2" and is_sharing else answer  # type: ignore

    transport.forge = forge
    records = run(Federation(scenario, shared_blocks, transport))
    first, second = records[1].notes
    assert first == "secure aggregation: 7 clients cannot read the shares that c-2 sent them"
    assert "5 shares of the mask of c-2 are needed, and 0 came" in second


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("secure", [True, False])
def test_the_servers_log_holds_no_single_clients_numbers(tmp_path: Path, secure: bool):
    scenario, shared_blocks, transport = make(
        tmp_path, f"privacy.secure={str(secure).lower()}", "merge.weights=uniform"
    )
    federation = Federation(scenario, shared_blocks, transport, tmp_path / "run")
    begin = federation.state.shared.copy()
    run(federation)
    log = bytes(transport.received) + contents(tmp_path / "run")
    found = set()
    shared = points_by_hand(transport, begin, 4, {})
    for (name, round), point in transport.learned.items():
        difference = point - shared[round - 1]
        for numbers in (point, difference, difference.astype(np.float64)):
            for at in range(0, len(numbers) - 2, 7):  # three parameters in a row
                if numbers[at : at + 3].tobytes() in log:
                    found.add(name)
    assert found == (set() if secure else {*shared_blocks.clients})


def test_a_resumed_run_has_the_same_bits(tmp_path: Path):
    def states(folder: Path, stop: int | None) -> np.ndarray:
        scenario, shared_blocks, transport = make(folder)
        federation = Federation(scenario, shared_blocks, transport, folder / "run")

        def watch(record: RoundRecord) -> None:
            if record.round == stop:
                raise KeyboardInterrupt

        try:
            federation.run(watch)
        except KeyboardInterrupt:
            federation = Federation(scenario, shared_blocks, transport, folder / "run", latest(folder / "run"))
            federation.run()
        return federation.state.shared

    np.testing.assert_array_equal(states(tmp_path / "a", None), states(tmp_path / "b", 2))


def test_a_privacy_budget_has_the_same_sum_and_noise_as_without_masks(tmp_path: Path):
    ends = []
    for secure in (True, False):
        budget = (f"privacy.secure={str(secure).lower()}", "privacy.epsilon=8", "rounds=3")
        scenario, shared_blocks, transport = make(tmp_path / str(secure), *budget)
        federation = Federation(scenario, shared_blocks, transport)
        result = federation.run()
        assert result.privacy is not None
        ends.append((federation.state.shared, result.privacy.epsilon, federation.state.privacy))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert ends[0][1:] == ends[1][1:]  # the bounds, too, follow the same counts


def test_groups_at_zero_stay_at_zero_by_a_count(tmp_path: Path):
    penalty = ('penalty={ toward = "zero", weight = 0.1 }', "merge.weights=uniform")
    scenario, shared_blocks, transport = make(tmp_path, *penalty)
    shared = torch.from_numpy(transport.shared_blocks.initial.numpy())
    draws = np.random.default_rng(0)
    points = [(shared.numpy() + draws.normal(0, 0.1, len(shared))).astype(np.float32) for _ in range(8)]
    all_zero, few_zero = (shared_blocks.columns_of_groups((group,)).numpy() for group in (0, 2))
    for number, point in enumerate(points):
        point[all_zero | (few_zero & (number < 3))] = 0.0
    vectors = MaskedVectors.of(scenario, shared_blocks)
    masked, plain = SecureMerge(scenario, shared_blocks, shared.numpy(), None), RoundMerge(scenario, shared_blocks)
    for number, point in enumerate(points):
        trained = Trained(point, 128, 3, 0.0, 1.0, {})
        plain.add(f"c-{number}", trained)
        masked.add(f"c-{number}", replace(trained, masked=vectors.write(shared.numpy(), point, (), 8)))
    assert masked.finish(masked.masked, 8) == []
    target, expected = (merge.target(shared).point.numpy() for merge in (masked, plain))
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)
    assert (target[all_zero] == 0).all()
    assert (target[few_zero] != 0).all()


def test_parameters_beyond_the_reach_are_cut_and_said(tmp_path: Path):
    scenario, shared_blocks, transport = make(tmp_path, "privacy.reach=0.01", "rounds=1")
    federation = Federation(scenario, shared_blocks, transport)
    begin = federation.state.shared.copy()
    records = run(federation)
    assert "changed by more than privacy.reach = 0.01 and were cut" in records[1].notes[0]
    assert np.abs(federation.state.shared - begin).max() <= 0.01 * (1 + 1e-5)


# A client's own caution ----------------------------------------------------------------------------------------------


def agree(transport: SecureTransport, names: tuple[str, ...], session: str = "0" * 32) -> dict[str, SecureParts]:
    """Let clients make keys and share them."""
    start = Start("run", 1, np.zeros(0, np.float32))
    keys = {name: transport.clients.follow(name, SecureStep(start, "keys", session)).own for name in names}
    return {
        name: transport.clients.follow(
            name,
            SecureStep(start, "shares", session, *zip(*((k, v) for k, v in keys.items() if k != name), strict=True)),
        )
        for name in names
    }


def test_a_client_masks_once_and_reveals_for_one_list_of_clients(tmp_path: Path):
    _, shared_blocks, transport = make(tmp_path, count=5)
    names, session = shared_blocks.clients, "0" * 32
    shares = agree(transport, names)
    start = Start("run", 1, shared_blocks.initial.numpy())
    others = names[1:]
    train = Train(start, 0.0, 0.25, mask=MaskPlan(session, others, 5))
    trained = Trained(start.shared + np.float32(0.1), 128, 3, 0.0, 1.0, {})

    def mask(train: Train, trained: Trained) -> np.ndarray:
        answer = transport.clients.protect({"c-0": train}, {"c-0": trained})["c-0"]
        assert isinstance(answer, Trained)
        assert not answer.point.size
        assert answer.masked is not None
        return answer.masked

    first = mask(train, trained)
    np.testing.assert_array_equal(mask(train, trained), first)  # the message came again
    with pytest.raises(ValueError, match="c-0: it has masked other numbers in this session"):
        mask(train, replace(trained, point=start.shared))
    with pytest.raises(ValueError, match="c-0: it has masked other numbers in this session"):
        mask(replace(train, mask=MaskPlan(session, others[1:], 5)), trained)
    with pytest.raises(ValueError, match="with 3 at least of its 4 neighbours, not with 2"):
        mask(replace(train, mask=MaskPlan(session, others[2:], 5)), trained)
    with pytest.raises(ValueError, match="it sends nothing that is not masked"):
        mask(replace(train, mask=None), trained)
    with pytest.raises(ValueError, match="it has no keys of this session of round 1"):
        mask(replace(train, mask=MaskPlan("1" * 32, others, 5)), trained)

    sent = {name: dict(zip(each.names, each.parts, strict=True)) for name, each in shares.items()}

    def reveal(*answered: str) -> SecureParts:
        parts = tuple(sent[name]["c-0"] for name in others)
        step = SecureStep(start, "reveal", session, others, parts, answered)
        return transport.clients.follow("c-0", step)

    with pytest.raises(
        ValueError, match="numbers of 2 of its 4 neighbours, and for fewer than 3 it hands out no shares"
    ):
        reveal(*others[2:])
    revealed = reveal(*others[1:])
    assert reveal(*others[1:]).parts == revealed.parts
    with pytest.raises(ValueError, match="it has handed out shares in this session, for other lists of clients"):
        reveal(*others)


def test_a_client_shares_its_secrets_once_and_only_with_two_others(tmp_path: Path):
    _, shared_blocks, transport = make(tmp_path, count=5)
    agree(transport, shared_blocks.clients)
    start = Start("run", 1, np.zeros(0, np.float32))
    other = transport.clients.follow("c-1", SecureStep(start, "keys", "2" * 32)).own
    step = SecureStep(start, "shares", "0" * 32, shared_blocks.clients[1:], (other,) * 4)
    with pytest.raises(ValueError, match="it has shared its secrets in this session, with other keys"):
        transport.clients.follow("c-0", step)
    with pytest.raises(ValueError, match="at least three have to take part"):
        transport.clients.follow("c-1", SecureStep(start, "shares", "2" * 32, ("c-0",), (other,)))
    session = tmp_path / "clients" / "run" / "c-0" / "session.json"
    assert session.stat().st_mode & 0o777 == 0o600


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("merge.rule=median", 'merge.rule = "median" compares single clients, and the server learns a sum alone'),
        ("merge.weights=steps", 'merge.weights = "steps" multiplies what single clients sent: use "uniform"'),
        ("merge.mix=1", "merge.mix compares single clients"),
        ("proximity.mode=quadratic", 'proximity.mode = "quadratic" reads the Fisher diagonals of single clients'),
        ("round.mode=buffered", 'use round.mode = "sync"'),
        ("sites=[{ name = 'all', clients = ['*'] }]", "leave [[sites]] out"),
        ("wire.dtype=float16", 'masked numbers have 32 bits: use wire.dtype = "float32"'),
        ("policy.shared=[]", "nothing to add up where nothing is shared"),
        ("clients.c.count=2", "a sum of 2 tells each client what the others sent"),
        ("clients.c.attack=alie", "with privacy.secure nobody reads that"),
    ],
)
def test_what_needs_single_clients_is_refused(override: str, words: str):
    with pytest.raises(ScenarioError) as error:
        numeric_scenario(*SECURE, override, count=8)
    assert words in str(error.value)


def test_local_noise_is_not_needed_with_masks():
    with pytest.raises(ScenarioError, match='hides each client from a server that sees none: use "central"'):
        numeric_scenario(*SECURE, "privacy.epsilon=8", "privacy.noise=local")


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 40])
def test_explain_tells_the_bytes_that_are_measured(tmp_path: Path, count: int):
    totals = []
    for secure in (True, False):
        override = (f"privacy.secure={str(secure).lower()}", "merge.weights=uniform", "rounds=1", "evaluate.every=0")
        scenario, shared_blocks, transport = make(tmp_path / str(secure), *override, count=count)
        Federation(scenario, shared_blocks, transport).run()
        totals.append(transport.up + transport.down)
    names = shared_blocks.training_clients
    told = secure_bytes(min(count - 1, 32), float(np.mean([len(name) for name in names])))
    assert (totals[0] - totals[1]) / count == pytest.approx(told, rel=0.15)
    scenario, _, _ = make(tmp_path / "words", count=count)
    text = " ".join(explain_secure(scenario, shared_blocks))
    assert f"{told:,} bytes both ways" in text
    assert f"at least {threshold_of(min(count - 1, 32))} of the {min(count - 1, 32)} neighbours" in text
    assert not list(explain_secure(numeric_scenario(), shared_blocks))


def test_explain_tells_that_two_clients_are_too_few():
    scenario = numeric_scenario(*SECURE, "round.fraction=0.25", count=8)
    text = " ".join(explain_secure(scenario, resolve_shared_blocks(scenario)))
    assert "with fewer nothing is merged" in text
