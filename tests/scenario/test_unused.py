"""Keys without effect are named where the user gave them.

tests/engines/test_unused_runs.py tests with runs that they have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from grpo_fed.scenario.curricula import CURRICULA
from grpo_fed.scenario.methods import MERGE_RULES, METHODS
from grpo_fed.scenario.presets import PRESETS
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.scenario.shipped import shipped_scenarios
from grpo_fed.scenario.template import create_project
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.scenario.unused import GivenKeys, unused_keys
from grpo_fed.scenario.unused_constraints import CONSTRAINTS_UNUSED
from grpo_fed.scenario.unused_language import LANGUAGE_UNUSED
from grpo_fed.scenario.unused_rows import TaskFacts
from grpo_fed.scenario.unused_setups import PROMPTS_UNUSED, SETUPS_UNUSED
from grpo_fed.scenario.unused_table import UNUSED
from tests.scenario.test_knobs import CHANGES, SMALL

CARTS = """\
name = "carts"
rounds = 4
[objective]
learning_rate = 1e-3
[merge]
threshold = 0.1
[[clients]]
name = "cart"
env = "CartPole-v1"
count = 3
"""

TABLE = (*UNUSED, *LANGUAGE_UNUSED, *SETUPS_UNUSED, *CONSTRAINTS_UNUSED, *PROMPTS_UNUSED)
"""All rows."""
ALWAYS_USED = {
    # the run itself
    *("name", "description", "method", "rounds", "steps", "seed", "device", "callbacks"),
    *("round.mode", "round.deadline", "round.patience", "evaluate.episodes", "checkpoint.every"),
    *("privacy.epsilon", "privacy.errors", "privacy.secure", "privacy.metrics", "newcomers.like"),
    # whatever else is given, these are part of what is learned
    *("policy.module", "policy.blocks", "policy.shared", "policy.freeze"),
    *("rollout.num_envs", "normalise.observations", "normalise.rewards"),
    *("objective.preset", "objective.advantage", "objective.surrogate", "objective.step"),
    *("objective.normalise_advantages", "objective.average", "objective.entropy_target"),
    *("objective.cost.limit", "trust.rollback"),
    *("trust.blocks", "personal.first", "personal.model", "personal.inner_rate"),
    *("clients.name", "clients.env", "clients.count", "clients.kwargs", "clients.wrappers"),
    *("clients.curriculum.kind", "clients.curriculum.ranges"),
    *("clients.trains", "clients.entropy", "clients.penalty", "clients.changes.round", "clients.changes.kwargs"),
    *("clients.prompts", "clients.eval_prompts", "clients.attack"),
    *(
        "sites.name",
        "sites.clients",
        "sites.merge",
        "sites.proximity",
    ),  # the keys in these tables are judged one by one
    *("clients.rewards.function", "clients.rewards.weight", "clients.rewards.kwargs"),
}
"""Keys that the table of unused keys need not have."""
REFUSED = {
    "policy.kwargs": "without policy.module",
    "trust.adaptive_target": 'without trust.region = "hard"',
    "penalty.l1": 'without penalty.kind = "sparse-group"',
    "penalty.outer": 'without penalty.kind = "nested"',
    "clients.spread": "for a single client",
}
"""Keys that are refused as contradictions wherever they would have no effect."""


def dotted(path: KeyPath) -> str:
    """Write a key as the table has it: `clients.entropy` for that of any client."""
    return ".".join(part for part in path if isinstance(part, str))


def every_key(scenario: Scenario) -> Iterator[KeyPath]:
    """List every key, those of the clients for each of their tables."""
    for path, _ in all_keys(Scenario):
        if path[0] == "clients":
            yield from (("clients", number, *path[1:]) for number in range(len(scenario.clients)))
        else:
            yield path


def unused_lines(folder: Path, text: str, *overrides: str, tasks: TaskFacts | None = None) -> list[str]:
    """Write a scenario to a file and list its keys without effect."""
    path = folder / "carts.toml"
    path.write_text(text)
    lines = GivenKeys.read(path, overrides).unused_lines(Scenario.load(path, overrides), tasks)
    return [line.replace(f"{folder}/", "") for line in lines]


# What is named -------------------------------------------------------------------------------------------------------


def test_a_threshold_has_no_effect_on_a_mean(tmp_path: Path):
    (line,) = unused_lines(tmp_path, CARTS, "merge.rule=mean")
    expected = 'has no effect: merge.rule is "mean", which compares no distance with a threshold'
    assert line == f"carts.toml:6: merge.threshold = 0.1: {expected}"


def test_a_key_of_the_command_line_is_named_as_it_was_given(tmp_path: Path):
    (line,) = unused_lines(tmp_path, CARTS, "merge.rule=huber", "trust.target=0.5")
    assert line == '--set trust.target=0.5: has no effect: trust.region is "none", which has no target'


def test_lines_come_in_the_order_in_which_the_user_wrote_them(tmp_path: Path):
    text = CARTS.replace("[merge]\n", "[group]\nsize = 2\n[personal]\npull = 0.5\n[merge]\n")
    lines = unused_lines(tmp_path, text, "merge.rule=mean", "objective.value_epochs=2")
    assert [line.split(" = ")[0] for line in lines[:3]] == [
        "carts.toml:6: group.size",
        "carts.toml:8: personal.pull",
        "carts.toml:10: merge.threshold",
    ]
    assert lines[3].startswith("--set objective.value_epochs=2: has no effect: ")


def test_values_of_a_method_or_a_preset_are_not_named(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", "")
    # the rows give gae_lambda, clip, epochs and others, which have no effect here
    assert unused_lines(tmp_path, text, "objective.step=natural", "method=fedavg") == []
    assert unused_lines(tmp_path, text, "policy.shared=[]") == []


def test_values_of_the_file_that_another_method_replaces_are_not_named(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", '[proximity]\nmode = "quadratic"\n')
    assert unused_lines(tmp_path, text, "method=fedavg") == []


def test_a_resolved_scenario_names_only_what_the_command_line_adds(tmp_path: Path):
    resolved = Scenario.loads(CARTS, overrides=["merge.rule=mean"]).dumps()
    assert unused_lines(tmp_path, resolved) == []
    (line,) = unused_lines(tmp_path, resolved, "trust.target=0.5", "method=local")
    assert line.startswith("--set trust.target=0.5: ")


def test_a_client_is_named_by_its_table(tmp_path: Path):
    overrides = ["objective.preset=trpo", "objective.advantage=group", "clients.cart.learning_rate=0.1"]
    lines = unused_lines(tmp_path, CARTS, *overrides, "merge.rule=huber")
    assert [line.split(":")[0] for line in lines] == ["carts.toml", "--set clients.cart.learning_rate=0.1"]
    assert all("trust.target sets the length of the step" in line for line in lines)


def test_keys_of_other_kinds_of_curriculum_have_no_effect(tmp_path: Path):
    ranges = "ranges = { length = [0.1, 2.0] }, start = { length = [0.5, 0.5] }"
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", '[curriculum]\nby = "server"\n').replace(
        "CartPole-v1", "grpo_fed/CartPole-v1"
    )
    text += f'curriculum = {{ kind = "schedule", {ranges}, until = 0.4, edges = 0.2 }}\n'
    by, edges = unused_lines(tmp_path, text)
    assert by.endswith('by = "server": has no effect: no client that trains has a curriculum that returns move')
    assert edges.startswith("carts.toml:11: clients.cart.curriculum.edges = 0.2: has no effect: of the curricula of")
    (until,) = unused_lines(
        tmp_path, text, "clients.cart.curriculum.kind=expanding", "clients.cart.curriculum.target=9"
    )
    assert "clients.cart.curriculum.until = 0.4: has no effect" in until


def test_squash_has_no_effect_where_no_client_has_a_box_of_actions(tmp_path: Path):
    overrides = ["policy.squash=true", "policy.log_std=-1", "merge.rule=huber"]
    assert unused_lines(tmp_path, CARTS, *overrides) == []
    assert unused_lines(tmp_path, CARTS, *overrides, tasks=TaskFacts(box_actions=True, private_blocks=True)) == []
    assert unused_lines(tmp_path, CARTS, *overrides, tasks=TaskFacts(box_actions=False, private_blocks=True)) == [
        "--set policy.squash=true: has no effect: no client has a box of actions",
        "--set policy.log_std=-1: has no effect: no client has a box of actions",
    ]


def test_the_same_start_has_no_effect_where_all_blocks_are_shared(tmp_path: Path):
    overrides = ["policy.same_start=false", "method=fedavg", "merge.rule=huber"]
    assert unused_lines(tmp_path, CARTS, *overrides, tasks=TaskFacts(box_actions=False, private_blocks=True)) == []
    (line,) = unused_lines(tmp_path, CARTS, *overrides, tasks=TaskFacts(box_actions=False, private_blocks=False))
    assert line.startswith("--set policy.same_start=false: has no effect: all blocks are shared")


SITES = """\
[[sites]]
name = "one"
clients = ["cart-0"]
merge = { rule = "mean", confirm = "evidence" }
[[sites]]
name = "two"
clients = ["cart-1", "cart-2"]
[sites.proximity]
mode = "off"
kl_joint = 0.1
"""


def test_keys_of_a_site_are_judged_by_the_sites_own_rule_and_budgets(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", "[merge]\nrejoin = 4\n") + SITES
    confirm, joint = unused_lines(tmp_path, text)
    assert confirm.startswith(
        'carts.toml:14: sites.one.merge.confirm = "evidence": has no effect: merge.rule is "mean"'
    )
    assert joint == 'carts.toml:20: sites.two.proximity.kl_joint = 0.1: has no effect: proximity.mode is "off"'


def test_a_key_for_all_has_an_effect_where_one_server_reads_it(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", '[merge]\nrule = "mean"\nrejoin = 4\nepisodes = 9\n') + SITES
    (line, *rest) = unused_lines(tmp_path, text, "sites.two.proximity={}", "sites.one.merge={}")
    assert line.startswith("carts.toml:7: merge.rejoin = 4")
    assert len(rest) == 1
    overrides = ["sites.one.merge={}", "sites.two.merge={ rule = 'persistence' }", "sites.two.proximity={}"]
    assert unused_lines(tmp_path, text, *overrides) == []


def test_groups_have_an_effect_where_a_site_merges_by_group(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", '[merge]\nrule = "mean"\n') + SITES
    rows = ["policy.groups={ actor = 'row' }", "sites.two.proximity={}", "sites.one.merge={}"]
    (line,) = unused_lines(tmp_path, text, *rows)
    assert line.startswith("--set policy.groups")
    assert unused_lines(tmp_path, text, *rows, "sites.two.merge={ rule = 'persistence' }") == []


def test_sites_weigh_clients_by_their_own_weights(tmp_path: Path):
    text = CARTS.replace("[merge]\nthreshold = 0.1\n", '[merge]\nweights = "uniform"\n') + SITES
    own = ["sites.two.proximity={}", "sites.one.merge={ weights = 'steps' }"]
    assert unused_lines(tmp_path, text, *own) == []
    (line,) = unused_lines(tmp_path, text, *own, "sites.two.merge={ weights = 'steps' }")
    assert "every site has its own weights" in line


# What is not named ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shipped", shipped_scenarios(), ids=lambda shipped: shipped.name)
def test_a_scenario_that_ships_gives_no_key_without_effect(shipped):
    assert GivenKeys.read(shipped.path, []).unused_lines(Scenario.load(shipped.path)) == []


def test_a_new_project_gives_no_key_without_effect(tmp_path: Path):
    path, *_ = create_project(tmp_path / "mine")
    assert (
        GivenKeys.read(path, []).unused_lines(Scenario.load(path), TaskFacts(box_actions=True, private_blocks=True))
        == []
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_method_and_a_preset_by_name_give_no_key_without_effect(method: str, tmp_path: Path):
    for preset in PRESETS:
        objective = f'[objective]\npreset = "{preset}"\n'
        text = f'name = "a"\nmethod = "{method}"\nsteps = 8192\n{objective}{CARTS[CARTS.index("[[") :]}'
        with suppress(ScenarioError):  # fedrep and fedkl contradict some presets
            assert unused_lines(tmp_path, text, tasks=TaskFacts(box_actions=False, private_blocks=False)) == []


@pytest.mark.parametrize("name", dict.fromkeys([*METHODS, *PRESETS]))
def test_a_row_gives_only_values_that_have_an_effect(name: str):
    is_method = name in METHODS and name != "grpo"
    row = METHODS[name] if is_method else PRESETS[name]
    overrides = [f"method={name}" if is_method else f"objective.preset={name}"]
    text = WRITERS if name in ("fedit", "fedsa") else CARTS  # methods for language models alone
    scenario = Scenario.loads(text, overrides=[*overrides, *(["group.equal=skip"] if name == "dapo" else [])])
    given = [(section, key) for section, values in row.values.items() for key in values]
    assert list(unused_keys(scenario, given)) == []


@pytest.mark.parametrize("knob", CHANGES)
def test_a_key_is_not_named_where_another_value_changes_what_is_learned(knob: str):
    base, value = CHANGES[knob]
    for overrides in (base, [*base, f"{knob}={value}"]):
        scenario = Scenario.loads(SMALL, overrides=overrides)
        given = list(every_key(scenario))
        named = {
            dotted(unused.key)
            for unused in unused_keys(scenario, given, TaskFacts(box_actions=True, private_blocks=True))
        }
        of_all_clients = knob.replace("clients.0.", "objective.")  # which gives way to the clients' own
        assert knob.replace("clients.0.", "clients.") not in named - {of_all_clients}


# The table -----------------------------------------------------------------------------------------------------------


def test_every_key_is_in_the_table_or_always_used():
    in_table = {key for row in TABLE for key in row.keys}
    every = {".".join(map(str, path)) for path, _ in all_keys(Scenario)}
    assert in_table <= every
    assert not in_table & (ALWAYS_USED | REFUSED.keys())
    # a new key needs a row of the table, or a place in one of the lists above
    assert every == in_table | ALWAYS_USED | REFUSED.keys()


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_a_rule_uses_the_keys_that_its_row_lists(rule: str):
    scenario = Scenario.loads(CARTS, overrides=[f"merge.rule={rule}"])
    keys = {key for row in MERGE_RULES.values() for key in row.keys}
    named = {dotted(unused.key) for unused in unused_keys(scenario, [("merge", key) for key in keys])}
    refused = {"blocks"}  # with a rule that has no threshold
    assert named == {f"merge.{key}" for key in keys - refused - set(MERGE_RULES[rule].keys)}


@pytest.mark.parametrize("kind", CURRICULA)
def test_a_curriculum_uses_the_keys_that_its_row_lists(kind: str):
    values = {"ranges": {"length": [0.1, 2.0]}, "start": {"length": [0.5, 0.5]}, "target": 9.0, "kind": kind}
    scenario = Scenario.loads(CARTS, overrides=["merge.rule=huber"])
    entry = scenario.clients[0].model_copy(update={"curriculum": CurriculumSettings(**values)})
    keys = {key for row in CURRICULA.values() for key in row.keys}
    assert keys == CurriculumSettings.model_fields.keys() - {"kind", "ranges"}
    given = [("clients", 0, "curriculum", key) for key in keys]
    named = {unused.key[-1] for unused in unused_keys(scenario.model_copy(update={"clients": [entry]}), given)}
    assert named == keys - set(CURRICULA[kind].keys)


def test_the_kinds_of_curriculum_are_those_of_the_table():
    assert list(CURRICULA) == list(get_args(CurriculumSettings.model_fields["kind"].annotation))


# Clients with prompts ------------------------------------------------------------------------------------------------

WRITERS = """\
name = "writers"
[objective]
preset = "dapo"
[[clients]]
name = "up"
prompts = "questions.jsonl"
"""


def test_the_network_and_the_step_limits_have_no_effect_where_all_clients_have_prompts(tmp_path: Path):
    overrides = ["policy.hidden=[8]", "evaluate.step_limit=9", "objective.gamma=0.5", "language.rank=2"]
    network, limit, gamma = unused_lines(tmp_path, WRITERS, *overrides)
    expected = "has no effect: all clients have prompts, and their policy is the model of [language]"
    assert network == f"--set policy.hidden=[8]: {expected}"
    assert limit.endswith("language.length limits completions")
    assert gamma.endswith("a completion is rewarded once, at its end")
    both = f'{WRITERS}[[clients]]\nname = "cart"\nenv = "CartPole-v1"\n'
    assert unused_lines(tmp_path, both, *overrides, "group.equal=skip") == []


def test_keys_of_the_language_model_have_no_effect_without_prompts(tmp_path: Path):
    (line,) = unused_lines(tmp_path, CARTS, "language.rank=2", "merge.rule=huber")
    assert line == "--set language.rank=2: has no effect: no client has prompts, and there is no language model"


def test_what_is_held_out_of_a_file_has_an_effect_unless_other_prompts_are_for_evaluation(tmp_path: Path):
    path = tmp_path / "writers.toml"
    for more, count in (("", 0), ('eval_prompts = "others.jsonl"\n', 1)):
        path.write_text(f"{WRITERS}held_out = 0.2\n{more}")
        lines = GivenKeys.read(path, []).unused_lines(Scenario.load(path))
        assert len(lines) == count
    assert "clients.up.held_out" in lines[0]
    assert lines[0].endswith("no client is trained on a file whose rows it is evaluated on, too")


def test_redraws_have_no_effect_where_nothing_is_drawn_again(tmp_path: Path):
    assert unused_lines(tmp_path, WRITERS, "group.redraws=2") == []
    (line,) = unused_lines(tmp_path, WRITERS, "group.redraws=2", "group.equal=skip")
    assert line == '--set group.redraws=2: has no effect: group.equal is "skip", and no prompt is drawn again'
