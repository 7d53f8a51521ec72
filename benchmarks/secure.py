"""Measure what secure aggregation costs: processor time of a client and of the server in a round, by what they do.

    python -m benchmarks.secure

Every client makes keys, shares its secrets with its neighbours, masks its numbers, and hands out shares; the server
takes the masks off the sum, with all clients there and with one in ten lost after masking. Times are the medians of
five rounds in one thread, with the least and the most in brackets. What is sent between machines is not in them.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import time
from dataclasses import replace

import numpy as np

from grpo_fed.aggregation.secure.participant import Participant
from grpo_fed.aggregation.secure.recovery import Session, choose_neighbours

REPETITIONS = 5
SIZES = ((8, 9_155), (8, 1_000_000), (33, 9_155), (200, 9_155))
"""Clients, and shared parameters of each."""


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| clients | parameters | a client, ms | the server, ms | the server with a tenth lost, ms |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for clients, size in SIZES:
        rounds = [measure_round(clients, size) for _ in range(REPETITIONS)]
        print(f"| {clients:,} | {size:,} | {' | '.join(map(describe, zip(*rounds, strict=True)))} |", flush=True)


def measure_round(clients: int, size: int) -> tuple[float, float, float]:
    """Play a round; return the milliseconds of a client's mean, of the server, and of the server with clients lost."""
    session_id, names = secrets.token_bytes(16), [f"client-{number}" for number in range(clients)]
    words = np.arange(size, dtype=np.uint32)
    began = time.process_time()
    participants = {name: Participant.new(name, session_id) for name in names}
    keys = {name: each.public_keys for name, each in participants.items()}
    of_clients = time.process_time() - began

    session = Session(session_id, keys, choose_neighbours(names))
    known = {name: {peer: keys[peer] for peer in session.neighbours[name]} for name in names}
    began = time.process_time()
    sent = {name: each.share(known[name]) for name, each in participants.items()}
    masked = {name: each.mask(words, known[name]) for name, each in participants.items()}
    of_clients += time.process_time() - began

    session = replace(session, commitments={name: each.commitment for name, each in participants.items()})
    of_server = []
    for lost in (0, max(1, clients // 10)):
        answered = names[lost:]
        to = {name: {peer: sent[peer][name] for peer in session.neighbours[name]} for name in answered}
        began = time.process_time()
        revealed = {name: participants[name].reveal(known[name], to[name], answered) for name in answered}
        of_clients += 0.0 if lost else time.process_time() - began
        total = np.zeros(size, np.uint32)
        for name in answered:
            total += masked[name]
        began = time.process_time()
        plain, _ = session.unmask(total, answered, revealed)
        of_server.append(time.process_time() - began)
        assert (plain == words * np.uint32(len(answered))).all(), "the sum is exact"
    return 1000 * of_clients / clients, 1000 * of_server[0], 1000 * of_server[1]


def describe(milliseconds: tuple[float, ...]) -> str:
    """Write the median with the least and the most."""
    return f"{statistics.median(milliseconds):.3g} ({min(milliseconds):.3g} to {max(milliseconds):.3g})"


if __name__ == "__main__":
    main()
