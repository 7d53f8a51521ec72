"""A small run of carts at sites on the local engine: the site that is wired backwards leaves the actor, nobody else."""

from __future__ import annotations

from grpo_fed.engines.start import run
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

SMALL = ["rounds=5", "steps=1024", "evaluate.episodes=2", "seed=700", 'device="cpu"']


def test_the_site_that_is_wired_backwards_leaves_the_actor_and_nobody_else_anything():
    records: list[RoundRecord] = []
    result = run(Scenario.load(find_scenario("sites"), SMALL), watch=records.append, workers=0)
    left = {name: site.personal_groups for name, site in result.sites.items()}
    assert left == {"north": (), "east": (), "south": ("actor",)}
    assert not any(client.personal_groups for client in result.clients.values())
    assert result.sites["south"].departures["actor"].round == 5  # in conflict after round 4, then its clients played
    (comparison,) = [site.comparison for site in records[-1].sites if site.comparison]
    assert comparison["episodes"] == result.comparison_episodes == 16
