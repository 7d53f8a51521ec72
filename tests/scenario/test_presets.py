"""The table of presets: data that fills in what the user left open."""

from __future__ import annotations

import pytest

from grpo_fed.scenario import presets
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings
from grpo_fed.scenario.toml.keys import all_keys

CARTPOLE = 'name = "x"\nclients = [{ name = "cart", env = "CartPole-v1" }]\n'


def resolved(preset: str, *overrides: str) -> Scenario:
    """The default CartPole scenario with a preset."""
    return Scenario.loads(CARTPOLE, overrides=[f"objective.preset={preset}", *overrides])


def test_the_ten_presets_are_those_that_a_scenario_may_name():
    assert list(PRESETS) == ["vpg", "a2c", "npg", "trpo", "ppo", "ppo-kl", "mdpo", "grpo", "dr-grpo", "rloo"]
    named, own = Scenario.model_json_schema()["$defs"]["ObjectiveSettings"]["properties"]["preset"]["oneOf"]
    assert named["enum"] == list(PRESETS)
    assert own["pattern"]
    assert ObjectiveSettings().preset == presets.DEFAULT_PRESET


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_on_cartpole_to_its_values_and_round_trips(name: str):
    scenario = resolved(name)
    for section, values in PRESETS[name].values.items():
        for key, value in values.items():
            assert getattr(getattr(scenario, section), key) == value
    assert Scenario.loads(scenario.dumps()) == scenario


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("other", PRESETS)
def test_a_resolved_scenario_stays_what_it_is_under_any_other_presets_name(name: str, other: str):
    scenario = resolved(name)
    renamed = Scenario.loads(scenario.dumps(), overrides=[f"objective.preset={other}"])
    assert renamed.trust == scenario.trust
    assert renamed.rollout == scenario.rollout
    assert renamed.objective == scenario.objective.model_copy(update={"preset": other})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_and_where_it_comes_from(name: str):
    assert PRESETS[name].name
    assert any(letter.isdigit() for letter in PRESETS[name].paper)  # a year or a paper's number


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_its_advantage_surrogate_step_and_region(name: str):
    values = PRESETS[name].values
    assert {"advantage", "surrogate", "step"} <= set(values["objective"])
    assert "region" in values["trust"]


def test_presets_set_keys_that_exist_in_four_sections_only():
    known = {path for path, _ in all_keys(Scenario)}
    assert known >= presets.KEYS_OF_PRESETS
    assert {section for section, _ in presets.KEYS_OF_PRESETS} == {"objective", "rollout", "group", "trust"}


def test_the_default_preset_is_what_the_defaults_of_the_knobs_say():
    assert resolved("ppo") == Scenario.loads(CARTPOLE)
    assert resolved("ppo").objective == ObjectiveSettings()


def test_a_value_without_a_spelling_in_toml_is_in_no_preset():
    # A preset's value would come back where the user's None was left out of the saved file.
    unspoken = {("objective", "clip_high"), ("stop", "target")}
    assert not unspoken & presets.KEYS_OF_PRESETS
    empty = {path for path, info in all_keys(Scenario) if not info.is_required() and info.default is None}
    spelt = {("objective", "value_clip"), ("trust", "stop"), ("policy", "module")}
    assert {path for path in empty if path[0] != "clients"} == unspoken | spelt


def test_what_the_file_says_wins_over_the_preset_and_set_wins_over_the_file():
    text = f"{CARTPOLE}[objective]\npreset = 'trpo'\nlearning_rate = 5e-4\n[trust]\ntarget = 0.02\ncg_iterations = 7\n"
    scenario = Scenario.loads(text, overrides=["trust.cg_iterations=8", "objective.max_grad_norm=1"])
    assert scenario.objective.step == "natural"
    assert scenario.objective.learning_rate == 5e-4
    assert scenario.objective.max_grad_norm == 1.0
    assert (scenario.trust.region, scenario.trust.target, scenario.trust.cg_iterations) == ("hard", 0.02, 8)


def test_no_limit_stays_no_limit_where_the_preset_has_one():
    scenario = resolved("ppo", "objective.max_grad_norm=inf")
    assert scenario.objective.max_grad_norm is None
    assert Scenario.loads(scenario.dumps()) == scenario


def test_applying_a_preset_leaves_what_it_was_given_alone():
    data = {"objective": {"preset": "a2c", "gamma": 0.5}, "name": "x"}
    filled = presets.fill_from_preset(data)
    assert data == {"objective": {"preset": "a2c", "gamma": 0.5}, "name": "x"}
    assert filled["objective"]["surrogate"] == "score"
    assert filled["objective"]["gamma"] == 0.5
    assert filled["rollout"] == {"horizon": 5}
    assert filled["name"] == "x"


@pytest.mark.parametrize("objective", [3, [], {"preset": "unknown"}, {"preset": 3}, {"preset": []}])
def test_what_is_no_preset_is_left_to_the_models(objective: object):
    assert presets.fill_from_preset({"objective": objective}) == {"objective": objective}


# The figures that peers are known by.


def test_a2c_and_ppo_and_trpo_have_the_values_of_stable_baselines3():
    a2c, ppo, trpo = resolved("a2c"), resolved("ppo"), resolved("trpo")
    assert (a2c.rollout.horizon, a2c.objective.learning_rate, a2c.objective.gae_lambda) == (5, 7e-4, 1.0)
    assert (a2c.objective.max_grad_norm, a2c.objective.value_coefficient, a2c.objective.entropy) == (0.5, 0.5, 0.0)
    assert (ppo.objective.learning_rate, ppo.objective.epochs, ppo.objective.clip) == (3e-4, 10, 0.2)
    assert ppo.rollout.num_envs * ppo.rollout.horizon // ppo.objective.minibatches == 64
    assert (trpo.objective.learning_rate, trpo.trust.target, trpo.trust.cg_iterations) == (1e-3, 0.01, 15)
    assert (trpo.trust.cg_damping, trpo.objective.value_epochs, trpo.objective.max_grad_norm) == (0.1, 10, None)
    assert trpo.rollout.num_envs * trpo.rollout.horizon // trpo.objective.minibatches == 128


def test_stable_baselines3_has_these_values_still():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    sb3_contrib = pytest.importorskip("sb3_contrib")
    from inspect import signature

    def default(algorithm: type, key: str) -> object:
        return signature(algorithm).parameters[key].default

    a2c, ppo, trpo = stable_baselines3.A2C, stable_baselines3.PPO, sb3_contrib.TRPO
    assert [default(a2c, key) for key in ("n_steps", "learning_rate", "gae_lambda")] == [5, 7e-4, 1.0]
    assert [default(ppo, key) for key in ("learning_rate", "n_epochs", "clip_range", "batch_size")] == [
        3e-4,
        10,
        0.2,
        64,
    ]
    assert [default(trpo, key) for key in ("learning_rate", "target_kl", "cg_max_steps", "cg_damping")] == [
        1e-3,
        0.01,
        15,
        0.1,
    ]
    assert [default(trpo, key) for key in ("n_critic_updates", "batch_size")] == [10, 128]
