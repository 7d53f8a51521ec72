"""Explains in words what privacy a scenario asks for, and its price: the noise in the mean, before a run."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_fed.federation.private_merge import mechanism_of
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.formatting import format_count, list_names
from grpo_fed.scenario.scenario import Scenario

WITHOUT_NOISE = (
    "Returns and other metrics that clients report are not covered, nor is which clients answer: docs/privacy.md."
)
"""What epsilon does not cover."""
MOST_PRICE = 1.0
"""The price from which the noise is longer than what a client has learned."""


def explain_privacy(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain the mechanism, what it covers, and its price; nothing without a budget."""
    mechanism, privacy = mechanism_of(scenario, shared), scenario.privacy
    if mechanism is None:
        return
    groups, clients = format_count(len(mechanism.bounds), "group"), format_count(mechanism.clients, "client")
    moves = (
        ""
        if privacy.noise == "local" or not privacy.rate
        else (f"; bounds then follow the lengths below which {privacy.quantile:.0%} of the differences are")
    )
    lengths = sorted({*mechanism.bounds.tolist()})
    at_first = f"{lengths[0]:g}" if len(lengths) == 1 else f"{lengths[0]:g} to {lengths[-1]:g}"
    each = "Each of" if len(mechanism.bounds) > 1 else "The"
    yield f"{each} {groups} of a client's difference from the shared blocks is cut to a length of {at_first}{moves}."
    who = (
        "The server adds Gaussian noise to the sum" if privacy.noise == "central" else "Each client adds Gaussian noise"
    )
    until = f"lasts for {format_count(scenario.rounds, 'round')}"
    if privacy.multiplier is not None:
        until = "ends the run before the merge that would exceed it"
    yield (
        f"{who}, {mechanism.multiplier:.3g} times what one client can change; the budget of epsilon {privacy.epsilon:g}"
        f" with delta {mechanism.delta:g} {until}."
    )
    if scenario.round.fraction < 1:
        helps = "which helps only against those who do not know which clients did"
        if mechanism.is_local:
            helps = "which does not help against the server"
        yield f"A client takes part in a round with probability {scenario.round.fraction:g}, {helps}."
    bounds = mechanism.bounds.tolist()
    prices = {block: mechanism.price_of(bounds, block) for block in dict.fromkeys(mechanism.blocks)}
    of_blocks = list_names(f"{block} {price:.2g}" for block, price in prices.items())
    price = mechanism.price_of(bounds)
    together = f"; all together {price:.2g}" if len(prices) > 1 else ""
    yield (
        f"The price: with {clients} the noise in the mean is, by the length of a client's difference at its bound,"
        f" {of_blocks}{together}."
    )
    if price > MOST_PRICE:
        yield (
            "That is more than a client learns: expect no learning in common. Share fewer parameters (a private"
            " critic, the actor alone), have more clients or fewer rounds, or give a larger budget."
        )
    if privacy.source == "seed":
        yield 'Noise follows from the seed, for research; in a deployment use privacy.source = "system".'
    yield WITHOUT_NOISE if privacy.metrics == "all" else "Which clients answer is not covered: docs/privacy.md."
