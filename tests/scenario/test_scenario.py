"""The scenario: contradictions are refused, and a valid scenario goes to TOML and back."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings, ObjectiveSettings, TrustSettings
from grpo_fed.scenario.toml.source import ScenarioError

ROOT = Path(__file__).parents[2]
CARTPOLE = 'name = "x"\nclients = [{ name = "cart", env = "CartPole-v1" }]\n'
SCENARIOS = sorted((ROOT / "scenarios").glob("*.toml"))


def error_lines(text: str, *overrides: str) -> list[str]:
    """List the lines of the error that a text causes, without the file's name."""
    with pytest.raises(ScenarioError) as caught:
        Scenario.loads(text, "x.toml", overrides)
    return [line.removeprefix("x.toml:") for line in str(caught.value).splitlines()]


def make_scenario(**sections: Any) -> Scenario:
    """Make a scenario of one CartPole client and the given sections."""
    return Scenario(**{"name": "x", "clients": [{"name": "cart", "env": "CartPole-v1"}], **sections})


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_that_ships_loads_and_has_a_description(path: Path):
    loaded = Scenario.load(path)
    text = path.read_text()
    assert loaded.name == path.stem
    assert loaded.description
    assert text.startswith("#:schema ./scenario.schema.json\n# ")
    assert Scenario.loads(loaded.dumps()) == loaded


def test_the_introductory_scenarios_ship():
    assert {path.stem for path in SCENARIOS} >= {"cartpole", "poles", "group-relative", "goals", "tabular", "lunar"}


def test_each_pole_has_15360_steps_and_its_own_length():
    poles = Scenario.load(ROOT / "scenarios" / "poles.toml")
    assert poles.rounds * poles.steps == 15_360
    (pole,) = poles.clients
    assert pole.names == ("pole-0", "pole-1", "pole-2", "pole-3", "pole-4", "pole-5")
    assert pole.spread == {"length": [0.1, 0.9]}


def test_reading_a_scenario_imports_neither_torch_nor_numpy_nor_gymnasium():
    code = (
        "import sys, grpo_fed.scenario.scenario, grpo_fed.scenario.reference\n"
        f"grpo_fed.scenario.scenario.Scenario.load({str(SCENARIOS[0])!r}).dumps()\n"
        "sys.exit(' '.join({'torch', 'numpy', 'gymnasium', 'flwr', 'mlflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Values ---------------------------------------------------------------------------------------------------------------


def test_no_limit_is_inf_in_toml_and_none_in_python():
    loaded = Scenario.loads(f"{CARTPOLE}[objective]\nmax_grad_norm = inf\n[trust]\nstop = 0.02\n")
    assert loaded.objective.max_grad_norm is None
    assert loaded.objective.value_clip is None
    assert loaded.trust.stop == 0.02
    assert "max_grad_norm = inf\n" in loaded.dumps()
    assert make_scenario(objective={"max_grad_norm": inf}) == make_scenario(objective={"max_grad_norm": None})


@pytest.mark.parametrize(
    "change", ["policy.hidden=[1000000000]", "clients.cart.count=100000000", "rollout.num_envs=10000000"]
)
def test_a_count_that_would_fill_the_memory_is_refused(change: str):
    with pytest.raises(ValueError, match=r"must be (65536|1000000) or less"):
        Scenario.loads(CARTPOLE, overrides=[change])


def test_a_whole_number_is_accepted_as_a_number():
    clip = Scenario.loads(f"{CARTPOLE}[objective]\nclip = 1\n").objective.clip
    assert clip == 1.0
    assert isinstance(clip, float)


def test_names_of_several_clients_count_from_zero():
    assert ClientSettings(name="cart", env="X-v0").names == ("cart",)
    assert ClientSettings(name="cart", env="X-v0", count=3).names == ("cart-0", "cart-1", "cart-2")


def test_arguments_must_be_values_that_toml_can_represent():
    arguments = {"goal": (np.float64(0.5), 1), "deep": [{"a b": True}], "day": date(2024, 2, 29), "far": -inf}
    made = make_scenario(clients=[{"name": "a", "env": "X-v0", "kwargs": arguments}])
    assert made.clients[0].kwargs == {"goal": [0.5, 1], "deep": [{"a b": True}], "day": date(2024, 2, 29), "far": -inf}
    assert type(made.clients[0].kwargs["goal"][0]) is float
    assert Scenario.loads(made.dumps()) == made
    for bad in (None, nan, np.int64(3), {1: 2}, object()):
        with pytest.raises(ValidationError, match=r"deep\.0 must be text, a number, true or false, a list or a table"):
            make_scenario(clients=[{"name": "a", "env": "X-v0", "kwargs": {"deep": [bad]}}])


def test_a_scenario_made_in_python_is_as_complete_as_one_from_a_file():
    made = make_scenario(objective=ObjectiveSettings(preset="grpo", clip=0.1), trust=TrustSettings(coefficient=0.5))
    read = Scenario.loads(f'{CARTPOLE}objective = {{ preset = "grpo", clip = 0.1 }}\ntrust = {{ coefficient = 0.5 }}')
    assert made == read
    assert (made.objective.advantage, made.objective.clip, made.trust.coefficient) == ("group", 0.1, 0.5)


def test_contradictions_in_a_scenario_made_in_python_name_the_key():
    with pytest.raises(
        ValidationError, match=r'trust\.region: trust\.region = "hard" needs objective\.step = "natural"'
    ):
        make_scenario(trust={"region": "hard"})
    with pytest.raises(ValidationError, match=r"clip_high: needs .*; penalty\.l1: needs"):
        make_scenario(objective={"surrogate": "ratio", "clip_high": 0.3}, penalty={"l1": 0.1})


def test_a_scenario_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        make_scenario().objective.clip = 0.3  # type: ignore[misc]


# Contradictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            "objective.clip_high = 0.3\nobjective.surrogate = 'ratio'",
            'objective.clip_high = 0.3: needs objective.surrogate = "clip"; it is "ratio"',
        ),
        (
            "objective.clip_schedule = 'linear'\nobjective.surrogate = 'score'",
            'objective.clip_schedule = "linear": needs objective.surrogate = "clip"; it is "score"',
        ),
        (
            "objective.entropy_weights = { arm = 0.1 }",
            "objective.entropy_weights.arm = 0.1: objective.entropy_groups has no arm; it has none",
        ),
        (
            "objective.entropy_groups = { leg = [0] }\nobjective.entropy_weights = { arm = 0.1 }",
            "objective.entropy_weights.arm = 0.1: objective.entropy_groups has no arm; it has leg",
        ),
        (
            "objective.entropy_groups = { leg = [0] }\nobjective.entropy_target = { arm = 0.1 }",
            "objective.entropy_target.arm = 0.1: objective.entropy_groups has no arm; it has leg",
        ),
        (
            "objective.entropy_target = {}",
            "objective.entropy_target: gives no set of objective.entropy_groups a target; leave it out",
        ),
        (
            "objective.entropy = -0.1\nobjective.entropy_target = 1",
            "objective.entropy = -0.1: is the weight that objective.entropy_target begins with; it must be 0 or more",
        ),
        (
            "objective.entropy_groups = { leg = [0, 1], arm = [1] }",
            "objective.entropy_groups.arm = [1]: component 1 is also in leg; groups must not overlap",
        ),
        (
            "objective.entropy_groups = { leg = [0, 0] }",
            "objective.entropy_groups.leg = [0, 0]: component 0 is listed twice; groups must not overlap",
        ),
        (
            "objective.entropy_groups = { leg = [] }",
            "objective.entropy_groups.leg = []: must have 1 or more items; has 0",
        ),
        (
            "rollout.horizon = 1000",
            "rollout.horizon = 1000: steps = 2048 must be enough for one update: rollout.num_envs x horizon = 8000",
        ),
        (
            "steps = 1023",
            "steps = 1023 must be enough for one update: rollout.num_envs x horizon = 1024",
        ),
        (
            "objective.minibatches = 1025",
            "1025 must not be more than the steps of an update: rollout.num_envs x horizon = 1024",
        ),
        (
            "objective.minibatches = 513",
            "advantages normalised by minibatch need 2 steps or more in each: at most 512 minibatches",
        ),
        (
            "rollout = { num_envs = 1, horizon = 1 }\nobjective = { minibatches = 1, normalise_advantages = 'batch' }",
            "normalised advantages need 2 steps or more; rollout.num_envs x horizon = 1",
        ),
        (
            "objective.preset = 'grpo'\nrollout.num_envs = 20",
            "rollout.num_envs = 20 must be a multiple of group.size = 8; use 16",
        ),
        (
            "objective.preset = 'grpo'\ngroup.size = 16",
            "group.size = 16: rollout.num_envs = 8 must be a multiple of group.size = 16; use 16",
        ),
        (
            "objective.preset = 'rloo'\ngroup.by = 'task'\nrollout.num_envs = 1",
            "a single episode has no other to be compared with: rollout.num_envs must be 2 or more",
        ),
        (
            "objective.preset = 'rloo'\ngroup = { by = 'similarity', clusters = 5 }",
            "group.clusters = 5 leaves some of 8 episodes (rollout.num_envs) alone in their group; use at most 4",
        ),
        ("group.by = 'context'", 'group.by = "context" needs group.key, a key of info'),
        ("group.key = 'seed'", 'group.key = "seed": needs group.by = "context"; it is "start"'),
        (
            "trust.region = 'hard'",
            'trust.region = "hard" needs objective.step = "natural"; it is "adam"',
        ),
        (
            "objective.preset = 'trpo'\nobjective.step = 'adam'",
            'objective.step = "adam": trust.region = "hard" needs objective.step = "natural"; it is "adam"',
        ),
        (
            "objective.preset = 'ppo-kl'\nobjective.step = 'natural'",
            'objective.step = "natural": trust.region = "adaptive" has no effect on a natural step',
        ),
        (
            "objective.preset = 'npg'\ntrust.reference = 'shared'",
            'trust.region = "hard" limits the KL from the old policy: use trust.reference = "old"',
        ),
        (
            "trust.region = 'adaptive'\ntrust.coefficient = 0",
            'trust.region = "adaptive" doubles and halves trust.coefficient, which must start above 0',
        ),
        (
            "objective.preset = 'trpo'\ntrust.stop = 0.02",
            "trust.stop = 0.02: ends Adam's passes early, and a natural step has no such passes",
        ),
        ("trust.adaptive_target = true", 'trust.adaptive_target = true: needs trust.region = "hard"; it is "none"'),
        ("penalty.l1 = 0.1", 'penalty.l1 = 0.1: needs penalty.kind = "sparse-group"; it is "group"'),
        ("penalty.outer = 0.1", 'penalty.outer = 0.1: needs penalty.kind = "nested"; it is "group"'),
        (
            "policy = { module = 'a:B', adapter = 4 }",
            "policy.adapter = 4: a module of your own has its own first layer; leave policy.adapter out",
        ),
        ("policy.kwargs = { a = 1 }", "policy.kwargs: these are arguments for policy.module, which is not given"),
        (
            "policy.groups.'*' = { a = { 'w:rows' = [0, 1] }, b = { 'w:columns' = [1], 'w:rows' = [1] } }",
            'policy.groups."*".b."w:rows" = [1]: 1 is also in a; sets must not overlap',
        ),
        (
            "policy.groups.'*' = { a = { 'w:rows' = [3, 3] } }",
            'policy.groups."*".a."w:rows" = [3, 3]: 3 is listed twice; sets must not overlap',
        ),
        (
            "policy.groups.'*' = { a = { 'w:row' = [3] } }",
            'policy.groups."*".a."w:row" = [3]: must be "PARAMETER:rows", "PARAMETER:columns" or "PARAMETER:entries"',
        ),
    ],
)
def test_a_contradiction_is_reported_at_a_key_that_the_user_wrote(settings: str, error: str):
    (line,) = error_lines(f"{settings}\n{CARTPOLE}")
    assert error in line.partition(": ")[2]


@pytest.mark.parametrize(
    ("clients", "error"),
    [
        (
            '{ name = "a", env = "X-v0" }, { name = "A", env = "X-v0" }',
            'clients.A.name = "A": another client is called A, by its name or count; names must differ',
        ),
        (
            '{ name = "a", env = "X-v0", count = 2 }, { name = "a-1", env = "X-v0" }',
            'clients.a-1.name = "a-1": another client is called a-1, by its name or count; names must differ',
        ),
        (
            '{ name = "a/b", env = "X-v0" }',
            '"a/b": must be letters, digits and _ . - only, a letter or digit first: it names files',
        ),
        (
            '{ name = "..", env = "X-v0" }',
            'clients."..".name = "..": must be letters, digits and _ . - only, a letter or digit first: it names files',
        ),
        (
            '{ name = "a", env = "X-v0", spread = { length = [0.1, 0.9] } }',
            "clients.a.spread: gives each of several clients another value, so count must be 2 or more",
        ),
        (
            '{ name = "a", env = "X-v0", count = 2, spread = { length = [0.1, 0.9] }, kwargs = { length = 1.0 } }',
            "clients.a.spread.length = [0.1, 0.9]: is in both spread and kwargs; use one of them",
        ),
        (
            '{ name = "a", env = "X-v0", count = 2, spread = { length = [0.1, 0.5, 0.9] } }',
            "clients.a.spread.length = [0.1, 0.5, 0.9]: must have 2 items; has 3",
        ),
        ('{ name = "a", env = "X-v0", penalty = -0.1 }', "clients.a.penalty = -0.1: must be 0 or more"),
        (
            '{ name = "a", env = "X-v0", wrappers = ["gym.Wrapper"] }',
            'clients.a.wrappers.0 = "gym.Wrapper": must be "package.module:Name"',
        ),
        (
            '{ name = "a", env = "X-v0", wrappers = [{ path = "gym.Wrapper" }] }',
            'clients.a.wrappers.0.path = "gym.Wrapper": must be "package.module:Name"',
        ),
        (
            '{ name = "a", env = "X-v0", wrappers = [{ path = "m:W", args = {} }] }',
            "clients.a.wrappers.0.args: unknown key; remove it",
        ),
        (
            '{ name = "a", env = "X-v0", wrappers = [3] }',
            'clients.a.wrappers.0 = 3: must be "module:Wrapper", or a table { path = "module:Wrapper", kwargs = {} }',
        ),
    ],
)
def test_a_mistake_in_a_client_names_the_client(clients: str, error: str):
    (line,) = error_lines(f'name = "x"\nclients = [{clients}]')
    assert line.startswith("2: clients.")
    assert error in line


def test_a_key_without_effect_may_be_set():
    unused = [
        "group.size=3",
        "trust.coefficient=2",
        "trust.target=0.1",
        "trust.reference=shared",
        "trust.direction=new-old",
    ]
    unused += ["objective.value_epochs=3", "penalty.kind=nested", "trust.line_search=false"]
    assert Scenario.loads(CARTPOLE, overrides=unused).group.size == 3


def test_a_contradiction_is_reported_at_the_first_key_in_the_file():
    message = "rollout.num_envs = 7 must be a multiple of group.size = 8; use 8"
    assert error_lines(f"{CARTPOLE}rollout.num_envs = 7\nobjective.preset = 'grpo'") == [f"3: {message}"]
    (line,) = error_lines(f"{CARTPOLE}objective.preset = 'a2c'\nobjective.minibatches = 99")
    assert line.startswith("4: objective.minibatches = 99 must not be more than")
    (line,) = error_lines(f"{CARTPOLE}objective.preset = 'ppo'\nrollout.horizon = 1")
    assert line.startswith("4: rollout.horizon = 1: objective.minibatches = 16 must not be more than")
    assert error_lines(f"steps = 30\n{CARTPOLE}objective.preset = 'a2c'")[0].startswith(
        "1: steps = 30 must be enough for one update"
    )


# To TOML and back -----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
POSITIVE = st.floats(1e-6, 1e6)
LIMIT = POSITIVE | st.none()
NAMES = st.from_regex("[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
PATTERNS = st.sampled_from(["*", "torso.*", "actor", "critic", "torso.[01]", 'a"b'])
ARGUMENTS = st.dictionaries(
    TEXT,
    st.recursive(
        st.integers() | st.booleans() | st.floats(allow_nan=False) | TEXT | st.dates() | st.datetimes(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def table(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Generate tables with some of these keys."""
    return st.fixed_dictionaries({}, optional=keys)


SECTIONS = {
    "description": TEXT,
    "rounds": st.integers(1, 99),
    "seed": st.integers(0, 2**31 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "policy": table(
        hidden=st.lists(st.integers(1, 99), max_size=3),
        activation=st.sampled_from(["tanh", "relu"]),
        squash=st.booleans(),
        log_std=st.floats(-20, 5),
        blocks=st.dictionaries(TEXT, st.lists(PATTERNS, min_size=1, max_size=2), max_size=2),
        groups=st.dictionaries(
            PATTERNS,
            st.sampled_from(["block", "row"]) | st.just({"lidar": {"w:rows": [0, 2]}, "": {}}),
            max_size=2,
        ),
        shared=st.lists(PATTERNS, max_size=3),
    ),
    "rollout": table(num_envs=st.sampled_from([8, 16, 64]), horizon=st.integers(32, 999), episode_limit=st.just(9)),
    "normalise": table(observations=st.booleans(), clip=POSITIVE),
    "objective": table(
        preset=st.sampled_from(list(PRESETS)),
        gamma=st.floats(0, 1),
        learning_rate=POSITIVE,
        minibatches=st.integers(1, 20),
        value_clip=LIMIT,
        max_grad_norm=LIMIT,
        entropy=st.floats(-1, 1),
        entropy_groups=st.just({"arm": [0, 1], "the leg": [2]}),
    ),
    "group": table(
        size=st.sampled_from([2, 4, 8]), by=st.sampled_from(["start", "task", "similarity"]), clusters=st.integers(1, 4)
    ),
    "trust": table(stop=LIMIT, target=POSITIVE, blocks=st.dictionaries(PATTERNS, POSITIVE, max_size=2)),
    "penalty": table(
        weight=POSITIVE, toward=st.sampled_from(["zero", "shared"]), blocks=st.lists(PATTERNS, min_size=1, max_size=2)
    ),
    "evaluate": table(episodes=st.integers(1, 99), every=st.integers(0, 99)),
}
CLIENT = st.fixed_dictionaries(
    {"name": NAMES, "env": st.sampled_from(["CartPole-v1", "grpo_fed/CartPole-v1", "my_envs.maze:Maze-v0"])},
    optional={
        "count": st.integers(1, 3),
        "kwargs": ARGUMENTS,
        "wrappers": st.just(["my_envs:Wrapper", {"path": "my_envs:Other", "kwargs": {"width": 3}}]),
        "learning_rate": POSITIVE,
        "entropy": st.floats(-1, 1),
        "penalty": st.floats(0, 1),
    },
)
VALID = (
    st.fixed_dictionaries(
        {
            "name": NAMES,
            "steps": st.integers(2**16, 2**20),
            "clients": st.lists(CLIENT, min_size=1, max_size=3, unique_by=lambda client: client["name"].lower()[:1]),
        },
        optional=SECTIONS,
    )
    .filter(
        lambda data: (
            data.get("objective", {}).get("preset") not in ("npg", "trpo") or not data.get("trust", {}).get("stop")
        )
    )
    .filter(  # which clients with an environment cannot have
        lambda data: (
            data.get("objective", {}).get("preset") != "dapo"
            and (data.get("objective", {}).get("preset") != "gspo" or data["objective"].get("minibatches", 1) == 1)
        )
    )
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(VALID)
def test_any_scenario_goes_to_toml_and_back(data: dict[str, Any]):
    made = Scenario(**data)
    text = made.dumps()
    back = Scenario.loads(text)
    assert back == made
    assert back.dumps() == text


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(VALID)
def test_a_resolved_scenario_gives_every_value(data: dict[str, Any]):
    made = Scenario(**data)
    resolved = Scenario.loads(made.dumps())
    for section in ("policy", "rollout", "normalise", "objective", "group", "trust", "penalty", "evaluate"):
        part = getattr(resolved, section)
        missing = set(type(part).model_fields) - part.model_fields_set
        assert all(getattr(part, key) is None for key in missing)


# Invalid values and no thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["inf", "nan", "true", '"many"', "-1", "0", "[1]", "1e999"])
@pytest.mark.parametrize("key", ["steps", "objective.epochs", "objective.learning_rate", "rollout.num_envs"])
def test_an_invalid_value_is_reported_with_its_key(key: str, value: str):
    with pytest.raises(ScenarioError, match=re.escape(key)):
        Scenario.loads('name = "a"\n[[clients]]\nname = "c"\nenv = "CartPole-v1"\n', overrides=[f"{key}={value}"])


@pytest.mark.parametrize("method", ["grpo", "clusters", "fedavg"])
def test_no_method_needs_a_threshold(method: str):
    scenario = Scenario.loads(f'name = "a"\nmethod = "{method}"\n[[clients]]\nname = "c"\nenv = "CartPole-v1"\n')
    assert scenario.merge.rule != "huber"
    assert Scenario.loads(scenario.dumps()) == scenario


def test_a_threshold_of_zero_counts_as_given():
    text = 'name = "a"\nmerge = { rule = "huber", threshold = 0.0 }\n[[clients]]\nname = "c"\nenv = "CartPole-v1"\n'
    scenario = Scenario.loads(text)
    assert scenario.merge.threshold == 0.0
    assert Scenario.loads(scenario.dumps()) == scenario
