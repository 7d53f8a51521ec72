"""The table of methods as data; test_methods.py tests what each method does."""

from __future__ import annotations

import pytest

from grpo_fed.scenario.methods import DEFAULT_METHOD, KEYS_OF_METHODS, METHODS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings, PolicySettings, ProximitySettings
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.source import ScenarioError

CART = """
name = "cart"
[[clients]]
name = "c"
env = "CartPole-v1"
"""


def test_every_value_of_the_table_is_a_knob():
    assert {path for path, _ in all_keys(Scenario)} >= KEYS_OF_METHODS


def test_the_default_method_is_grpo_with_the_default_settings():
    scenario = Scenario.loads(CART)
    assert scenario.method == DEFAULT_METHOD == "grpo"
    assert scenario.policy.shared == PolicySettings().shared
    assert scenario.merge == MergeSettings()
    assert scenario.proximity == ProximitySettings()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_the_values_of_its_row(method: str):
    scenario = Scenario.loads(f'method = "{method}"\n{CART}')
    for section, values in METHODS[method].values.items():
        for key, value in values.items():
            assert getattr(getattr(scenario, section), key) == value
    assert Scenario.loads(scenario.dumps()) == scenario


def test_values_of_the_file_have_precedence_over_its_method():
    scenario = Scenario.loads(f'method = "fedavg"\n{CART}[merge]\nrule = "median"\n')
    assert (scenario.merge.rule, scenario.proximity.mode) == ("median", "off")


def test_a_method_on_the_command_line_has_precedence_over_the_file():
    text = (
        f'method = "grpo"\n{CART}[policy]\nshared = ["actor"]\nhidden = [8]\n[merge]\nrule = "huber"\nthreshold = 0.3\n'
    )
    scenario = Scenario.loads(text, overrides=["method=fedavg"])
    assert (scenario.policy.shared, scenario.merge.rule) == (["*"], "mean")
    assert (scenario.policy.hidden, scenario.merge.threshold) == ([8], 0.3)
    quoted = Scenario.loads(text, overrides=["method='fedper'", "merge.rule=median"])
    assert (quoted.policy.shared, quoted.merge.rule) == (["torso.*"], "median")


def test_a_resolved_scenario_can_be_run_with_another_method():
    resolved = Scenario.loads(CART).dumps()
    assert Scenario.loads(resolved, overrides=["method=local"]).policy.shared == []
    assert Scenario.loads(resolved, overrides=["method=fedkl"]).trust.reference == "shared"


def test_an_unknown_method_is_reported_with_a_similar_one():
    with pytest.raises(ScenarioError, match=r"method = \"fedavgg\".*fedavg"):
        Scenario.loads(f'method = "fedavgg"\n{CART}')


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('[merge]\nrule = "mean"\nblocks = { "actor" = 0.1 }', 'needs merge.rule = "huber"; it is "mean"'),
        ('[merge]\nrule = "clusters"\nblocks = { "actor" = 0.1 }', 'needs merge.rule = "huber"; it is "clusters"'),
        ('[merge]\nrule = "huber"', "merge.rule = .*: huber needs merge.threshold, which has no default"),
        ('[merge]\nrule = "huber"\nblocks = { "*" = 0.1 }', 'merge.rule = "persistence" needs none'),
        ("[personal]\nmodel = true\nfirst = 0.5", "not both"),
        ("[stop]\ntarget = 400.0", "set evaluate.every"),
        ('[merge]\nrule = "clusters"\nrate = 0.5', "do not fit several clusters"),
        ('[merge]\noptimiser = "adam"\n[penalty]\nweight = 0.1\ntoward = "zero"', "loses the exact zeros"),
        ("[merge]\ncorrect_drift = true", 'needs merge.rule = "mean"'),
        ('method = "scaffold"\n[round]\nfraction = 0.5', "needs round.fraction = 1"),
        ("[personal]\ninner_rate = 0.1\n[objective]\nepochs = 3\nminibatches = 1", "must be even"),
        ("[personal]\ninner_rate = 0.1\n[trust]\nstop = 0.1", "leave one of them out"),
        ("[personal]\ninner_rate = 0.1\nfirst = 0.5", "not both"),
        ('[personal]\ninner_rate = 0.1\n[objective]\npreset = "trpo"', 'needs objective.step = "adam"'),
        ("[normalise]\nrewards = true\n[rollout]\nreward_scale = 0.1", "use one of the two"),
        ("[normalise]\nrewards = true\n[rollout]\nreward_clip = 1.0", "use one of the two"),
        ("[stop]\npatience = 3", "set evaluate.every"),
        ('[personal]\nfirst = 0.5\n[objective]\npreset = "a2c"', "2 epochs or more"),
        ("steps = 1024\n[personal]\nmodel = true", "must be enough for one update"),
    ],
)
def test_contradictions_are_refused(lines: str, message: str):
    top, _, rest = lines.partition("\n[") if not lines.startswith("[") else ("", "", lines[1:])
    with pytest.raises(ScenarioError, match=message):
        Scenario.loads(f"{top}\n{CART}[{rest}\n")
