"""The table of presets: values for keys that the user does not give."""

from __future__ import annotations

import pytest

from grpo_fed.scenario import presets
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings
from grpo_fed.scenario.toml.keys import all_keys

CARTPOLE = 'name = "x"\nclients = [{ name = "cart", env = "CartPole-v1" }]\n'
PROMPTS = 'name = "x"\nclients = [{ name = "writer", prompts = "questions.jsonl" }]\n'


def with_preset(preset: str, *overrides: str) -> Scenario:
    """Make the default CartPole scenario with a preset, or one of prompts where the preset draws these again."""
    redraws = PRESETS[preset].values.get("group", {}).get("equal") == "redraw"
    return Scenario.loads(PROMPTS if redraws else CARTPOLE, overrides=[f"objective.preset={preset}", *overrides])


def test_a_scenario_may_name_each_of_the_twelve_presets():
    group_relative = ["grpo", "dr-grpo", "rloo", "dapo", "gspo"]
    assert list(PRESETS) == ["vpg", "a2c", "npg", "trpo", "ppo", "ppo-kl", "mdpo", *group_relative]
    named, own = Scenario.model_json_schema()["$defs"]["ObjectiveSettings"]["properties"]["preset"]["oneOf"]
    assert named["enum"] == list(PRESETS)
    assert own["pattern"]
    assert ObjectiveSettings().preset == presets.DEFAULT_PRESET


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_the_values_of_its_row(name: str):
    scenario = with_preset(name)
    for section, values in PRESETS[name].values.items():
        for key, value in values.items():
            assert getattr(getattr(scenario, section), key) == value
    assert Scenario.loads(scenario.dumps()) == scenario


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("other", PRESETS)
def test_renaming_the_preset_does_not_change_a_resolved_scenario(name: str, other: str):
    scenario = with_preset(name)
    renamed = Scenario.loads(scenario.dumps(), overrides=[f"objective.preset={other}"])
    assert renamed.trust == scenario.trust
    assert renamed.rollout == scenario.rollout
    assert renamed.objective == scenario.objective.model_copy(update={"preset": other})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_name_and_a_source(name: str):
    assert PRESETS[name].name
    assert any(letter.isdigit() for letter in PRESETS[name].paper)  # a year or a paper's number


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_determines_advantage_surrogate_step_and_region(name: str):
    values = PRESETS[name].values
    assert {"advantage", "surrogate", "step"} <= set(values["objective"])
    assert "region" in values["trust"]


def test_presets_set_existing_keys_of_four_sections():
    known = {path for path, _ in all_keys(Scenario)}
    assert known >= presets.KEYS_OF_PRESETS
    assert {section for section, _ in presets.KEYS_OF_PRESETS} == {"objective", "rollout", "group", "trust"}


def test_the_default_preset_has_the_default_settings():
    assert with_preset("ppo") == Scenario.loads(CARTPOLE)
    assert with_preset("ppo").objective == ObjectiveSettings()


def test_one_preset_key_has_a_none_that_toml_cannot_write():
    # A saved file leaves out a None. It has all other keys, so that no preset fills in a value when the file is read.
    without_spelling = {("objective", "clip_high"), ("stop", "target"), ("language", "alpha")}
    without_spelling |= {("objective", "entropy_target"), ("privacy", "delta"), ("privacy", "multiplier")}
    without_spelling |= {("newcomers", "like")}
    in_a_table_of_its_own = {("objective", "cost", "limit")}
    assert without_spelling & presets.KEYS_OF_PRESETS == {("objective", "clip_high")}
    empty = {path for path, info in all_keys(Scenario) if not info.is_required() and info.default is None}
    written_as_inf_or_absent = {
        ("objective", "value_clip"),
        ("trust", "stop"),
        ("trust", "rollback"),
        ("policy", "module"),
        ("policy", "start"),
    }
    written_as_inf_or_absent |= {("rollout", "reward_clip"), ("privacy", "epsilon")}
    assert {
        path for path in empty if path[0] != "clients"
    } == without_spelling | written_as_inf_or_absent | in_a_table_of_its_own


def test_a_saved_none_is_not_replaced_by_the_value_of_a_preset():
    dapo = with_preset("dapo")
    assert dapo.objective.clip_high == 0.28
    without = dapo.model_copy(update={"objective": dapo.objective.model_copy(update={"clip_high": None})})
    assert Scenario.loads(without.dumps()) == without


def test_set_has_precedence_over_the_file_and_the_file_over_the_preset():
    text = f"{CARTPOLE}[objective]\npreset = 'trpo'\nlearning_rate = 5e-4\n[trust]\ntarget = 0.02\ncg_iterations = 7\n"
    scenario = Scenario.loads(text, overrides=["trust.cg_iterations=8", "objective.max_grad_norm=1"])
    assert scenario.objective.step == "natural"
    assert scenario.objective.learning_rate == 5e-4
    assert scenario.objective.max_grad_norm == 1.0
    assert (scenario.trust.region, scenario.trust.target, scenario.trust.cg_iterations) == ("hard", 0.02, 8)


def test_inf_removes_the_limit_of_a_preset():
    scenario = with_preset("ppo", "objective.max_grad_norm=inf")
    assert scenario.objective.max_grad_norm is None
    assert Scenario.loads(scenario.dumps()) == scenario


def test_filling_from_a_preset_does_not_change_its_argument():
    data = {"objective": {"preset": "a2c", "gamma": 0.5}, "name": "x"}
    filled = presets.fill_from_preset(data)
    assert data == {"objective": {"preset": "a2c", "gamma": 0.5}, "name": "x"}
    assert filled["objective"]["surrogate"] == "score"
    assert filled["objective"]["gamma"] == 0.5
    assert filled["rollout"] == {"horizon": 5}
    assert filled["name"] == "x"


@pytest.mark.parametrize("objective", [3, [], {"preset": "unknown"}, {"preset": 3}, {"preset": []}])
def test_an_invalid_preset_changes_no_table(objective: object):
    assert presets.fill_from_preset({"objective": objective}) == {"objective": objective}


# Values of other implementations --------------------------------------------------------------------------------------


def test_a2c_ppo_and_trpo_have_the_values_of_stable_baselines3():
    a2c, ppo, trpo = with_preset("a2c"), with_preset("ppo"), with_preset("trpo")
    assert (a2c.rollout.horizon, a2c.objective.learning_rate, a2c.objective.gae_lambda) == (5, 7e-4, 1.0)
    assert (a2c.objective.max_grad_norm, a2c.objective.value_coefficient, a2c.objective.entropy) == (0.5, 0.5, 0.0)
    assert (ppo.objective.learning_rate, ppo.objective.epochs, ppo.objective.clip) == (3e-4, 10, 0.2)
    assert ppo.rollout.num_envs * ppo.rollout.horizon // ppo.objective.minibatches == 64
    assert (trpo.objective.learning_rate, trpo.trust.target, trpo.trust.cg_iterations) == (1e-3, 0.01, 15)
    assert (trpo.trust.cg_damping, trpo.objective.value_epochs, trpo.objective.max_grad_norm) == (0.1, 10, None)
    assert trpo.rollout.num_envs * trpo.rollout.horizon // trpo.objective.minibatches == 128


def test_stable_baselines3_still_has_these_values():
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


def test_dapo_and_gspo_have_the_values_of_their_papers():
    dapo, gspo = with_preset("dapo"), with_preset("gspo")
    assert (dapo.objective.clip, dapo.objective.clip_high, dapo.objective.average) == (0.2, 0.28, "step")
    assert (dapo.group.equal, dapo.group.score, dapo.trust.region) == ("redraw", "zscore", "none")
    assert (gspo.objective.ratio, gspo.objective.clip, gspo.objective.clip_high) == ("episode", 3e-4, 4e-4)
    assert (gspo.objective.average, gspo.group.score, gspo.trust.region) == ("episode", "zscore", "none")
