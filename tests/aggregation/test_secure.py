"""Secure aggregation without a federation: integers, shares, masks, lost clients, and wrong shares."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fed.aggregation.secure.fixed_point import from_words, resolution, to_words
from grpo_fed.aggregation.secure.participant import Participant, threshold_of
from grpo_fed.aggregation.secure.primitives import (
    InvalidShareError,
    agree,
    decrypt,
    encrypt,
    public_of,
    stream,
)
from grpo_fed.aggregation.secure.recovery import MOST_NEIGHBOURS, SecureSumError, Session, choose_neighbours
from grpo_fed.aggregation.secure.shamir import PRIME, combine, interpolate_at, split

SIZE = 50
ID = bytes(range(16))

# Integers ------------------------------------------------------------------------------------------------------------


def test_a_sum_of_words_is_the_sum_of_the_rounded_numbers():
    # reach 1 and 3 clients: 2^31 - 1 over 3 is 715827882 steps to 1
    step = 1 / 715_827_882
    assert resolution(1.0, 3) == step
    words = [to_words(np.array([value]), 1.0, 3)[0] for value in (0.5, -1.0, 0.25)]
    assert [int(each[0]) for each in words] == [357_913_941, 2**32 - 715_827_882, 178_956_970]
    total = words[0] + words[1] + words[2]
    assert from_words(total, 1.0, 3)[0] == (357_913_941 - 715_827_882 + 178_956_970) * step


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_sums_are_exact_to_half_a_step_for_each_client(clients: int, seed: int, reach: float):
    values = np.random.default_rng(seed).uniform(-reach, reach, (clients, 5))
    total = np.zeros(5, np.uint32)
    for each in values:
        words, cut = to_words(each, reach, clients)
        assert cut == 0
        total += words
    error = np.abs(from_words(total, reach, clients) - values.sum(0))
    assert error.max() <= 0.5 * clients * resolution(reach, clients) * (1 + 1e-6)


def test_numbers_beyond_the_reach_are_cut_and_counted_and_others_refused():
    words, cut = to_words(np.array([2.0, -9.0, 0.5]), 1.0, 2)
    np.testing.assert_allclose(from_words(words, 1.0, 2), [1.0, -1.0, 0.5], atol=1e-9)
    assert cut == 2
    with pytest.raises(ValueError, match="not finite"):
        to_words(np.array([np.nan]), 1.0, 2)


# Shares --------------------------------------------------------------------------------------------------------------


def test_a_polynomial_by_hand_is_interpolated():
    # 7 + 3 x + 2 x^2 at 1, 2, 3 and 5
    shares = {1: 12, 2: 21, 3: 34}
    assert interpolate_at(shares, 0) == 7
    assert interpolate_at(shares, 5) == 72


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_any_shares_that_are_enough_give_the_secret_and_fewer_give_another(
    secret: bytes, threshold: int, more: int, draw: object
):
    values = split(secret, threshold, threshold + more)
    places = list(range(1, threshold + more + 1))
    draw.shuffle(places)  # type: ignore[attr-defined]
    assert combine({at: values[at - 1] for at in places[:threshold]}) == secret
    if threshold > 1:
        assert combine({at: values[at - 1] for at in places[: threshold - 1]}) != secret
        wrong = {at: values[at - 1] for at in places[:threshold]}
        wrong[places[0]] = (wrong[places[0]] + 1) % PRIME
        assert combine(wrong) != secret


# Primitives ----------------------------------------------------------------------------------------------------------


def test_two_clients_agree_on_the_key_of_rfc_5869_over_x25519():
    one, other = bytes([1] * 32), bytes([2] * 32)
    ours = agree(one, public_of(other), ID, "x")
    assert ours == agree(other, public_of(one), ID, "x")
    assert ours != agree(one, public_of(other), ID, "y")
    agreed = X25519PrivateKey.from_private_bytes(one).exchange(X25519PublicKey.from_public_bytes(public_of(other)))
    extracted = hmac.digest(ID, agreed, hashlib.sha256)  # HKDF, written out
    expected = hmac.digest(extracted, b"grpo_fed secure aggregation 1: x" + b"\x01", hashlib.sha256)
    assert ours == expected


def test_the_stream_is_chacha20s():
    # RFC 7539, A.1, test vector 1: key, nonce and counter zero; the first words of the block, little-endian
    assert stream(bytes(32), 3).tolist() == [0xADE0B876, 0x903DF1A0, 0xE56A5D40]
    assert stream(bytes(32), 40)[:3].tolist() == stream(bytes(32), 3).tolist()


def test_a_message_that_was_changed_is_noticed():
    message = encrypt(bytes(32), b"share", ID)
    assert decrypt(bytes(32), message, ID) == b"share"
    for changed in (message[:-1] + bytes([message[-1] ^ 1]), b"", message + b"x"):
        with pytest.raises(InvalidShareError):
            decrypt(bytes(32), changed, ID)
    with pytest.raises(InvalidShareError):
        decrypt(bytes(32), message, bytes(16))


# A session -----------------------------------------------------------------------------------------------------------


class Clients:
    """Clients that have agreed on keys and shared their secrets."""

    def __init__(self, count: int, silent: tuple[str, ...] = ()) -> None:
        """silent: clients that send no shares."""
        names = [f"c-{number:02d}" for number in range(count)]
        self.all = {name: Participant.new(name, ID) for name in names}
        keys = {name: each.public_keys for name, each in self.all.items()}
        self.session = Session(ID, keys, choose_neighbours(names))
        sent = {name: self.all[name].share(self.keys_of(name)) for name in names if name not in silent}
        self.session = replace(self.session, commitments={name: self.all[name].commitment for name in sent})
        self.sent_to = {name: {peer: sent[peer][name] for peer in self.session.peers_of(name)} for name in names}
        draws = np.random.default_rng(5)
        self.words = {name: draws.integers(0, 2**32, SIZE, np.uint32) for name in names}

    def keys_of(self, name: str) -> dict[str, bytes]:
        return {peer: self.session.keys[peer] for peer in self.session.neighbours[name]}

    def masked(self, name: str) -> np.ndarray:
        keys = {peer: self.session.keys[peer] for peer in self.session.peers_of(name)}
        return self.all[name].mask(self.words[name], keys)

    def total(self, names: list[str]) -> np.ndarray:
        total = np.zeros(SIZE, np.uint32)
        for name in names:
            total += self.masked(name)
        return total

    def revealed(self, names: list[str]) -> dict[str, dict[str, bytes]]:
        return {name: self.all[name].reveal(self.keys_of(name), self.sent_to[name], names) for name in names}

    def plain(self, names: list[str]) -> np.ndarray:
        total = np.zeros(SIZE, np.uint32)
        for name in names:
            total += self.words[name]
        return total


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_sum_of_eight_of_which_two_are_lost_after_masking_is_exact(lost: int):
    clients = Clients(8)
    answered = sorted(clients.all)[lost:]
    plain, wrong = clients.session.unmask(clients.total(answered), answered, clients.revealed(answered))
    np.testing.assert_array_equal(plain, clients.plain(answered))
    assert wrong == ()


def test_three_lost_of_eight_are_too_many_and_are_counted():
    clients = Clients(8)
    answered = sorted(clients.all)[3:]
    with pytest.raises(SecureSumError, match="5 shares of the mask of c-03 are needed, and 4 came"):
        clients.session.unmask(clients.total(answered), answered, clients.revealed(answered))


def test_clients_that_sent_no_shares_are_in_no_mask():
    clients = Clients(8, silent=("c-01", "c-02"))
    answered = [name for name in sorted(clients.all) if name not in ("c-01", "c-02")]
    plain, _ = clients.session.unmask(clients.total(answered), answered, clients.revealed(answered))
    np.testing.assert_array_equal(plain, clients.plain(answered))


def test_each_of_many_clients_has_few_neighbours():
    names = [f"c-{number:02d}" for number in range(80)]
    neighbours = choose_neighbours(names)
    assert {len({*each}) for each in neighbours.values()} == {MOST_NEIGHBOURS}
    assert all(name in neighbours[peer] and name != peer for name, peers in neighbours.items() for peer in peers)
    assert neighbours != choose_neighbours(names)
    clients = Clients(50)
    answered = [name for at, name in enumerate(sorted(clients.all)) if at % 9]
    plain, _ = clients.session.unmask(clients.total(answered), answered, clients.revealed(answered))
    np.testing.assert_array_equal(plain, clients.plain(answered))


def test_a_wrong_share_is_noticed_and_whose_it_is():
    clients = Clients(8)
    answered = sorted(clients.all)
    revealed = clients.revealed(answered)
    share = revealed["c-01"]["c-04"]
    revealed["c-01"]["c-04"] = share[:-1] + bytes([share[-1] ^ 1])
    plain, wrong = clients.session.unmask(clients.total(answered), answered, revealed)
    np.testing.assert_array_equal(plain, clients.plain(answered))
    assert wrong == ("c-01",)
    for holder in ("c-02", "c-03", "c-05", "c-06"):  # so many that those left are too few
        share = revealed[holder]["c-04"]
        revealed[holder]["c-04"] = share[:40] + bytes([share[40] ^ 4]) + share[41:]
    with pytest.raises(SecureSumError, match="shares of the mask of c-04 are wrong, and those left are too few"):
        clients.session.unmask(clients.total(answered), answered, revealed)


def test_wrong_shares_of_the_key_of_a_lost_client_are_noticed():
    clients = Clients(5)
    answered = sorted(clients.all)[1:]
    revealed = clients.revealed(answered)
    for at, holder in ((67, "c-01"), (40, "c-02")):
        share = revealed[holder]["c-00"]
        revealed[holder]["c-00"] = share[:at] + bytes([share[at] ^ 1]) + share[at + 1 :]
        if holder == "c-01":
            plain, wrong = clients.session.unmask(clients.total(answered), answered, revealed)
            np.testing.assert_array_equal(plain, clients.plain(answered))
            assert wrong == ("c-01",)
    with pytest.raises(SecureSumError, match="shares of the masking key of c-00 are wrong, and those left are too few"):
        clients.session.unmask(clients.total(answered), answered, revealed)


def test_masked_numbers_look_random_and_hide_behind_either_mask():
    clients = Clients(3)
    clients.words["c-00"] = np.zeros(SIZE, np.uint32)
    masked = clients.masked("c-00")
    assert not np.isin(masked, 0).any()
    own = stream(clients.all["c-00"].own_secret, SIZE)
    assert not (masked == own).any()
    # with all shares of its own secret, and none of a key, the masks of pairs stay
    revealed = clients.revealed(sorted(clients.all))
    with pytest.raises(SecureSumError):
        clients.session.unmask(masked, ["c-00"], {"c-01": {"c-00": revealed["c-01"]["c-00"]}})


def test_with_fewer_than_three_clients_nobody_hides():
    assert [threshold_of(neighbours) for neighbours in (2, 3, 4, 7, 32)] == [2, 3, 3, 5, 22]
    with pytest.raises(ValueError, match="at least three have to take part"):
        threshold_of(1)
    participant = Participant.new("a", ID)
    with pytest.raises(ValueError, match="at least three have to take part"):
        participant.share({"b": participant.public_keys})


def test_shares_that_were_changed_on_their_way_are_not_handed_out():
    clients = Clients(8)
    answered = sorted(clients.all)
    for holder in answered[:2]:
        message = clients.sent_to[holder]["c-07"]
        clients.sent_to[holder]["c-07"] = bytes([message[0] ^ 1]) + message[1:]
    revealed = clients.revealed(answered)
    assert [name for name, each in revealed.items() if "c-07" not in each] == ["c-00", "c-01", "c-07"]
    plain, _ = clients.session.unmask(clients.total(answered), answered, revealed)  # five shares of seven are enough
    np.testing.assert_array_equal(plain, clients.plain(answered))
