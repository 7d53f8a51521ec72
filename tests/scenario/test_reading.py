"""From TOML to a scenario: every mistake is reported at once, with its place, its value and a cure."""

from __future__ import annotations

import pickle  # noqa: TID251
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.source import ScenarioError

MINIMAL = """\
name = "poles"
[[clients]]
name = "cart"
env = "CartPole-v1"
"""


GROUP_KINDS = '"block" "tensor" "row" "column" "learned"'


def error_lines(text: str, *overrides: str) -> list[str]:
    """List the lines of the error that a text causes."""
    with pytest.raises(ScenarioError) as caught:
        Scenario.loads(text, "poles.toml", overrides)
    return str(caught.value).splitlines()


def test_a_name_and_a_client_are_enough():
    scenario = Scenario.loads(MINIMAL)
    assert scenario.name == "poles"
    assert scenario.clients[0].names == ("cart",)


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file():
    text = """\
name = "p/les"
rounds = "3"
stepz = 4

[objective]
clp = 0.3
clip = -1
surrogate = "rato"
epochs = 2.5

[policy]
hidden = [
  64,
  0,
]
squash = 1
seed = 3

[[clients]]
name = "cart"
kwargs = { length = 0.5, render_mode = "human" }

[[clients]]
name = 7
env = "Cart Pole"
count = 0
"""
    assert error_lines(text) == [
        'poles.toml:1: name = "p/les": must be letters, digits and _ . - only, a letter or digit first: it names files',
        'poles.toml:2: rounds = "3": must be a whole number: 3, without quotes',
        "poles.toml:3: stepz = 4: unknown key; did you mean steps?",
        "poles.toml:6: objective.clp = 0.3: unknown key; did you mean clip?",
        "poles.toml:7: objective.clip = -1: must be greater than 0",
        'poles.toml:8: objective.surrogate = "rato": must be one of "score" "ratio" "clip"; did you mean "ratio"?',
        "poles.toml:9: objective.epochs = 2.5: must be a whole number",
        "poles.toml:14: policy.hidden.1 = 0: must be greater than 0",
        "poles.toml:16: policy.squash = 1: must be true or false",
        "poles.toml:17: policy.seed = 3: unknown key; seed belongs at the top of the file, above the first [section]",
        'poles.toml:19: clients.cart: needs env, such as "CartPole-v1", or prompts, such as "questions.jsonl"',
        'poles.toml:21: clients.cart.kwargs.render_mode = "human": slows training down; `grpo-fed play` shows episodes',
        'poles.toml:24: clients.1.name = 7: must be text in quotes: "7"',
        'poles.toml:25: clients.1.env = "Cart Pole": must be a gymnasium id, such as "CartPole-v1", or "module:EnvId"',
        "poles.toml:26: clients.1.count = 0: must be greater than 0",
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("objective.horizon = 3", "objective.horizon = 3: unknown key; did you mean rollout.horizon?"),
        ("objektive = { clip = 0.3 }", "objektive: unknown key; did you mean objective?"),
        (
            "evaluate.zzz = 1",
            "evaluate.zzz = 1: unknown key; known here: episodes every step_limit adapt twins",
        ),
        ("objective.clip = true", "objective.clip = true: must be a number"),
        ("objective.clip = nan", "objective.clip = nan: must be a finite number"),
        ("objective.clip = inf", "objective.clip = inf: must be a finite number"),
        ("objective.clip = '0.3'", 'objective.clip = "0.3": must be a number: 0.3, without quotes'),
        ("policy.squash = 'true'", 'policy.squash = "true": must be true or false: true, without quotes'),
        ("policy.hidden = 64", "policy.hidden = 64: must be a list: [64]"),
        ("policy = 64", "policy = 64: must be a table: { key = value, ... }"),
        ("policy.log_std = 6", "policy.log_std = 6: must be 5 or less"),
        ("seed = 2147483648", "seed = 2147483648: must be less than 2147483648"),
        ("group.size = 1", "group.size = 1: must be 2 or more"),
        ("device = 'gpu'", 'device = "gpu": must be "auto", "cpu", "cuda" or "cuda:0" with a number'),
        ("policy.module = 'nets.MyPolicy'", 'policy.module = "nets.MyPolicy": must be "package.module:Name"'),
        ("policy.shared = ['']", 'policy.shared.0 = "": must be a pattern such as "torso.*"'),
        (
            "policy.groups.actor = 'rows'",
            f'policy.groups.actor = "rows": must be one of {GROUP_KINDS}; did you mean "row"?',
        ),
        (
            "policy.groups.actor = 3",
            f"policy.groups.actor = 3: must be one of {GROUP_KINDS}, or a table of index sets",
        ),
        (
            "policy.groups.'torso.*' = { lidar = { 'torso.0.weight:columns' = [-1] } }",
            'policy.groups."torso.*".lidar."torso.0.weight:columns".0 = -1: must be 0 or more',
        ),
        ("penalty.weight = -0.5", "penalty.weight = -0.5: must be 0 or more"),
        ("trust.blocks = { actor = 0 }", "trust.blocks.actor = 0: must be greater than 0"),
    ],
)
def test_an_invalid_line_is_explained_in_plain_words(line: str, error: str):
    assert error_lines(f"{line}\n{MINIMAL}") == [f"poles.toml:1: {error}"]


def test_a_single_clients_table_needs_two_brackets():
    assert error_lines('name = "poles"\n[clients]\nname = "cart"\nenv = "CartPole-v1"') == [
        "poles.toml:2: clients: must be a list of tables: [[clients]], in two brackets"
    ]


def test_the_error_for_an_empty_file_lists_the_required_keys():
    assert error_lines("") == [
        'poles.toml:1: name: missing; for example name = "poles"',
        'poles.toml:1: clients: missing; for example clients = [{ name = "cart", env = "CartPole-v1" }]',
    ]


def test_contradictions_are_reported_together_with_invalid_keys():
    text = f"steps = 10\n{MINIMAL}[objective]\nlearning_rate = 0\nclip_high = 0.3\nsurrogate = 'ratio'\n"
    assert error_lines(text) == [
        "poles.toml:1: steps = 10 must be enough for one update: rollout.num_envs x horizon = 1024",
        "poles.toml:7: objective.learning_rate = 0: must be greater than 0",
        'poles.toml:8: objective.clip_high = 0.3: needs objective.surrogate = "clip"; it is "ratio"',
    ]


@pytest.mark.parametrize(
    "wrong", ["[rollout]\nnum_envs = 0", "[rollout]\nnum_envz = 1", "[objective]\npreset = 'gpo'", "rollout = 1"]
)
def test_a_contradiction_that_involves_an_invalid_key_is_not_reported(wrong: str):
    text = f"steps = 10\n{wrong}\n{MINIMAL}" if "rollout = 1" in wrong else f"steps = 10\n{MINIMAL}{wrong}\n"
    assert len(error_lines(text)) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("\nenv = X-0 # c", '2: env = X-0 # c: not TOML: invalid value at column 7; text needs quotes: "X-0"'),
        ("squash = True", "1: squash = True: not TOML: invalid value at column 10; write true"),
        ("a = 1\na = 2\n", "2: a = 2: not TOML: cannot overwrite a value at column 6; it is in the file twice"),
        ("[a]\n[b]\n[a]\n", "3: [a]: not TOML: cannot declare ('a',) twice at column 3; it is in the file twice"),
        ("b = [1", "1: b = [1: not TOML: unclosed array at the end of the file; is a quote or bracket left open?"),
        ('a = "\nb = 1', "1: a = \": not TOML: illegal character '\\n' at column 6; is a quote or bracket left open?"),
        ("a = 1\n\nb 3", "3: b 3: not TOML: expected '=' after a key in a key/value pair at column 3"),
        ("a =", "1: a =: not TOML: invalid value at the end of the file"),
    ],
)
def test_a_syntax_error_has_the_same_form(text: str, error: str):
    assert error_lines(text) == [f"poles.toml:{error}"]


def test_unreadable_files_raise_scenario_errors(tmp_path: Path):
    (tmp_path / "poles.toml").write_text(MINIMAL)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xf8"')
    with pytest.raises(ScenarioError, match=r"pole\.toml: there is no such file; did you mean .*poles\.toml\?"):
        Scenario.load(tmp_path / "pole.toml")
    with pytest.raises(ScenarioError, match=r"there is no such file$"):
        Scenario.load(tmp_path / "nowhere" / "poles.toml")
    with pytest.raises(ScenarioError, match=r"latin\.toml: must be text in UTF-8; byte 8 is not"):
        Scenario.load(tmp_path / "latin.toml")
    with pytest.raises(ScenarioError, match="cannot be read"):
        Scenario.load(tmp_path)


def test_errors_name_the_path_as_given_and_byte_order_marks_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("poles.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert Scenario.load("poles.toml") == Scenario.loads(MINIMAL)
    Path("poles.toml").write_text(f"rounds = 0\n{MINIMAL}")
    with pytest.raises(ScenarioError, match=r"^poles\.toml:1: rounds = 0: must be greater than 0$"):
        Scenario.load("poles.toml")


def test_the_error_is_a_value_error_that_can_be_pickled():
    with pytest.raises(ValueError, match="missing") as caught:
        Scenario.loads("", "poles.toml")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


# --set KEY=VALUE ------------------------------------------------------------------------------------------------------


TWO = f'{MINIMAL}kwargs = {{ length = 0.5 }}\n[[clients]]\nname = "backwards"\nenv = "CartPole-v1"\n'


def test_overrides_replace_values_of_the_file():
    scenario = Scenario.loads(
        TWO,
        overrides=[
            "objective.clip=0.3",
            "clients.0.env=grpo_fed/CartPole-v1",
            "clients.backwards.count = 8",
            "clients.backwards.kwargs.swap_actions=true",
            "clients.cart.kwargs = { length = 0.1 }",
            'trust.blocks."torso.*"=0.01',
            "policy.hidden=[32]",
            "policy.hidden.0=16",
            "description=a bare word, or several",
            "objective.max_grad_norm=inf",
            "rounds=3",
            "rounds=4",
        ],
    )
    assert scenario.objective.clip == 0.3
    assert [client.env for client in scenario.clients] == ["grpo_fed/CartPole-v1", "CartPole-v1"]
    assert scenario.clients[1].count == 8
    assert scenario.clients[1].kwargs == {"swap_actions": True}
    assert scenario.clients[0].kwargs == {"length": 0.1}
    assert scenario.trust.blocks == {"torso.*": 0.01}
    assert scenario.policy.hidden == [16]
    assert scenario.description == "a bare word, or several"
    assert scenario.objective.max_grad_norm is None
    assert scenario.rounds == 4


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("objective.clp=0.3", "unknown key; did you mean clip?"),
        ("objective.clip=-1", "must be greater than 0"),
        ("objective.clip=0,3", "must be a number"),
        ("objektive.clip=0.3", "objektive: unknown key; did you mean objective?"),
        ("policy.hidden=[64, 0]", "policy.hidden.1: must be greater than 0"),
        ("rounds", "must be KEY=VALUE, such as objective.clip=0.3"),
        ("=3", "'' is not a key"),
        ("policy.hidden=[64", "the value is not TOML; is a quote or bracket missing, or did the shell remove it?"),
        ("name.x=3", 'name is "poles", not a table'),
        ("clients.crat.count=3", "clients has no item called crat; did you mean cart?"),
        ("clients.2.count=3", "clients has no item 2: it has 2, counted from 0"),
        (
            "clients.0.name=backwards",
            "another client is called backwards, by its name or count; names must differ",
        ),
        ("seed=1\nrounds = 3", "must be a whole number"),
    ],
)
def test_an_invalid_override_is_quoted_in_the_error(override: str, error: str):
    (line,) = error_lines(TWO, override)
    if "another client" in error:  # reported at the later of the two
        assert line == f'poles.toml:7: clients.1.name = "backwards": {error}'
    else:
        assert line == f"--set {override}: {error}".replace("\n", "\\n")


def test_a_mistake_in_an_override_is_reported_instead_of_the_replaced_line():
    text = f"{MINIMAL}[objective]\nclip = -1\n[policy]\nhidden = [0]\n"
    assert error_lines(text, "objective={ clip = -2 }", "policy.hidden=[-3]") == [
        "--set objective={ clip = -2 }: objective.clip: must be greater than 0",
        "--set policy.hidden=[-3]: policy.hidden.0: must be greater than 0",
    ]


def test_mistakes_in_file_and_overrides_are_reported_together():
    assert error_lines(f"rounds = 0\n{MINIMAL}", "seed=-1", "nonsense", "steps=1.5") == [
        "--set nonsense: must be KEY=VALUE, such as objective.clip=0.3",
        "poles.toml:1: rounds = 0: must be greater than 0",
        "--set seed=-1: must be 0 or more",
        "--set steps=1.5: must be a whole number",
    ]


def test_clients_with_equal_names_are_identified_by_index():
    assert error_lines(f'{MINIMAL}[[clients]]\nname = "cart"\nenv = "X-v0"', "clients.cart.count=2") == [
        "--set clients.cart.count=2: clients has 2 items called cart; use an index, counted from 0",
        'poles.toml:6: clients.1.name = "cart": another client is called cart, by its name or count; names must differ',
    ]


NAMES = sorted({str(part) for path, _ in all_keys(Scenario) for part in path})
ANY_VALUE = st.recursive(
    st.integers(-3, 3) | st.floats() | st.booleans() | st.dates() | st.sampled_from(["", "clip", "group", "grpo", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(NAMES), ANY_VALUE, max_size=5),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
)
def test_any_toml_gives_a_scenario_or_a_scenario_error(data: dict[str, Any], key: list[str]):
    message = ""
    try:
        Scenario.loads(tomli_w.dumps(data), "x.toml", [f"{'.'.join(key)}=0"])
    except ScenarioError as error:
        message = str(error)
    assert all(line.startswith(("x.toml:", "--set ")) for line in message.splitlines())


# Files that are no scenarios -----------------------------------------------------------------------------------------

CLIENT = '[[clients]]\nname = "c"\nenv = "grpo_fed/CartPole-v1"\n'


@pytest.mark.parametrize("depth", [60, 500, 50_000])
@pytest.mark.parametrize("text", ["kwargs = {{ a = {0}{1} }}", "{2} = 1"])
def test_deep_nesting_is_a_mistake(depth: int, text: str):
    text = text.format("[" * depth, "]" * depth, ".".join("a" * min(depth, 5000)))
    with pytest.raises(ScenarioError, match="nested more than 50 deep"):
        Scenario.loads(f'name = "a"\n{CLIENT}{text}\n')


@pytest.mark.parametrize("depth", [60, 500, 50_000])
@pytest.mark.parametrize("override", ["clients.c.kwargs={{ a = {0}{1} }}", "clients.c.kwargs.{2}=1"])
def test_deep_nesting_in_an_override_is_a_mistake(depth: int, override: str):
    override = override.format("[" * depth, "]" * depth, ".".join("a" * min(depth, 5000)))
    with pytest.raises(ScenarioError, match="nested more than 50 deep"):
        Scenario.loads(f'name = "a"\n{CLIENT}', overrides=[override])


def test_many_mistakes_are_counted_in_seconds():
    text = "".join(f"key_{number} = 1\n" for number in range(50_000))
    began = time.monotonic()
    with pytest.raises(ScenarioError) as error:
        Scenario.loads(f'name = "a"\n{text}{CLIENT}')
    assert time.monotonic() - began < 30, "it takes 2 s on an idle core; to explain each took minutes"
    *lines, last = str(error.value).splitlines()
    assert len(lines) == 100
    assert lines[0].startswith("scenario:2: key_0 = 1: unknown key")
    assert last == "scenario: has 49,900 more mistakes"


def test_a_million_clients_are_a_mistake_before_any_is_named():
    with pytest.raises(
        ScenarioError, match=r"scenario:5: clients.c.count = 1000000: 1,000,000 clients in all; .*100,000"
    ):
        Scenario.loads(f'name = "a"\n{CLIENT}count = 1_000_000')
    assert len(Scenario.loads(f'name = "a"\n{CLIENT}count = 100_000').clients[0].names) == 100_000
