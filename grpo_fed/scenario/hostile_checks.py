"""Contradictions of hostile clients, and of the mixing that tolerates them, with other settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.language_checks import Contradiction
from grpo_fed.scenario.settings import COLLUDING_ATTACKS

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

RULES_THAT_TELL_CLIENTS_APART = ("persistence", "huber", "clusters", "fisher")
"""Merge rules that go by how single clients differ, and so allow no mixing before them."""


def hostile_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """List what contradicts a client's attack, or mixing: a text and the keys that it concerns."""
    yield from _mixing_contradictions(scenario)
    for number, client in enumerate(scenario.clients):
        if client.attack in COLLUDING_ATTACKS and scenario.privacy.secure:
            text = "clients that collude need what all honest ones sent, and with privacy.secure nobody reads that"
            yield f'{text}; use an attack such as "sign-flip"', (("clients", number, "attack"), ("privacy", "secure"))
    if scenario.round.mode == "buffered":
        text = 'clients that collude need what all honest ones sent, and round.mode = "buffered" does not wait for them'
        cure = 'use round.mode = "sync", or an attack such as "sign-flip"'
        for number, client in enumerate(scenario.clients):
            if client.attack in COLLUDING_ATTACKS:
                yield f"{text}; {cure}", (("clients", number, "attack"), ("round", "mode"))


def _mixing_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    mix, rule, settings = scenario.merge.mix, scenario.merge.rule, scenario.round
    if not mix:
        return
    if rule in RULES_THAT_TELL_CLIENTS_APART:
        text = f'makes clients alike, whose differences merge.rule = "{rule}" needs; use "mean" or a robust rule'
        yield text, (("merge", "mix"), ("merge", "rule"))
    key = "buffer" if settings.mode == "buffered" else "fraction"
    part = settings.buffer if settings.mode == "buffered" else settings.fraction
    count = math.ceil(part * sum(client.count for client in scenario.clients) - 1e-9)
    if 2 * mix >= count:
        part_of = "" if part == 1 else f" with round.{key} = {part:g}"
        text = f"must be less than half of the clients of a round: at most {(count - 1) // 2} of {count}{part_of}"
        yield text, (("merge", "mix"), ("round", key))
