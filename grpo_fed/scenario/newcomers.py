"""Clients that join a running deployment although its scenario does not name them, and where none can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pydantic import ValidationError

from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.text import suggest_name

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

Refusal: TypeAlias = tuple[str, tuple[KeyPath, ...]]
"""A text, and the keys that it concerns."""
CURE = "leave newcomers.like out"
LIKE: KeyPath = ("newcomers", "like")


def takes_newcomers(scenario: Scenario) -> bool:
    """Whether clients that the scenario does not name may join."""
    return scenario.newcomers.like is not None


def with_newcomers(scenario: Scenario, names: Sequence[str]) -> Scenario:
    """Add clients with the task and the settings of the entry that newcomers are like, each by a name of its own.

    Names that the scenario has already are left out. ValueError for a name that no client may have.
    """
    known = {name for entry in scenario.clients for name in entry.names}
    like = next(entry for entry in scenario.clients if entry.name == scenario.newcomers.like)
    entries = [_entry(like, name) for name in names if name not in known]
    return scenario.model_copy(update={"clients": [*scenario.clients, *entries]}) if entries else scenario


def _entry(like: ClientSettings, name: str) -> ClientSettings:
    """Make the entry of a newcomer: arguments that are spread over several clients have their defaults."""
    own = {"name": name, "count": 1, "spread": {}}
    try:
        return ClientSettings.model_validate(like.model_dump() | own)
    except ValidationError:
        raise ValueError(f"a client cannot be called {name}") from None


def newcomer_contradictions(scenario: Scenario) -> Iterator[Refusal]:
    """List what contradicts the newcomers that a scenario takes: a text and the keys; nothing where it takes none."""
    like = scenario.newcomers.like
    if like is None:
        return
    entries = {entry.name: (number, entry) for number, entry in enumerate(scenario.clients)}
    if like not in entries:
        yield f"is the name of no entry of [[clients]]{suggest_name(like, entries)}", (LIKE,)
        return
    number, entry = entries[like]
    if not entry.trains:
        text = "takes no part in training, and a newcomer does; name another entry"
        yield text, (LIKE, ("clients", number, "trains"))
    if entry.attack != "none":
        yield "is a hostile client; name another entry", (LIKE, ("clients", number, "attack"))
    if entry.curriculum is not None and scenario.curriculum.by == "server":
        text = f"the server steers levels of the clients that a run begins with; {CURE}"
        yield text, (LIKE, ("curriculum", "by"), ("clients", number, "curriculum"))
    refused: tuple[tuple[KeyPath, bool, str], ...] = (
        (("policy", "shared"), not scenario.policy.shared, "nothing is shared that a newcomer could begin with"),
        (("merge", "rule"), scenario.merge.rule == "clusters", "newcomers would have no cluster"),
        (("sites",), bool(scenario.sites), "the state of each site is of the clients that it began with"),
        (
            ("round", "mode"),
            scenario.round.mode == "buffered",
            'with "buffered" the order of events is of the clients that the run began with',
        ),
        (
            ("privacy", "epsilon"),
            scenario.privacy.epsilon is not None,
            "the noise is for the clients that the run began with",
        ),
        (("privacy", "secure"), scenario.privacy.secure, "nobody joins while the server learns sums alone"),
        (("checkpoint", "every"), not scenario.checkpoint.every, "a run goes on from a checkpoint when somebody joins"),
    )
    for keys, is_so, why in refused:
        if is_so:
            yield f"{why}; {CURE}", (LIKE, keys)
