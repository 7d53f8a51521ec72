"""A tree of servers: every site merges its clients, and the server merges the sites as if each were a client.

In a round a site's clients begin with the site's shared blocks s_i. The site merges their answers by its own rule and
goes as far as its own KL budgets allow: that is its point p_i, with the weight of all of its clients. The server merges
the points, and its own budgets limit how far its shared blocks s go. Then

    s_i = s      in the groups that the site shares,
    s_i = p_i    in those that it has left, as a client keeps its own parameters there.

A weighted mean of weighted means is the mean of all, so with `mean` and without budgets the tree does what a server
without sites does. All KL is measured by clients: at first from s_i to p_i by those of one site, then from s_i towards
what the server makes of it by all.

A site plays as a client does before it leaves a group or comes back (`merge.confirm`, `merge.rejoin`): its clients are
evaluated with the site's own blocks and with the server's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge.persistence import join_findings
from grpo_fed.aggregation.proximity import StepFractions, interpolate
from grpo_fed.aggregation.proximity.records import AcceptedStep
from grpo_fed.federation.comparison import decide_sharing
from grpo_fed.federation.messages import EvaluationSummary, SharingComparison, Start, Trained
from grpo_fed.federation.round_merge import MergeTarget, RoundMerge
from grpo_fed.federation.server import Aggregation, MeasureCandidates, Merge, Server
from grpo_fed.federation.server_state import SavedServerState, ServerState
from grpo_fed.federation.server_step import Move, ServerStep, choose_step
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import clients_of_sites, scenario_of_site

SITE, OWN = "site:", "own:"
"""In a checkpoint, the prefixes of the arrays of a site's server, and of a site's own point."""

PlayStarts: TypeAlias = Callable[[Mapping[str, Start]], Mapping[str, EvaluationSummary]]
"""Evaluates clients, each with the blocks of its start; returns the summaries of those that answered."""


@dataclass(frozen=True)
class SavedSite:
    """Holds the part of a site's state that a checkpoint has as JSON."""

    server: SavedServerState
    lowest: float


@dataclass(frozen=True)
class SavedSites:
    """Holds that part for all sites."""

    sites: dict[str, SavedSite]


@dataclass(eq=False)
class Site:
    """A site between two rounds."""

    server: Server
    """Merges the site's clients; its state has the blocks s_i that they begin with."""
    own: np.ndarray
    """[S] float32: the site's own point p_i of the last round in which it merged."""
    lowest: float = math.nan
    """The lowest mean return of a round's training, over its clients; NaN before the first."""
    step: AcceptedStep | None = None
    """Its step in the latest round; None if it had none."""
    comparison: SharingComparison | None = None
    """What its clients saw in the latest round, if it was asked to play."""

    @property
    def clients(self) -> tuple[str, ...]:
        """The names of its clients, in the scenario's order."""
        return self.server.shared_blocks.clients


@final
@dataclass(eq=False)
class SitesMerge:
    """Collects the answers of a round, each for its client's site."""

    parts: Mapping[str, RoundMerge]
    """The merge of every site."""
    site_of: Mapping[str, str]
    """Every client's site."""
    low: set[str] = field(default_factory=set)
    """The clients that have lost most of what they had learned."""
    returns: dict[str, float] = field(default_factory=dict)
    """The clients' mean returns of training."""
    work: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The clients' steps and episodes."""

    def add(self, client: str, trained: Trained, times: float = 1.0) -> None:
        """Add a client's answer, as `RoundMerge.add` does."""
        self.parts[self.site_of[client]].add(client, trained, times)
        self.work[client] = trained.steps, trained.episodes
        if trained.low:
            self.low.add(client)
        if TRAINING_RETURN in trained.metrics:
            self.returns[client] = trained.metrics[TRAINING_RETURN]

    @property
    def weights(self) -> Mapping[str, float]:
        """Each client's weight, in the order of their names."""
        weights = {client: weight for part in self.parts.values() for client, weight in part.weights.items()}
        return {client: weights[client] for client in sorted(weights)}


@final
class SiteTree:
    """The server of a federation with sites, in place of `Server`."""

    def __init__(self, scenario: Scenario, shared_blocks: SharedBlocks, after: Checkpoint | None = None) -> None:
        """Begin with the scenario's initial shared blocks, or with those of a checkpoint.

        ValueError for a merge rule or KL budgets that do not fit the shared blocks, or a checkpoint that does not.
        """
        members, held_out = clients_of_sites(scenario), {*shared_blocks.held_out}
        silent = tuple(name for name, clients in members.items() if held_out.issuperset(clients))
        saved = {} if after is None else after.part("sites", SavedSites).sites
        if after is not None and [*saved] != [*members]:
            text = f"its sites are {', '.join(saved)}, and those of the scenario {', '.join(members)}"
            raise ValueError(f"{after.folder}: {text}")
        self.shared_blocks = shared_blocks
        self.top = Server(scenario, replace(shared_blocks, clients=tuple(members), held_out=silent), after)
        """Merges the sites, as its clients."""
        self.site_of = {client: name for name, clients in members.items() for client in clients}
        self.sites: dict[str, Site] = {}
        for settings in scenario.sites:
            name, clients = settings.name, members[settings.name]
            blocks = replace(
                shared_blocks, clients=clients, held_out=tuple(each for each in clients if each in held_out)
            )
            own_scenario = scenario_of_site(scenario, settings)
            if after is None:
                site = Site(Server(own_scenario, blocks), self.top.state.shared)
                site.server.state.name = self.top.state.name
                site.server.state.shared = self.top.state.shared
            else:
                server = Server(own_scenario, blocks, after, saved[name].server, f"{SITE}{name}:")
                site = Site(server, _own_point(after, name, shared_blocks), saved[name].lowest)
            self.sites[name] = site

    # What the loop asks of a server ----------------------------------------------------------------------------------

    @property
    def state(self) -> ServerState:
        """The state of the server above the sites."""
        return self.top.state

    @property
    def privacy(self) -> PrivacyCost | None:
        """What was spent of the privacy budget: none, since sites have no privacy."""
        return self.top.privacy

    def state_of(self, client: str) -> ServerState:
        """Return the state of a client's site, by which the client begins."""
        return self.sites[self.site_of[client]].server.state

    @property
    def asked(self) -> Mapping[str, tuple[int, ...]]:
        """The groups in which clients are to compare their own parameters with their site's."""
        return {client: groups for site in self.sites.values() for client, groups in site.server.asked.items()}

    @property
    def curricula(self) -> Mapping[str, tuple[float, ...]]:
        """The state of the curriculum of each client that the server steers, whatever its site."""
        return self.top.curricula

    def steer(self, replies: Mapping[str, Trained]) -> None:
        """Move the levels of the clients that the server steers, by their returns in a round."""
        self.top.steer(replies)

    def begin_round(self, play: PlayStarts) -> None:
        """Let the sites that are to compare their own blocks with the server's play, and begin with what is better."""
        evidence, state = self.state.evidence, self.state
        asked = {} if evidence is None else dict(evidence.asked)
        points = {
            own: {name: self._point(name, groups, own) for name, groups in asked.items()} for own in (True, False)
        }
        seen = {own: self._play(of_sites, play) for own, of_sites in points.items()}
        for name, site in self.sites.items():
            site.comparison = None
            if name in asked:
                has_left = bool({*state.departed.get(name, ())} & {*asked[name]})
                both = [client for client in site.clients if client in seen[True] and client in seen[False]]
                pairs = [(seen[True][client], seen[False][client]) for client in both]
                site.comparison = compare_summaries(pairs, site.lowest, has_left)
            if site.comparison is not None:
                site.server.state.shared = points[not site.comparison.shares][name]

    def begin_merge(self) -> SitesMerge:
        """Start a merge that answers are added to as they arrive."""
        return SitesMerge({name: site.server.begin_open_merge() for name, site in self.sites.items()}, self.site_of)

    def observe_last_step(self, replies: Mapping[str, Trained], merge: Merge) -> dict[str, float]:
        """Adapt the budgets of all servers if the scenario says so; return the KL measured afterwards: none with sites.

        Only a predicted step is measured afterwards, and sites predict none.
        """
        assert isinstance(merge, SitesMerge), "a tree merges sites"
        for name, site in self.sites.items():
            of_site = {client: reply for client, reply in replies.items() if self.site_of[client] == name}
            site.server.observe_last_step(of_site, merge.parts[name])
        return self.top.observe_last_step(replies, merge)

    def aggregate(self, merge: Merge, measure: MeasureCandidates, length: float = 1.0) -> Aggregation:
        """Let every site merge its clients, then merge the sites.

        length: the part of the way to the merge of the sites at which the target is.
        """
        assert isinstance(merge, SitesMerge), "a tree merges sites"
        state, shared = self.state, torch.from_numpy(self.state.shared)
        for name, site in self.sites.items():
            if not merge.parts[name].weights:
                site.server.skip_merge()
                site.step = None
        parts = {name: self._merge_site(name, merge, measure) for name in self.sites if merge.parts[name].weights}
        above = self.top.begin_open_merge()
        for name in sorted(parts):
            above.add_with_weight(name, self._answer(name, merge), sum(merge.parts[name].weights.values()))
        target = self.top.decide(above.target(shared).shortened(state.shared_of, shared, length))
        step = self._choose_step(target, merge.weights, measure)
        blocks = list(self.shared_blocks.slices.values())
        state.shared = interpolate(shared, target.point, blocks, step.accepted.alphas).numpy()
        state.last_step = step.accepted
        self._hand_down()
        notes = (f"site {name}: {note}" for name, part in parts.items() for note in part.notes)
        findings = join_findings(part.findings for part in parts.values())
        return Aggregation(step, findings, (*notes, *target.notes, *step.notes), target.findings)

    def skip_merge(self) -> None:
        """Leave all shared blocks as they are, since too few clients answered."""
        self.top.skip_merge()
        for site in self.sites.values():
            site.server.skip_merge()
            site.step = None
        self._hand_down()

    # Records and checkpoints -----------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Make the parts of a checkpoint that are JSON."""
        sites = {name: SavedSite(site.server.state.to_json(), site.lowest) for name, site in self.sites.items()}
        return {"server": self.state.to_json(), "sites": SavedSites(sites)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Name the arrays of a checkpoint."""
        arrays = self.state.arrays(self.shared_blocks)
        for name, site in self.sites.items():
            own = site.server.state.arrays(self.shared_blocks)
            arrays |= {f"{SITE}{name}:{key}": array for key, array in own.items()}
            arrays[f"{OWN}{name}"] = site.own
        return arrays

    # Steps -----------------------------------------------------------------------------------------------------------

    def _point(self, name: str, groups: tuple[int, ...], own: bool) -> np.ndarray:
        """Make a site's blocks [S]: its own in what it has left, and in these groups its own or the server's."""
        left = {*self.state.departed.get(name, ())}
        chosen = sorted(left | {*groups} if own else left - {*groups})
        columns = self.shared_blocks.columns_of_groups(chosen).numpy()
        return np.where(columns, self.sites[name].own, self.state.shared)

    def _play(self, points: Mapping[str, np.ndarray], play: PlayStarts) -> Mapping[str, EvaluationSummary]:
        """Evaluate the clients of sites with these blocks [S]."""
        starts = {
            client: replace(self.state_of(client).latest(client), shared=point)
            for name, point in points.items()
            for client in self.sites[name].server.shared_blocks.training_clients
        }
        return play(starts) if starts else {}

    def _merge_site(self, name: str, merge: SitesMerge, measure: MeasureCandidates) -> Aggregation:
        """Let a site merge its clients; its point is then `own`, and its clients' blocks are still those before."""
        site = self.sites[name]
        before = site.server.state.shared
        part = site.server.aggregate(merge.parts[name], measure)
        site.own, site.server.state.shared, site.step = site.server.state.shared, before, part.step.accepted
        returns = [merge.returns[client] for client in site.clients if client in merge.returns]
        if returns:
            site.lowest = float(np.fmin(site.lowest, np.mean(returns)))
        return part

    def _answer(self, name: str, merge: SitesMerge) -> Trained:
        """Make the answer with which a site takes part in the merge of the sites."""
        site, weights = self.sites[name], merge.parts[name].weights
        work = [merge.work[client] for client in weights]
        low = sum(weight for client, weight in weights.items() if client in merge.low)
        return Trained(
            point=site.own,
            steps=sum(steps for steps, _ in work),
            episodes=sum(episodes for _, episodes in work),
            gain=0.0,
            spread=0.0,
            metrics={},
            low=2 * low > sum(weights.values()),
            comparison=site.comparison,
        )

    def _choose_step(self, target: MergeTarget, weights: Mapping[str, float], measure: MeasureCandidates) -> ServerStep:
        """Choose how far the server goes: the clients of every site measure it, where the site follows."""
        begins = {name: site.server.state.shared for name, site in self.sites.items()}
        ends = {
            name: np.where(self._columns_left(name).numpy(), begin, target.point.numpy())
            for name, begin in begins.items()
        }
        moves = [
            Move(torch.from_numpy(begin), torch.from_numpy(ends[name]), target.weights[name])
            for name, begin in begins.items()
            if name in target.weights
        ]

        def measure_clients(
            clients: Sequence[str], fractions: Sequence[StepFractions]
        ) -> Mapping[str, Sequence[float]]:
            return measure({client: ends[self.site_of[client]] for client in clients}, fractions)

        settings, budgets = self.top.scenario.proximity, self.state.budgets
        by_client = replace(target, weights=weights)
        return choose_step(settings, budgets, self.shared_blocks, moves, by_client, measure_clients)

    def _columns_left(self, name: str) -> Tensor:
        """[S] bool: the parameters of the groups that a site has left."""
        return self.shared_blocks.columns_of_groups(self.state.departed.get(name, ()))

    def _hand_down(self) -> None:
        """Let the sites begin the next round with the server's blocks, but in groups that they have left."""
        for name, site in self.sites.items():
            left = self._columns_left(name)
            begins = np.where(left.numpy(), site.own, self.state.shared) if bool(left.any()) else self.state.shared
            site.server.state.shared = begins


def compare_summaries(
    pairs: list[tuple[EvaluationSummary, EvaluationSummary]], lowest: float, has_left: bool
) -> SharingComparison | None:
    """Compare a site's own blocks with the server's by the evaluations of its clients; None without any.

    Every client counts as much. The standard errors are those of independent episodes; both are the same episodes, so
    that of the difference is at most this in all likelihood, and the decision errs towards no change.

    pairs: for each client, with the site's own blocks and with the server's. lowest, has_left: as for `decide_sharing`.
    """
    if not pairs:
        return None
    means = [float(np.mean([pair[place].mean for pair in pairs])) for place in (0, 1)]
    variances = [sum(pair[place].std ** 2 / pair[place].episodes for pair in pairs) for place in (0, 1)]
    errors = math.sqrt(variances[0]) / len(pairs), math.sqrt(sum(variances)) / len(pairs)
    episodes = sum(each.episodes for pair in pairs for each in pair)
    return decide_sharing((means[0], means[1]), errors, lowest, has_left, episodes)


def _own_point(after: Checkpoint, name: str, shared_blocks: SharedBlocks) -> np.ndarray:
    """Read a site's own point [S] from a checkpoint; ValueError if it does not fit."""
    array = (after.shared or {}).get(f"{OWN}{name}")
    if array is None or array.dtype != np.float32 or array.shape != (shared_blocks.size,):
        raise ValueError(f"{after.folder}: its site {name} does not fit the scenario")
    if not np.isfinite(array).all():
        raise ValueError(f"{after.folder}: the point of its site {name} is not finite")
    return array


def make_server(scenario: Scenario, shared_blocks: SharedBlocks, after: Checkpoint | None = None) -> Server | SiteTree:
    """Make the server of a federation, with a tree of servers if it has sites."""
    make = SiteTree if scenario.sites else Server
    return make(scenario, shared_blocks, after)
