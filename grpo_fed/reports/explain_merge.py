"""Explains in words how a scenario's clients are merged, and which of them may leave what from which round on."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from grpo_fed.aggregation.merge.conflicts import PAYS, UPSTREAM
from grpo_fed.aggregation.merge.persistence import CUT, MIN_ROUNDS, rounds_of_evidence
from grpo_fed.federation.comparison import MARGIN, TIMES
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.formatting import format_count, list_names
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings
from grpo_fed.scenario.sites import clients_of_sites
from grpo_fed.scenario.tables import is_import_path
from grpo_fed.scenario.toml.text import short_toml

WEIGHTS = {
    "steps": "A client's weight is its number of steps.",
    "episodes": "A client's weight is its number of finished episodes.",
    "uniform": "All clients have the same weight.",
    "progress": "A client has more weight while its return rises.",
}


def explain_merge(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain how the server merges, and who may leave what."""
    merge = scenario.merge
    if not shared.size:
        yield "There is nothing to merge: every client learns alone."
        return
    if merge.rule == "huber":
        yield from _explain_departures(merge)
    elif merge.rule == "persistence":
        yield from _explain_persistence(scenario, shared)
    elif is_import_path(merge.rule):
        kwargs = f" with {short_toml(merge.kwargs)}" if merge.kwargs else ""
        yield f"The shared blocks are merged by your own rule, {merge.rule}{kwargs}."
    else:
        yield {
            "mean": "The server takes the mean of the clients' parameters; no client departs from a group.",
            "fisher": "The server takes the mean of the clients' parameters, each weighted by its Fisher information.",
            "median": "The server takes the median of the clients, parameter by parameter.",
            "trimmed-mean": "The server takes the mean of the clients, parameter by parameter, without"
            f" {merge.fraction:.0%} of the weight at either end.",
            "krum": f"The server takes the mean of the {merge.keep} most similar clients, and tolerates up to"
            f" {merge.byzantine} hostile ones (Krum).",
            "multi-krum": f"The server takes the mean of all clients but the {merge.byzantine} least similar ones"
            " (multi-Krum).",
            "geometric-median": "The server takes the geometric median of the clients: the point with the least sum of"
            " distances from them.",
            "centred-clipping": "The server takes the mean of the clients' updates, each cut to"
            f" {merge.radius:g} times their median length.",
            "clusters": "The server learns clusters of clients and takes the mean of each, with up to"
            f" {merge.most} clusters for each block.",
        }[merge.rule]
        if merge.rule == "clusters":
            yield (
                "Clients leave a cluster together where their deviation from it repeats from round to round, rho >"
                f" {_fraction(PAYS)}, and opposes it; from round {MIN_ROUNDS} on. Clusters stay apart."
            )
    if merge.mix:
        yield (
            "Before that each client's parameters are replaced by the mean of those of its nearest clients, all but"
            f" {merge.mix}, which hides a hostile client's among the others'."
        )
    yield WEIGHTS[merge.weights].replace("steps", scenario.unit)


def explain_sites(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain which sites there are, and how each merges and steps where it has keys of its own."""
    members = clients_of_sites(scenario)
    if not members or not shared.size:
        return
    names = list_names([f"{name} with {format_count(len(clients), 'client')}" for name, clients in members.items()])
    yield f"{format_count(len(members), 'site')}: {names}. A site merges its clients, and the server merges the sites."
    yield (
        "A site has the weight of all of its clients, and may leave a group as a client may: its clients then share the"
        " site's own. Each of the two steps has KL budgets of its own."
    )
    if scenario.merge.rule == "persistence" and (scenario.merge.confirm == "returns" or scenario.merge.rejoin):
        yield (
            f"Where a site is to compare, its clients play {format_count(scenario.evaluate.episodes, 'episode')} each"
            " with its own blocks and with the server's."
        )
    for site in scenario.sites:
        own = {f"merge.{key}": value for key, value in site.merge.items()}
        own |= {f"proximity.{key}": value for key, value in site.proximity.items()}
        if own:
            yield f"At {site.name}: {', '.join(f'{key} = {short_toml(value)}' for key, value in own.items())}."


def _explain_departures(merge: MergeSettings) -> Iterator[str]:
    if merge.threshold is None:
        yield "The server takes the mean of the clients' parameters; no client departs from a group."
    elif merge.threshold == 0:
        yield "With threshold 0 every client departs from every group and keeps its own values."
    else:
        yield (
            f"A client departs from a group where it is further than {merge.threshold:g} per parameter from the others."
            " It keeps its own values there, and comes back once it is nearer."
        )
        yield "The shared blocks are " + (
            "the mean of the clients that stay."
            if merge.refit
            else "the solution of the group lasso, on which departed clients have a bounded pull."
        )
    yield from _explain_thresholds(merge)


def _explain_persistence(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain what the rule `persistence` compares, from which round on a client may leave, and which groups."""
    groups = shared.groups
    yield (
        "The server takes the mean of the clients' parameters in each group, over the clients that share it; an update"
        f" longer than {CUT:g} times the median is shortened to that."
    )
    yield (
        "It compares the directions of the updates, (theta - s) / ||theta - s||, in each group and over all rounds: rho"
        " is the part of a client's deviation from the others that repeats from round to round, 0 by chance and 1 if it"
        f" is always the same. A client leaves a group if rho > {_fraction(PAYS)} and its updates oppose the others'."
    )
    if groups.learned:
        yield (
            f"The groups of {list_names(sorted(groups.learned))} are learned: the units, rows or columns of weights, on"
            " which clients differ alike are compared as one group, and a client leaves all units of it."
        )
    first = {
        name: rounds_of_evidence(int(size))
        for name, size, block in zip(groups.names, groups.sizes.tolist(), groups.blocks, strict=True)
        if block not in groups.learned
    } | {
        block: rounds_of_evidence(int(groups.as_blocks.sizes[groups.as_blocks.names.index(block)]))
        for block in groups.learned
    }
    soonest = min(first.values())
    if scenario.rounds < soonest:
        yield f"No client can leave in {format_count(scenario.rounds, 'round')}: the evidence takes {soonest} rounds."
        return
    later = [f"{name} {rounds}" for name, rounds in first.items() if rounds > soonest]
    small = f"; smaller groups take more: {list_names(later)}" if later else ""
    yield (
        f"A client may leave from round {soonest} on, when it has taken part in {soonest} rounds{small}. With each"
        " departure the evidence about it begins again and takes twice as many rounds,"
        f" {2 * MIN_ROUNDS} after the first."
    )
    chains: dict[str, list[str]] = {}
    for block, chain in zip(groups.as_blocks.names, groups.as_blocks.chains, strict=True):
        chains.setdefault(chain, []).append(block)
    ordered = [list_names(chain) for chain in chains.values() if len(chain) > 1]
    if ordered:
        yield (
            f"These blocks follow each other: {'; '.join(ordered)}. Of those in which both hold, a client leaves only"
            f" the first whose rho is at least {_fraction(UPSTREAM)} of its greatest, since consequences come later."
        )
    else:
        yield "A client leaves all groups at once in which both hold."
    yield from _explain_playing(scenario)


def _explain_playing(scenario: Scenario) -> Iterator[str]:
    """Explain when clients play, or answer prompts, with their own parameters and with the shared ones."""
    merge = scenario.merge
    episodes = f"plays {merge.episodes} to {TIMES * merge.episodes} episodes"
    if scenario.unit == "completions":
        episodes = f"answers {merge.episodes} to {TIMES * merge.episodes} prompts"
    if merge.confirm == "returns":
        yield (
            f"Before it leaves it {episodes} with its own parameters and with the shared ones, and stays where"
            f" sharing loses less than {MARGIN:.0%} of what it has learned. That takes one more round."
        )
    if merge.rejoin:
        yield (
            f"{format_count(merge.rejoin, 'round')} after it has left, and so on, it {episodes} with each, and"
            " comes back where sharing is no worse."
        )
    else:
        yield "It does not come back."


def _fraction(value: float) -> str:
    """Write a simple fraction as such: `2/3`."""
    return str(Fraction(value).limit_denominator(10))


def _explain_thresholds(merge: MergeSettings) -> Iterator[str]:
    """Name the thresholds of single blocks."""
    for pattern, bound in merge.blocks.items():
        yield f"The threshold of {pattern} is {'inf' if bound is None else format(bound, 'g')}."
