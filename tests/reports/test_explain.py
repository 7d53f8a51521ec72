"""`grpo-fed explain` says what a scenario sets."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from grpo_fed.aggregation.merge.persistence import MIN_ROUNDS, rounds_of_evidence
from grpo_fed.cli import app
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.scenario.methods import METHODS
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario


def explanation(*overrides: str) -> str:
    """All sentences about quickstart with these changes."""
    parts = explain_scenario(Scenario.load(find_scenario("quickstart"), overrides))
    return "\n".join(sentence for part in parts for sentence in part.sentences)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method=grpo", "Shared by all clients: torso.0, torso.1, actor ("),
        ("method=grpo", "Private to each client: critic"),
        ("method=grpo", "KL budgets: torso.0 0.02, torso.1 0.02, actor 0.02; all blocks together 0.05."),
        ("method=grpo", "A client leaves a group if rho > 1/2 and its updates oppose the others'."),
        ("merge={ rule = 'huber', threshold = 0.02 }", "where it is further than 0.02 per parameter from the others"),
        ("method=local", "There is nothing to merge: every client learns alone."),
        ("method=fedavg", "No block is private."),
        ("method=fedavg", "The shared blocks go all the way to the merge"),
        ("method=fedprox", "Minus 0.01/2 ||x - s||^2"),
        ("method=fedrep", "The first 50% of an update's epochs train private blocks"),
        ("method=ditto", "pulled towards the shared one by 0.1/2 ||v - s||^2; evaluations use the personal policy"),
        ("method=fedkl", "where old is the policy at the start of the round"),
        ("method=fisher", "weighted by its Fisher information"),
        ("objective.preset=ppo", "A client maximises min(ratio * A, clip(ratio) * A), where ratio is"),
        ("objective.preset=ppo", "; the ratio is clipped to [1 - 0.2, 1 + 0.2]."),
        ("objective.preset=ppo", "Preset ppo (proximal policy optimisation): this scenario changes"),
        ("objective.preset=trpo", "An update stays within KL(old, new) <= 0.01; a line search shortens it."),
        ("objective.preset=a2c", "log pi * A, the plain policy gradient."),
        ("objective.preset=grpo", "Minus 0.04 times KL(new, old), where old is the policy at the start of the round."),
        ("objective.preset=grpo", "compared with those of the client's other episodes from the same start state"),
        ("penalty.weight=0.01", "Minus 0.01 times the norms of the groups of *: their differences from the start of"),
        ("penalty={ weight = 0.01, step = 'decoupled' }", "relative to the learning rate, not to the loss"),
        ("penalty={ weight = 0.01, toward = 'zero' }", "more than half of the weight have at zero is merged to zero"),
        ("objective.entropy=0.01", "Plus 0.01 times the policy's entropy."),
        ("trust.rollback=5", "if the mean return has fallen by more than 5, the update is taken back"),
        (
            "objective.entropy_target=0.5",
            "times a weight that begins at 0.01 and rises while it is below 0.5 nats, and falls while it is above.",
        ),
        ("merge={ rule = 'huber', threshold = inf }", "no client departs from a group"),
        (
            "method=clusters",
            "Clients leave a cluster together where their deviation from it repeats from round to round",
        ),
        ("policy.freeze=['torso.*']", "Frozen, so neither learned nor sent: torso.0, torso.1."),
        ("rollout.reward_scale=0.1", "Rewards are multiplied by 0.1 to learn from; returns are reported as they were."),
        ("rollout.reward_clip=2.0", "Rewards are clipped to +-2 to learn from."),
        ("method=reptile", "The server goes 0.5 times the way to it."),
        ("merge.rate=0.5", "The server goes 0.5 times the way to it; KL budgets limit this step."),
        ("method=fedadam", "The server steps towards it by Adam with rate 0.01."),
        ("method=scaffold", "Each client adds to its steps what all clients' mean step"),
        ("method=perfedavg", "Every second minibatch gives an inner step of 0.01 times its gradient"),
        ("round.fraction=0.5", "A random 50% of the connected clients take part"),
        ("checkpoint.every=0", "a run that is stopped cannot be resumed"),
    ],
)
def test_every_setting_is_explained(override: str, sentence: str):
    assert sentence in explanation(override)


PERSISTENCE = "merge.rule=persistence"


def test_persistence_says_what_it_compares_and_from_which_round_on():
    text = explanation(PERSISTENCE)
    assert "the directions of the updates, (theta - s) / ||theta - s||, in each group" in text
    assert "A client leaves a group if rho > 1/2 and its updates oppose the others'." in text
    assert f"A client may leave from round {MIN_ROUNDS} on, when it has taken part in {MIN_ROUNDS} rounds." in text
    assert f"takes twice as many rounds, {2 * MIN_ROUNDS} after the first." in text


def test_persistence_names_the_groups_that_take_more_evidence():
    # a row of the actor has 64 weights and a bias, a bias of two actions has two parameters
    text = explanation(PERSISTENCE, "policy.groups.actor=column")
    rounds = rounds_of_evidence(2)
    assert rounds > rounds_of_evidence(128)
    assert f"; smaller groups take more: actor.weight:columns[0] {rounds}, actor.weight:columns[1] {rounds}" in text


def test_persistence_says_when_nobody_can_leave():
    text = explanation(PERSISTENCE, f"rounds={MIN_ROUNDS - 1}")
    assert f"No client can leave in {MIN_ROUNDS - 1} rounds: the evidence takes {MIN_ROUNDS} rounds." in text
    assert "A client may leave from" not in text


def test_persistence_says_whether_the_blocks_have_an_order():
    ordered = explanation(PERSISTENCE, "policy.torso=shared")
    assert "These blocks follow each other: torso.0, torso.1, actor." in ordered
    assert "leaves only the first whose rho is at least 2/3 of its greatest" in ordered
    unordered = explanation(PERSISTENCE, "policy.shared=['actor']")
    assert "A client leaves all groups at once in which both hold." in unordered


def test_persistence_says_which_groups_are_learned():
    text = explanation(PERSISTENCE, 'policy.groups={ "torso.0" = "learned" }')
    assert "The groups of torso.0 are learned: the units, rows or columns of weights" in text
    assert "smaller groups take more" not in text
    assert "are learned" not in explanation(PERSISTENCE)


def test_persistence_says_when_clients_play_to_compare():
    before, after = "Before it leaves it plays 16 to 64 episodes", "5 rounds after it has left, and so on, it plays"
    both = explanation(PERSISTENCE)
    assert before in both
    assert after in both
    neither = explanation(PERSISTENCE, "merge.confirm=evidence", "merge.rejoin=0")
    assert "plays" not in neither
    assert "It does not come back." in neither


def test_a_limit_on_costs_says_what_its_price_does():
    point = "clients=[{ name = 'point', env = 'grpo_fed/PointMass-v0' }]"
    text = explanation(point, "objective.cost.limit=0.5")
    assert "Episodes may cost 0.5 in the mean, the sum of info['cost']: A is that of the return less a price" in text
    assert "The costs have a critic of their own" in text
    text = explanation(point, "objective.cost.limit=0.5", "objective.preset=grpo")
    assert "what is compared is the return less a price times the costs" in text
    assert "critic of their own" not in text


def test_a_term_that_is_off_is_not_mentioned():
    text = explanation("merge.rule=mean")
    assert not [word for word in ("entropy", "||", "Minus 0 ", "personal policy", "widens") if word in text]


def test_the_critics_error_is_no_part_of_the_objective_of_a_natural_step():
    assert "times the critic's squared error" in explanation("objective.preset=ppo")
    assert "times the critic's squared error" not in explanation("objective.preset=trpo")


@pytest.mark.parametrize("override", [*(f"method={name}" for name in METHODS if name != "fedsa"), PERSISTENCE])
def test_the_explanation_of_every_method_fits_a_screen(override: str):
    assert 20 <= len(explanation(override).splitlines()) + 8 <= 36


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_explained(preset: str):
    overrides = [f"objective.preset={preset}", "objective.schedule=constant", "objective.minibatches=1"]
    overrides += ["group.equal=skip"] if preset == "dapo" else []
    assert f"Preset {preset} (" in explanation(*overrides)


def test_the_command_refuses_the_scenarios_that_a_run_would_refuse():
    done = CliRunner().invoke(app, ["explain", "quickstart"])
    assert done.exit_code == 0, done.output
    assert "Objective" in done.stdout
    wrong = CliRunner().invoke(app, ["explain", "quickstart", "--set", "proximity.blocks.head=1"])
    assert wrong.exit_code == 2
    assert "proximity.blocks" in wrong.stderr


def test_check_shows_the_bytes_of_a_round():
    done = CliRunner().invoke(app, ["check", "quickstart", "--set", "round.fraction=0.5"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    # torso.0: 4 x 64 + 64, torso.1: 64 x 64 + 64, actor: 64 x 2 + 2; 4,610 floats, for 4 of 8 clients, both ways
    assert "Shared by all: torso.0, torso.1, actor, in 3 groups" in text
    assert "each of 4 clients receives 18.4 kB and sends at most 18.4 kB: 147.5 kB in all" in text
    half = CliRunner().invoke(
        app, ["check", "quickstart", "--set", "round.fraction=0.5", "--set", "wire.dtype=float16"]
    )
    assert "sends at most 9.2 kB: 110.6 kB in all" in " ".join(half.stdout.split())
    # with the diagonal of the Fisher matrix, a float for each parameter, whatever the parameters are sent as
    fisher = CliRunner().invoke(
        app, ["check", "quickstart", "--set", "round.fraction=0.5", "--set", "proximity.mode=quadratic"]
    )
    both = "sends at most 36.9 kB, the diagonal of its Fisher matrix included: 221.3 kB in all"
    assert both in " ".join(fisher.stdout.split())
