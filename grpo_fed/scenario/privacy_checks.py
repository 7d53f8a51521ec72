"""Contradictions of differential privacy: what the server may not compute from single clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.language_checks import Contradiction
from grpo_fed.scenario.toml.lines import KeyPath

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

EPSILON: KeyPath = ("privacy", "epsilon")
SECURE: KeyPath = ("privacy", "secure")
METRICS: KeyPath = ("privacy", "metrics")
LEAST_CLIENTS = 3
"""With fewer, one client could tell from the sum what the other sent."""


def privacy_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """List what reads more of single clients than noise covers: a text and the keys that it concerns."""
    for text, key in _single_clients(scenario) if scenario.privacy.secure else ():
        yield f"with privacy.secure {text}", (key, SECURE)
    for text, key in _needed_metrics(scenario) if scenario.privacy.metrics == "withheld" else ():
        yield f'with privacy.metrics = "withheld" {text}', (key, METRICS)
    if scenario.privacy.epsilon is None:
        return
    for text, key in (*_unprotected_merges(scenario), *_unprotected_rounds(scenario)):
        yield f"with privacy.epsilon {text}", (key, EPSILON)
    if scenario.privacy.source == "system" and scenario.checkpoint.every > 1:
        text = (
            'privacy.source = "system" draws other noise for rounds that a resumed run makes again, which nobody'
            " counts: use checkpoint.every = 1, or 0"
        )
        yield text, (("checkpoint", "every"), ("privacy", "source"))


def _unprotected_merges(scenario: Scenario) -> Iterator[tuple[str, KeyPath]]:
    """List what has to be otherwise in a private merge and step, and the key."""
    merge, penalty = scenario.merge, scenario.penalty
    if not scenario.policy.shared:
        yield (
            "there is nothing to protect where nothing is shared: leave it out, or share a block",
            ("policy", "shared"),
        )
    if merge.rule != "mean":
        text = f'merge.rule = "{merge.rule}" compares single clients without noise'
        yield f'{text}: use merge.rule = "mean", as method = "fedavg" or "lg" do', ("merge", "rule")
    if merge.weights != "uniform":
        text = f'merge.weights = "{merge.weights}" depends on what clients did, and lets one move the mean further'
        yield f'{text}: use "uniform", or leave it out', ("merge", "weights")
    if merge.mix:
        yield "merge.mix compares single clients without noise: leave it out", ("merge", "mix")
    if merge.correct_drift:
        yield (
            "merge.correct_drift takes the noise for the other clients' steps: leave it out",
            ("merge", "correct_drift"),
        )
    if scenario.proximity.mode != "off":
        text = f'proximity.mode = "{scenario.proximity.mode}" goes by what clients measure on their own states'
        yield f'{text}: use "off"', ("proximity", "mode")
    weights = [penalty.weight if client.penalty is None else client.penalty for client in scenario.clients]
    if penalty.toward == "zero" and (any(weights) or penalty.l1 or penalty.outer):
        text = 'penalty.toward = "zero" sets groups to zero by a vote of clients without noise: use "shared"'
        yield text, ("penalty", "toward")


def _unprotected_rounds(scenario: Scenario) -> Iterator[tuple[str, KeyPath]]:
    """List what has to be otherwise in who takes part and for how long, and the key."""
    if scenario.round.mode != "sync":
        yield 'answers that come when they come are no sample: use round.mode = "sync"', ("round", "mode")
    if scenario.sites:
        yield "sites would each need noise of their own: leave [[sites]] out", ("sites",)
    if scenario.curriculum.by == "server" and any(client.curriculum is not None for client in scenario.clients):
        yield (
            'the server would steer levels by returns without noise: use curriculum.by = "client"',
            ("curriculum", "by"),
        )
    for key, is_set in (("target", scenario.stop.target is not None), ("patience", scenario.stop.patience > 0)):
        if is_set:
            yield "the end of the run would tell returns without noise: leave it out", ("stop", key)


def _single_clients(scenario: Scenario) -> Iterator[tuple[str, KeyPath]]:
    """List what needs the numbers of single clients, where the server learns a sum alone, and the key."""
    merge, clients = scenario.merge, sum(each.count for each in scenario.clients)
    dtype, mode, is_private = scenario.wire.dtype, scenario.proximity.mode, scenario.privacy.epsilon is not None
    rows: tuple[tuple[bool, str, KeyPath], ...] = (
        (
            not scenario.policy.shared,
            "there is nothing to add up where nothing is shared: leave it out, or share a block",
            ("policy", "shared"),
        ),
        (
            clients < LEAST_CLIENTS,
            f"a sum of {clients} tells each client what the others sent: have three clients or more",
            ("clients",),
        ),
        (
            merge.rule != "mean",
            f'merge.rule = "{merge.rule}" compares single clients, and the server learns a sum alone: use "mean"',
            ("merge", "rule"),
        ),
        (
            merge.weights != "uniform",
            f'merge.weights = "{merge.weights}" multiplies what single clients sent: use "uniform", or leave it out',
            ("merge", "weights"),
        ),
        (bool(merge.mix), "merge.mix compares single clients: leave it out", ("merge", "mix")),
        (
            mode == "quadratic",
            'proximity.mode = "quadratic" reads the Fisher diagonals of single clients: use "measured" or "off"',
            ("proximity", "mode"),
        ),
        (
            scenario.round.mode != "sync",
            'a sum is of clients that begin together: use round.mode = "sync"',
            ("round", "mode"),
        ),
        (bool(scenario.sites), "every site would learn its own clients' sum: leave [[sites]] out", ("sites",)),
        (
            dtype != "float32",
            f'masked numbers have 32 bits: use wire.dtype = "float32", not "{dtype}"',
            ("wire", "dtype"),
        ),
        (
            is_private and scenario.privacy.noise == "local",
            'privacy.noise = "local" hides each client from a server that sees none: use "central", which needs less',
            ("privacy", "noise"),
        ),
    )
    yield from ((text, key) for is_wrong, text, key in rows if is_wrong)


def _needed_metrics(scenario: Scenario) -> Iterator[tuple[str, KeyPath]]:
    """List what depends on numbers that clients report of themselves, and the key."""
    merge, stop = scenario.merge, scenario.stop
    compares = merge.rule == "persistence" and (merge.confirm == "returns" or bool(merge.rejoin))
    steers = scenario.curriculum.by == "server" and any(client.curriculum is not None for client in scenario.clients)
    rows: tuple[tuple[bool, str, KeyPath], ...] = (
        (stop.target is not None, "no return says when to stop: leave it out", ("stop", "target")),
        (stop.patience > 0, "no return says when to stop: leave it out", ("stop", "patience")),
        (
            compares,
            'clients would say what they scored alone: use merge.confirm = "evidence" and merge.rejoin = 0',
            ("merge", "confirm"),
        ),
        (
            merge.weights in ("episodes", "progress"),
            f'merge.weights = "{merge.weights}" goes by what clients report: use "steps" or "uniform"',
            ("merge", "weights"),
        ),
        (scenario.proximity.adaptive, "budgets would follow gains of returns: use false", ("proximity", "adaptive")),
        (steers, 'the server would steer levels by returns: use curriculum.by = "client"', ("curriculum", "by")),
        (bool(scenario.sites), "sites compare by returns: leave [[sites]] out", ("sites",)),
        (scenario.evaluate.twins, "twins would be compared by returns: use false", ("evaluate", "twins")),
    )
    yield from ((text, key) for is_wrong, text, key in rows if is_wrong)
