"""Keys that `grpo-fed check` calls without effect have none: runs that differ in them alone end with the same bits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_fed.engines.start import run
from grpo_fed.federation.server_state import EVIDENCE
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.unused import unused_keys
from grpo_fed.scenario.unused_constraints import CONSTRAINTS_UNUSED
from grpo_fed.scenario.unused_language import WITH_PROMPTS_ALONE, WITHOUT_PROMPTS, WITHOUT_REDRAWS
from grpo_fed.scenario.unused_setups import PROMPTS_UNUSED, SETUPS_UNUSED
from grpo_fed.scenario.unused_table import UNUSED
from tests.support.small_language import WORDS

SMALL = """
name = "small"
rounds = 3
steps = 32
device = "cpu"
[policy]
hidden = [4]
[rollout]
num_envs = 4
horizon = 8
[objective]
epochs = 2
minibatches = 2
learning_rate = 0.02
[evaluate]
episodes = 2
[checkpoint]
every = 3
[[clients]]
name = "near"
env = "tests.scenario.test_knobs:Reach-v0"
wrappers = ["tests.scenario.test_knobs:halve_rewards"]
[[clients]]
name = "far"
env = "tests.scenario.test_knobs:Reach-v0"
kwargs = { scale = 2.0 }
"""
POLES = """
name = "poles"
rounds = 2
steps = 64
device = "cpu"
policy = { hidden = [4] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 2, minibatches = 2 }
evaluate = { episodes = 2 }
[[clients]]
name = "pole"
env = "grpo_fed/CartPole-v1"
count = 2
"""

ROWS = (*UNUSED, *SETUPS_UNUSED, *CONSTRAINTS_UNUSED, WITHOUT_PROMPTS, WITHOUT_REDRAWS)
"""The rows that hold for clients with environments."""

MODULE = ["policy.module=tests.scenario.test_knobs:UserModule", "policy.shared=['body.*']"]
NO_LAYERS = ["policy.hidden=[]", "policy.shared=['actor']", "merge.rule=mean"]
GROUP = ["objective.preset=grpo", "group.size=2"]
NATURAL = ["objective.preset=trpo"]
NATURAL_GROUP = ["objective.preset=trpo", "objective.advantage=group", "group.size=2"]
ONE_STEP = ["objective.epochs=1", "objective.minibatches=1"]
ONE_CLIENT = ["clients=[{ name = 'only', env = 'tests.scenario.test_knobs:Reach-v0' }]"]
SCORED_CLIENT = [ONE_CLIENT[0].replace(" }]", ", score = { random = 0.0, reference = 5.0 } }]")]
PRIVATE = ["method=fedavg", "privacy.epsilon=8"]
HUBER = ["merge.rule=huber", "merge.threshold=0.02"]
CLUSTERS = ["merge.rule=clusters"]
OWN_RULE = ["merge.rule=tests.engines.test_unused_runs:first_client"]

FILES = TemporaryDirectory()
TINY_START = f"{FILES.name}/start.safetensors"
"""A file with what policies may begin with."""
save_file({"actor.bias": np.array([0.5, -0.5], np.float32)}, TINY_START)

RULE_KEYS = {
    "refit": "false",
    "fraction": "0.4",
    "byzantine": "0",
    "keep": "2",
    "radius": "0.1",
    "most": "2",
    "confirm": "evidence",
    "rejoin": "0",
    "episodes": "2",
}
"""Another value than the default for each key of a single rule."""

OWN_WEIGHTS = "merge = { rule = 'mean', weights = 'uniform' }"
ONE, TWO = (f"{{ name = '{name}', clients = ['{name}'], {OWN_WEIGHTS} }}" for name in ("near", "far"))
SITES = [f"sites=[{ONE}, {TWO}]"]

CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "what sites have of their own": (SITES, {"merge.weights": "uniform", "merge.episodes": "2"}),
    "own network": (
        MODULE,
        {
            "policy.kind": "cnn",
            "policy.encoder": "impala",
            "policy.memory": "gru",
            "policy.units": "9",
            "policy.hidden": "[9]",
            "policy.activation": "relu",
            "policy.torso": "shared",
            "policy.adapter": "0",
            "policy.log_std": "1.0",
            "policy.orthogonal": "false",
        },
    ),
    "no pictures": ([], {"policy.encoder": "impala"}),
    "no memory": ([], {"policy.units": "9"}),
    "no layers": (NO_LAYERS, {"policy.activation": "relu", "policy.torso": "shared"}),
    "groups of a mean": (["merge.rule=mean"], {"policy.groups": "{ '*' = 'row' }"}),
    "groups of clusters": (CLUSTERS, {"policy.groups": "{ '*' = 'row' }"}),
    "groups that nobody shares": ([*HUBER, "policy.shared=[]"], {"policy.groups": "{ '*' = 'row' }"}),
    "no normalisation": ([], {"normalise.clip": "0.1"}),
    "no critic": (
        GROUP,
        {
            "rollout.horizon": "3",
            "objective.gae_lambda": "0.1",
            "objective.value_coefficient": "2.0",
            "objective.value_clip": "0.01",
            "objective.value_epochs": "1",
        },
    ),
    "adam": ([], {"objective.value_epochs": "1", "trust.cg_iterations": "1", "trust.cg_damping": "9.0"}),
    "natural step": (NATURAL, {"objective.value_coefficient": "2.0", "objective.epochs": "1"}),
    "natural step without a critic": (
        NATURAL_GROUP,
        {
            "objective.adam_epsilon": "0.5",
            "objective.minibatches": "3",
            "objective.max_grad_norm": "0.01",
            "objective.learning_rate": "0.5",
            "objective.schedule": "linear",
            "clients.0.learning_rate": "0.7",
        },
    ),
    "own learning rates": (
        [*HUBER, "clients.near.learning_rate=0.01", "clients.far.learning_rate=0.02"],
        {"objective.learning_rate": "0.5"},
    ),
    "own scales": (
        ["clients.near.reward_scale=0.1", "clients.far.reward_scale=2.0"],
        {"rollout.reward_scale": "4.0"},
    ),
    "scores without a scale": (GROUP, {"rollout.reward_scale": "2.0", "clients.0.reward_scale": "4.0"}),
    "own starts": (
        [
            "policy.shared=[]",
            f"clients.near.start={TINY_START}",
            f"clients.far.start={TINY_START}",
        ],
        {"policy.start": "nowhere"},
    ),
    "own entropies": (["clients.near.entropy=0.1", "clients.far.entropy=0.0"], {"objective.entropy": "0.5"}),
    "own penalties": (["clients.near.penalty=0.1", "clients.far.penalty=0.0"], {"penalty.weight": "0.5"}),
    "no entropy weights": ([], {"objective.entropy_groups": "{ a = [0] }"}),
    "no limit on costs": ([], {"objective.cost.rate": "9.0", "objective.cost.key": "other"}),
    "no rollback": ([], {"trust.rollback_episodes": "3"}),
    "no entropy target": ([], {"objective.entropy_rate": "9.0"}),
    "a target for the whole action": (
        ["objective.entropy_target=0.5"],
        {"objective.entropy_groups": "{ a = [0] }", "objective.entropy_weights": "{ a = 0.5 }"},
    ),
    "score": (
        [*GROUP, "objective.minibatches=1", "objective.surrogate=score"],
        {"objective.ratio": "episode"},
    ),
    "no prompts": (
        [],
        {
            "language.model": "other",
            "language.dtype": "bfloat16",
            "language.rank": "3",
            "language.alpha": "2.0",
            "language.maps": "['q_proj']",
            "language.learn": "AB",
            "language.chat": "true",
            "language.length": "9",
            "language.temperature": "0.5",
            "language.mask_cut": "true",
            "language.tokens": "64",
            "language.recompute": "true",
            "language.show": "1",
            "group.redraws": "9",
        },
    ),
    "ratio": (["objective.surrogate=ratio"], {"objective.clip": "0.001", "objective.clip_schedule": "constant"}),
    "natural step without a search": (
        ["objective.preset=npg", "objective.surrogate=clip"],
        {"objective.clip": "0.001", "objective.clip_high": "0.002", "objective.clip_schedule": "linear"},
    ),
    "one step": (
        [*ONE_STEP, "objective.value_clip=0.5"],
        {
            "objective.clip": "0.001",
            "objective.clip_high": "0.002",
            "objective.clip_schedule": "linear",
            "objective.value_clip": "0.01",
            "trust.stop": "0.001",
        },
    ),
    "one step from where the KL is flat": (
        [*ONE_STEP, "trust.region=penalty"],
        {"trust.region": "adaptive", "trust.coefficient": "9.0", "trust.target": "1e-6"},
    ),
    "one step of the critic": (
        [*NATURAL, "objective.value_epochs=1", "objective.minibatches=1", "objective.value_clip=0.5"],
        {"objective.value_clip": "0.01"},
    ),
    "critic's advantages": (
        [],
        {
            "group.equal": "skip",
            "group.size": "4",
            "group.clusters": "1",
            "group.score": "rank",
            "group.by": "context",
            "group.key": "index",
        },
    ),
    "groups by task": ([*GROUP, "group.by=task"], {"group.size": "3", "group.clusters": "2"}),
    "no region": (
        [],
        {
            "trust.direction": "new-old",
            "trust.reference": "shared",
            "trust.coefficient": "9.0",
            "trust.target": "9.0",
            "trust.line_search": "false",
        },
    ),
    "hard region": (NATURAL, {"trust.coefficient": "9.0"}),
    "natural step without a region": (
        [*NATURAL, "trust.region=none"],
        {"trust.reference": "shared", "trust.target": "9.0", "trust.line_search": "false"},
    ),
    "no penalty": (
        [],
        {
            "penalty.step": "decoupled",
            "penalty.toward": "zero",
            "penalty.kind": "nested",
            "penalty.blocks": "['actor']",
        },
    ),
    "penalty after a natural step": ([*NATURAL, "penalty.weight=0.05"], {"penalty.step": "decoupled"}),
    "nested without outer": (["penalty.weight=0.05"], {"penalty.kind": "nested"}),
    "sparse groups without l1": (["penalty.weight=0.05"], {"penalty.kind": "sparse-group"}),
    "no levels that returns move": ([], {"curriculum.by": "server"}),
    "uniform levels": (
        ["clients.0.curriculum={ kind = 'uniform', ranges = { scale = [1.0, 2.0] } }"],
        {
            "clients.0.curriculum.start": "{ scale = [1.2, 1.4] }",
            "clients.0.curriculum.until": "0.9",
            "clients.0.curriculum.target": "-1.0",
            "clients.0.curriculum.floor": "-9.0",
            "clients.0.curriculum.step": "0.3",
            "clients.0.curriculum.episodes": "3",
            "clients.0.curriculum.edges": "0.9",
            "clients.0.curriculum.levels": "7",
            "clients.0.curriculum.explore": "0.9",
            "clients.0.curriculum.fade": "0.1",
            "clients.0.curriculum.temperature": "0.9",
            "clients.0.curriculum.staleness": "0.9",
        },
    ),
    "nothing is shared, so no twin differs": (["policy.shared=[]"], {"evaluate.twins": "true"}),
    "no newcomers": ([], {"newcomers.most": "1"}),
    "no second policy": ([], {"personal.pull": "9.0", "personal.steps": "0.25"}),
    "nothing to be pulled to": (
        ["policy.shared=[]", "personal.model=true", "steps=64"],
        {"personal.pull": "9.0", "penalty.squared": "9.0"},
    ),
    "nothing shared": (
        ["policy.shared=[]", *HUBER],
        {
            "merge.weights": "uniform",
            "merge.threshold": "0.5",
            "merge.refit": "false",
            "wire.dtype": "float16",
            "merge.blocks": "{ '*' = 0.1 }",
            "proximity.mode": "quadratic",
            "proximity.kl_block": "1e-9",
            "proximity.kl_joint": "1e-9",
            "proximity.blocks": "{ '*' = 1e-9 }",
            "proximity.over": "worst",
            "proximity.adaptive": "true",
            "proximity.states": "9",
        },
    ),
    "nothing to cluster": (
        ["policy.shared=[]", *CLUSTERS],
        {"merge.rule": "krum", "merge.byzantine": "0", "merge.keep": "2", "merge.most": "2"},
    ),
    "nothing to mix": (
        ["policy.shared=[]", "merge.rule=centred-clipping", "clients.0.count=3"],
        {"merge.mix": "1", "merge.radius": "2.0"},
    ),
    "nothing to step towards": (
        ["policy.shared=[]", "merge.rule=mean"],
        {"merge.optimiser": "adam", "merge.rate": "0.5", "merge.momentum": "0.1", "merge.epsilon": "0.1"},
    ),
    "nothing to drift from": (
        ["policy.shared=[]", "merge.rule=mean", "proximity.mode=off"],
        {"merge.correct_drift": "true"},
    ),
    "no privacy": (
        [],
        {
            "privacy.delta": "1e-3",
            "privacy.noise": "local",
            "privacy.multiplier": "9.0",
            "privacy.clip": "0.5",
            "privacy.blocks": "{ actor = 0.3 }",
            "privacy.rate": "0.5",
            "privacy.quantile": "0.9",
            "privacy.share": "0.5",
            "privacy.source": "system",
            "privacy.reach": "9.0",
        },
    ),
    "bounds that stay with local noise": (
        [*PRIVATE, "privacy.noise=local"],
        {"privacy.rate": "0.5", "privacy.quantile": "0.9", "privacy.share": "0.5"},
    ),
    "nobody is evaluated": (
        ["method=fedavg", "privacy.metrics=withheld"],
        {"evaluate.every": "1", "evaluate.adapt": "1"},
    ),
    "no momentum": ([], {"merge.momentum": "0.1", "merge.epsilon": "0.1"}),
    "nothing for a rule of the user": (["policy.shared=[]", *OWN_RULE], {"merge.kwargs": "{ number = 1 }"}),
    "nothing to leave": (
        ["policy.shared=[]", "merge.rule=persistence"],
        {"merge.confirm": "evidence", "merge.rejoin": "1", "merge.episodes": "2"},
    ),
    "nothing to trim": (
        ["policy.shared=[]", "merge.rule=trimmed-mean"],
        {"merge.rule": "fisher", "merge.fraction": "0.4"},
    ),
    **{
        f"keys of other rules with {name}": (
            overrides,
            {"merge.threshold": "1e-4"} | {f"merge.{key}": value for key, value in RULE_KEYS.items() if key not in own},
        )
        for name, overrides, own in [
            ("mean", ["merge.rule=mean"], ()),
            ("persistence", ["merge.rule=persistence"], ("confirm", "rejoin", "episodes")),
            ("fisher", ["merge.rule=fisher"], ()),
            ("median", ["merge.rule=median"], ()),
            ("trimmed-mean", ["merge.rule=trimmed-mean"], ("fraction",)),
            ("krum", ["merge.rule=krum"], ("byzantine", "keep")),
            ("centred-clipping", ["merge.rule=centred-clipping"], ("radius",)),
            ("clusters", CLUSTERS, ("most",)),
            ("a rule of the user", OWN_RULE, ()),
        ]
    },
    "keys of other rules with huber": (
        HUBER,
        {f"merge.{key}": value for key, value in RULE_KEYS.items() if key != "refit"},
    ),
    "no threshold": (["merge.rule=huber", "merge.threshold=inf"], {"merge.refit": "false"}),
    "two clients in clusters": ([*CLUSTERS, "rounds=6"], {"merge.most": "2"}),
    "nothing to compare": (
        ["merge.rule=persistence", "merge.confirm=evidence", "merge.rejoin=0", "rounds=6"],
        {"merge.episodes": "2"},
    ),
    "a score where all environments are alike": (
        SCORED_CLIENT,
        {"clients.0.score.random": "1.0", "clients.0.score.reference": "7.0"},
    ),
    "an attack without a strength": (["merge.rule=mean", "clients.0.attack=mimic"], {"clients.0.strength": "9.0"}),
    "no budgets": (
        ["proximity.mode=off"],
        {
            "proximity.kl_block": "1e-9",
            "proximity.kl_joint": "1e-9",
            "proximity.blocks": "{ actor = 1e-9 }",
            "proximity.over": "worst",
            "proximity.adaptive": "true",
            "proximity.states": "9",
        },
    ),
    "predicted budgets": (["proximity.mode=quadratic", "proximity.kl_block=1e-4"], {"proximity.over": "worst"}),
    "one client": (
        [*ONE_CLIENT, "proximity.kl_block=1e-4"],
        {
            "proximity.over": "worst",
            "proximity.adaptive": "true",
            "round.fraction": "0.3",
            "round.quorum": "1.0",
        },
    ),
    "rounds that wait": (
        [],
        {
            "round.buffer": "0.3",
            "round.staleness": "none",
            "round.max_staleness": "2",
            "round.rate_fair": "false",
            "round.again": "at-once",
            "clients.0.pace": "3.0",
            "clients.0.jitter": "0.2",
        },
    ),
    "merges of one answer": (
        ["round.mode=buffered", "round.buffer=0.5", "proximity.mode=quadratic", "clients.0.pace=2.5"],
        {"round.again": "at-once"},
    ),
    "rounds that do not wait, without shared blocks": (
        ["policy.shared=[]", "proximity.mode=off", "round.mode=buffered"],
        {"round.staleness": "none", "round.rate_fair": "false"},
    ),
    "no budget to adapt": (["proximity.kl_block=inf"], {"proximity.adaptive": "true"}),
    "no evaluation between": (
        ["evaluate.every=3"],
        {"evaluate.every": "4", "stop.target": "-1e6", "stop.patience": "1"},
    ),
    "no patience": (["evaluate.every=1", "stop.patience=2"], {"stop.patience": "3"}),
    "no checkpoints": (["checkpoint.every=0"], {"checkpoint.keep": "1"}),
    "late checkpoints": (["checkpoint.every=4"], {"checkpoint.keep": "1"}),
}
"""What makes keys rest, and other values of these keys."""


def first_client(replies: Any, shared: Any, groups: Any, number: int = 0) -> Any:
    """Merge by taking one client's parameters."""
    return replies.all[number].point


@cache
def outcome(text: str, *overrides: str) -> dict[str, bytes]:
    """Run a scenario; return the bytes of its policies and of the shared blocks, and the returns of its clients."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        result = run(Scenario.loads(text, overrides=overrides), folder, workers=0)
        policies = [*folder.glob("policies/*.safetensors"), *folder.glob("policies/*/*.safetensors")]
        files = [*policies, *folder.glob("checkpoints/*/shared.safetensors")]
        names = {file: file.relative_to(folder).as_posix() for file in files}
        arrays = {f"{names[file]} {name}": array for file in files for name, array in load_file(file).items()}
    assert len(arrays) > len(result.clients)
    assert all(np.isfinite(array).all() for name, array in arrays.items() if EVIDENCE not in name)
    returns = {name: str((client.before, client.after, client.sampled)) for name, client in result.clients.items()}
    return {name: array.tobytes() for name, array in arrays.items()} | {
        "returns": str((returns, result.rounds, result.status)).encode()
    }


def changed(case: str) -> list[str]:
    """List the overrides of a case with other values of the keys that rest."""
    base, changes = CASES[case]
    return [*base, *(f"{key}={value}" for key, value in changes.items())]


@pytest.mark.parametrize("case", CASES)
def test_a_key_without_effect_changes_no_bit_of_a_run(case: str):
    base, changes = CASES[case]
    given = [_path(key) for key in changes]
    scenario = Scenario.loads(SMALL, overrides=changed(case))
    assert {unused.key for unused in unused_keys(scenario, given)} == set(given)
    assert outcome(SMALL, *changed(case)) == outcome(SMALL, *base)


LANGUAGE_CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "a model in place of a network": (
        [],
        {
            "policy.kind": "cnn",
            "policy.encoder": "impala",
            "policy.memory": "gru",
            "policy.units": "9",
            "policy.hidden": "[9]",
            "policy.activation": "relu",
            "policy.torso": "shared",
            "policy.squash": "true",
            "policy.log_std": "1.0",
            "policy.orthogonal": "false",
            "rollout.episode_limit": "1",
            "rollout.reward_scale": "2.0",
            "rollout.reward_clip": "0.5",
            "rollout.horizon": "3",
            "evaluate.step_limit": "1",
            "objective.gamma": "0.5",
            "objective.gae_lambda": "0.1",
            "objective.value_coefficient": "2.0",
            "objective.value_clip": "0.01",
            "objective.entropy_groups": "{ a = [0] }",
            "normalise.clip": "0.1",
            "trust.estimate": "sampled",
            "clients.0.held_out": "0.5",
            "group.redraws": "9",
        },
    ),
    "weights of components": (["objective.entropy=0.1"], {"objective.entropy_groups": "{ a = [0] }"}),
    "adapters that begin with zeros": (["policy.shared=[]", "proximity.mode=off"], {"policy.same_start": "false"}),
    "nothing penalised": (
        ["trust.blocks={ 'layers.0' = 1e-4 }"],
        {"trust.estimate": "weighted", "trust.reference": "start"},
    ),
    "prompts for evaluation": (
        ["clients.0.eval_prompts=grpo_fed.tasks.letters:greatest"],
        {"clients.0.held_out": "0.0"},
    ),
}
"""The same for clients with prompts alone."""


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_a_key_without_effect_changes_no_bit_of_a_run_with_prompts(case: str):
    base, changes = LANGUAGE_CASES[case]
    base = [*base, "language.show=0", "evaluate.episodes=2"]
    overrides = [*base, *(f"{key}={value}" for key, value in changes.items())]
    given = [_path(key) for key in changes]
    scenario = Scenario.loads(WORDS, overrides=overrides)
    assert {unused.key for unused in unused_keys(scenario, given)} == set(given)
    assert outcome(WORDS, *overrides) == outcome(WORDS, *base)


def test_keys_of_clients_with_prompts_have_an_effect_beside_other_values():
    """Where a row does not hold, its key changes the run."""
    for base, key in (
        (["language.learn=AB", "policy.shared=['*.B']"], "policy.same_start=false"),
        (
            ["trust.region=penalty", "trust.reference=start", "trust.direction=new-old", "steps=16"],
            "trust.estimate=sampled",
        ),
    ):
        base = [*base, "language.show=0", "evaluate.episodes=2"]
        scenario = Scenario.loads(WORDS, overrides=[*base, key])
        assert not list(unused_keys(scenario, [_path(key.partition("=")[0])]))
        assert outcome(WORDS, *base, key) != outcome(WORDS, *base)


def test_policies_that_share_all_blocks_start_alike_whatever_same_start_is():
    overrides = ["policy.shared=['*']", "merge.rule=mean"]
    assert not FederationSetup.of(Scenario.loads(SMALL, overrides=overrides)).task_facts.private_blocks
    assert outcome(SMALL, *overrides, "policy.same_start=false") == outcome(SMALL, *overrides)


def test_squash_and_log_std_change_no_bit_of_discrete_actions():
    assert not FederationSetup.of(Scenario.loads(POLES)).task_facts.box_actions
    assert outcome(POLES, "policy.squash=true", "policy.log_std=1.0") == outcome(POLES)


def test_every_row_of_the_table_is_tested_with_each_of_its_keys():
    tested: set[tuple[str, str]] = set()
    for case, (_, changes) in CASES.items():
        scenario = Scenario.loads(SMALL, overrides=changed(case))
        rows = [row for row in ROWS if row.holds(scenario, None)]
        tested |= {(row.reason, key.replace("clients.0.", "clients.")) for row in rows for key in changes}
    assert {(row.reason, key) for row in ROWS for key in row.keys if row.task_condition is None} <= tested
    with_prompts = {key.replace("clients.0.", "clients.") for _, changes in LANGUAGE_CASES.values() for key in changes}
    rows = (*WITH_PROMPTS_ALONE, *PROMPTS_UNUSED)
    assert {key for row in rows for key in row.keys} - {"objective.entropy_weights"} <= with_prompts


def _path(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))
