"""What `grpo-fed explain` says, held against what a scenario sets."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from grpo_fed.cli import app
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.scenario.methods import METHODS
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario


def said(*overrides: str) -> str:
    parts = explain_scenario(Scenario.load(find_scenario("quickstart"), overrides))
    return "\n".join(sentence for part in parts for sentence in part.sentences)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method=grpo", "Shared by all clients: torso.0, torso.1, actor ("),
        ("method=grpo", "Private to each: critic"),
        ("method=grpo", "Budgets: torso.0 0.02, torso.1 0.02, actor 0.02; all together 0.05."),
        ("method=grpo", "leaves a group where it lies further than 0.02 a parameter from the others"),
        ("method=local", "There is nothing to merge: every client learns alone."),
        ("method=fedavg", "No block is private."),
        ("method=fedavg", "The whole step to the merge is made"),
        ("method=fedprox", "Less 0.01/2 ||x - s||^2"),
        ("method=fedrep", "The first 50% of an update's epochs move private blocks only"),
        ("method=ditto", "drawn to the shared one by 0.1/2 ||v - s||^2, and is what plays"),
        ("method=fedkl", "where old is the policy that the round began with"),
        ("method=fisher", "weighed by its Fisher information"),
        ("objective.preset=ppo", "min(ratio * A, clip(ratio) * A), the ratio held within 1 - 0.2 and 1 + 0.2"),
        ("objective.preset=ppo", "Preset ppo (proximal policy optimisation): this scenario changes"),
        ("objective.preset=trpo", "An update stays within KL(old, new) = 0.01, by a line search."),
        ("objective.preset=a2c", "log pi * A, the plain policy gradient."),
        ("objective.preset=grpo", "Less 0.04 times KL(new, old), where old is the policy that the round began with."),
        ("objective.preset=grpo", "A is an episode's return against others from the same start, without a critic"),
        ("objective.entropy=0.01", "Plus 0.01 times the entropy of its actions."),
        ("merge.threshold=inf", "no group departs"),
        ("method=clusters", "Clusters lie further than 0.02 a parameter from each other, or are one."),
        ("round.fraction=0.5", "A random 50% of those in reach take part"),
        ("checkpoint.every=0", "a run that is stopped cannot be resumed"),
    ],
)
def test_what_is_set_is_said(override: str, sentence: str):
    assert sentence in said(override)


def test_a_term_that_is_off_is_not_spoken_of():
    text = said()
    assert not [word for word in ("entropy", "||", "Less 0 ", "second policy", "widens") if word in text]


@pytest.mark.parametrize("override", [*(f"method={name}" for name in METHODS)])
def test_every_method_is_explained_on_a_screen(override: str):
    assert 20 <= len(said(override).splitlines()) + 8 <= 36


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_explained(preset: str):
    overrides = [f"objective.preset={preset}", "objective.schedule=constant", "objective.minibatches=1"]
    assert f"Preset {preset} (" in said(*overrides)


def test_the_command_says_it_and_refuses_what_a_run_would_refuse():
    done = CliRunner().invoke(app, ["explain", "quickstart"])
    assert done.exit_code == 0, done.output
    assert "What a client climbs" in done.stdout
    wrong = CliRunner().invoke(app, ["explain", "quickstart", "--set", "proximity.blocks.head=1"])
    assert wrong.exit_code == 2
    assert "proximity.blocks" in wrong.stderr


def test_check_says_what_a_round_sends():
    done = CliRunner().invoke(app, ["check", "quickstart", "--set", "round.fraction=0.5"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    # torso.0: 4 x 64 + 64, torso.1: 64 x 64 + 64, actor: 64 x 2 + 2; 4,610 floats, for 4 of 8 clients, both ways
    assert "Shared by all: torso.0, torso.1, actor, in 3 groups" in text
    assert "18.4 kB go to a client and at most 18.4 kB come back" in text
    assert "with 4 clients drawn 147.5 kB a round" in text
