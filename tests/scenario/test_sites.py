"""Sites in a scenario: who is in which, what they inherit, and what is refused with its cure."""

from __future__ import annotations

import pytest

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import clients_of_sites, levels_of
from grpo_fed.scenario.toml.source import ScenarioError

TEXT = """\
name = "two"
[merge]
rule = "median"
[[sites]]
name = "north"
clients = ["north-*"]
[sites.merge]
rule = "mean"
[[sites]]
name = "south"
clients = ["south-0", "south-1", "south-2"]
[sites.proximity]
kl_joint = inf
[[clients]]
name = "north"
env = "CartPole-v1"
count = 3
[[clients]]
name = "south"
env = "CartPole-v1"
count = 3
"""


def error_of(*overrides: str) -> str:
    with pytest.raises(ScenarioError) as error:
        Scenario.loads(TEXT, overrides=overrides)
    return str(error.value)


def test_patterns_name_the_clients_of_a_site():
    assert clients_of_sites(Scenario.loads(TEXT)) == {
        "north": ("north-0", "north-1", "north-2"),
        "south": ("south-0", "south-1", "south-2"),
    }


def test_a_site_has_the_values_of_all_but_for_its_own():
    server, north, south = levels_of(Scenario.loads(TEXT, overrides=["proximity.kl_block=0.5"]))
    assert [each.merge.rule for each in (server, north, south)] == ["median", "mean", "median"]
    assert [each.proximity.kl_joint for each in (server, north, south)] == [0.05, 0.05, None]
    assert {each.proximity.kl_block for each in (server, north, south)} == {0.5}
    assert not north.sites


def test_a_robust_rule_of_a_site_goes_by_the_median_kl():
    overrides = ["merge.rule=mean", "sites.north.merge={ rule = 'krum' }"]
    server, north, south = levels_of(Scenario.loads(TEXT, overrides=overrides))
    assert [each.proximity.over for each in (server, north, south)] == ["mean", "median", "mean"]
    (_, north, _) = levels_of(Scenario.loads(TEXT, overrides=[*overrides, "sites.north.proximity={ over = 'worst' }"]))
    assert north.proximity.over == "worst"


def test_a_scenario_with_sites_is_written_and_read_again():
    scenario = Scenario.loads(TEXT)
    assert Scenario.loads(scenario.dumps()) == scenario


def test_another_method_replaces_what_a_site_says_of_its_keys():
    scenario = Scenario.loads(TEXT, overrides=["method=fedavg"])
    assert [level.merge.rule for level in levels_of(scenario)] == ["mean"] * 3
    (_, north, _) = levels_of(Scenario.loads(TEXT, overrides=["method=fedavg", "sites.north.merge.rule=median"]))
    assert north.merge.rule == "median"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sites.north.merge.rul=1", "sites.north.merge.rul=1: unknown key; did you mean rule?"),
        ("sites.north.merge.threshold=-1", "sites.north.merge.threshold=-1: must be 0 or more"),
        ("sites.north.merge.rule=huber", "huber needs merge.threshold, which has no default"),
        ("sites.north.merge.episodes=3", "clients of all sites go by the same: give it in [merge]"),
        ("sites.north.clients=['nord-*']", 'matches no client; did you mean "north-'),
        ("sites.north.clients=['north-0']", "north-1, north-2 in no site; add a pattern"),
        ("sites.north.clients=['*']", "south-0, south-1, south-2 in several sites; narrow a pattern"),
        ("sites.1.name=North", "another site has this name"),
        ("sites.north.merge.mix=2", "must be less than half of the clients of north: at most 1"),
        ("merge.mix=1", "must be less than half of the sites: at most 0"),
        ("merge.rule=clusters", 'is for a server without sites: use "persistence", "mean" or a robust rule'),
        ("sites.north.merge.rule=fisher", "sites.north.merge.rule=fisher: is for a server without sites"),
        ("sites.south.proximity.mode=quadratic", 'use "measured" or "off", or leave [[sites]] out'),
        ("round.mode=buffered", 'use round.mode = "sync", or leave [[sites]] out'),
        ("clients.north.attack=alie", 'use an attack such as "sign-flip", or leave [[sites]] out'),
        ("method=scaffold", "merge.correct_drift finds the mean step of all in one server's step"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cure(override: str, expected: str):
    assert expected in error_of(override)
