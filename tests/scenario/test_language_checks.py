"""Contradictions of clients with prompts and of clients with environments, each with its cure."""

from __future__ import annotations

import pytest

from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError

WRITER = '[[clients]]\nname = "writer"\nprompts = "questions.jsonl"\nrewards = [{ function = "exact" }]\n'
CART = '[[clients]]\nname = "cart"\nenv = "CartPole-v1"\n'


def errors(clients: str, *overrides: str) -> list[str]:
    """List what is wrong with a scenario of these clients."""
    try:
        Scenario.loads(f'name = "x"\n{clients}', overrides=overrides)
    except ScenarioError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("preset", [name for name, row in PRESETS.items() if row.values["objective"]["step"] == "adam"])
def test_presets_without_a_critic_fit_prompts(preset: str):
    lines = errors(WRITER, f"objective.preset={preset}")
    assert bool(lines) == (PRESETS[preset].values["objective"]["advantage"] != "group")
    assert all('use objective.preset = "grpo", "dr-grpo", "rloo", "dapo" or "gspo"' in line for line in lines)


def test_a_client_has_either_env_or_prompts():
    (neither,) = errors('[[clients]]\nname = "cart"\n')
    assert (
        neither == 'scenario:2: clients.cart: needs env, such as "CartPole-v1", or prompts, such as "questions.jsonl"'
    )
    (both,) = errors(f'{CART}prompts = "questions.jsonl"\n', "objective.preset=grpo")
    assert both.endswith("a client has either env or prompts; leave one of them out")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("objective.step=natural", 'needs objective.step = "adam"'),
        ("group.by=similarity", 'needs group.by = "start", the same prompt, or "task"'),
        ("policy.module=mine:Net", "is for clients with env alone"),
        ("policy.adapter=4", "is for clients with env alone"),
        ("normalise.observations=true", "is for clients with env alone"),
        ("normalise.rewards=true", "is for clients with env alone"),
        ("steps=4", "steps = 4 completions must be enough for one update: rollout.num_envs = 8"),
        ("objective.minibatches=9", "must not be more than the completions of an update: rollout.num_envs = 8"),
        ("rollout.num_envs=12", "must be a multiple of group.size = 8; use 8"),
        ("clients.writer.wrappers=['mine:wrap']", "is for a client with env; this one has prompts"),
        ("clients.writer.changes=[{ round = 2, kwargs = { a = 1 } }]", "is for a client with env"),
    ],
)
def test_what_prompts_contradict_is_refused(override: str, text: str):
    (line,) = errors(WRITER, "objective.preset=dr-grpo", override)
    assert text in line


def test_a_spread_is_for_environments():
    (line,) = errors(
        WRITER, "objective.preset=dapo", "clients.writer.count=2", "clients.writer.spread={ a = [0.0, 1.0] }"
    )
    assert line.endswith("is for a client with env; this one has prompts")


@pytest.mark.parametrize("key", ["eval_prompts='a.jsonl'", "held_out=0.5", "rewards=[{ function = 'exact' }]"])
def test_what_belongs_to_prompts_is_refused_for_an_environment(key: str):
    (line,) = errors(CART, f"clients.cart.{key}")
    assert line.endswith("is for a client with prompts; this one has env")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["objective.preset=dapo"], 'draws other prompts, and a client with env has none: use group.equal = "skip"'),
        (["trust.estimate=sampled"], 'is for clients with prompts alone: use trust.estimate = "exact"'),
        (["objective.ratio=episode"], 'needs whole episodes, objective.advantage = "group"'),
        (["objective.preset=gspo", "objective.minibatches=2"], "use objective.minibatches = 1"),
    ],
)
def test_what_needs_prompts_is_refused_for_an_environment(overrides: list[str], text: str):
    (line,) = errors(CART, *overrides)
    assert text in line
    assert any(text in each for each in errors(CART + WRITER, *overrides))


def test_an_estimate_on_tokens_goes_from_new_to_old():
    overrides = ["objective.preset=grpo", "trust.estimate=sampled"]
    assert errors(WRITER, *overrides) == []
    (line,) = errors(WRITER, *overrides, "trust.direction=old-new")
    assert 'estimates KL(new, old): use trust.direction = "new-old"' in line
    assert errors(WRITER, *overrides, "trust.direction=old-new", "trust.region=none") == []


def test_a_scenario_may_have_clients_of_both_kinds():
    assert errors(CART + WRITER, "objective.preset=grpo") == []
    scenario = Scenario.loads(f'name = "x"\n{CART}{WRITER}', overrides=["objective.preset=gspo"])
    assert Scenario.loads(scenario.dumps()) == scenario


@pytest.mark.parametrize("method", ["fedper", "fedrep", "lg"])
def test_a_method_that_shares_a_part_of_a_network_names_the_blocks_of_adapters(method: str):
    (line,) = errors(WRITER, "objective.preset=grpo", f"method={method}")
    assert f"method = {method}" in line or "policy.shared" in line
    assert "is a part of a network, and a client with prompts has the adapters of a model" in line
    assert line.endswith('use policy.shared = ["layers.*"]')
    assert errors(WRITER, "objective.preset=grpo", f"method={method}", "policy.shared=['layers.*']") == []


def test_two_policies_share_the_completions_of_a_round():
    settings = ("objective.preset=grpo", "method=ditto", "rollout.num_envs=16")
    (line,) = errors(WRITER, *settings, "steps=31")
    assert "each policy's part of steps = 31 completions must be enough for one update: rollout.num_envs = 16" in line
    assert errors(WRITER, *settings, "steps=32") == []
