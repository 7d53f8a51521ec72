"""RunTotals: what a run has done so far, counted from its records."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_fed.runs.departures import Departure, note_departures
from grpo_fed.runs.records import RoundRecord, SiteRecord
from grpo_fed.runs.results import SiteResult
from grpo_fed.runs.sharing_verdicts import SharingVerdict


@dataclass
class RunTotals:
    """Counts what a run has done so far."""

    rounds: int = 0
    """The last round that was recorded."""
    seconds: float = 0.0
    """Seconds until the latest checkpoint."""
    bytes_up: int = 0
    """Bytes from clients to the server."""
    bytes_down: int = 0
    """Bytes from the server to clients."""
    episodes: dict[str, int] = field(default_factory=dict)
    """Finished training episodes of each client."""
    steps: dict[str, int] = field(default_factory=dict)
    """Environment steps that each client learned from."""
    best: dict[str, float] = field(default_factory=dict)
    """Each client's highest mean return of a round's training episodes."""
    first: dict[str, float] = field(default_factory=dict)
    """Each client's score before the first round."""
    last: dict[str, float] = field(default_factory=dict)
    """Each client's score after the latest round."""
    last_costs: dict[str, float] = field(default_factory=dict)
    """What the episodes of this evaluation cost each client, where costs have a limit."""
    adapted_first: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Before the first round, each client's scores after so many local updates, from 0."""
    adapted_last: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The same after the latest round in which clients were evaluated."""
    missing: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    """For each client that failed: round, kind of failure and reason, one for each time."""
    comparison_episodes: int = 0
    """Episodes that clients played to compare their own parameters with the shared ones."""
    departures: dict[str, dict[str, Departure]] = field(default_factory=dict)
    """With the merge rule `persistence`, when and why each client left the groups that it does not share now."""
    equal: dict[str, list[int]] = field(default_factory=dict)
    """The rounds in which clients could learn nothing, since every group of their completions was rewarded equally."""
    joined: dict[str, int] = field(default_factory=dict)
    """The rounds in which newcomers joined."""
    sharing: dict[str, SharingVerdict] = field(default_factory=dict)
    """What the clients' twins said latest."""
    sites: dict[str, SiteResult] = field(default_factory=dict)
    """What each site has left so far."""

    def add(self, record: RoundRecord) -> None:
        """Count a round."""
        self.rounds = record.round
        self.last = record.scores
        self.last_costs = {each.client: each.cost for each in record.clients if each.cost is not None}
        scores = record.scores
        curves = {each.client: (scores[each.client], *each.adapted) for each in record.clients if each.adapted}
        self.adapted_last = curves if scores else self.adapted_last
        if record.round == 0:
            self.first, self.adapted_first = self.last, curves
        for name in record.equal:
            self.equal.setdefault(name, []).append(record.round)
        for client in record.clients:
            name = client.client
            self.episodes[name] = self.episodes.get(name, 0) + client.episodes
            self.steps[name] = self.steps.get(name, 0) + client.steps
            if client.mean is not None:
                self.best[name] = max(client.mean, self.best.get(name, client.mean))
            self.comparison_episodes += int(client.comparison.get("episodes", 0))
            if verdict := SharingVerdict.of(client.metrics):
                self.sharing[name] = verdict
            if client.left or client.returned:
                note_departures(self.departures.setdefault(name, {}), record.round, client.left, client.returned)
        for site in record.sites:
            self.sites[site.site] = SiteResult(
                site.clients, site.departed, self._departures_of_site(site, record.round)
            )
            self.comparison_episodes += int(site.comparison.get("episodes", 0))

    def _departures_of_site(self, site: SiteRecord, round: int) -> dict[str, Departure]:
        """Update when and why a site left the groups that it does not share now."""
        departures = dict(self.sites[site.site].departures) if site.site in self.sites else {}
        note_departures(departures, round, site.left, site.returned)
        return departures
