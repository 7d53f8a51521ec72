"""The examples of docs/extending.md, used as a reader would use them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

from grpo_fed import compare, resume, run
from grpo_fed.aggregation.merge import Replies, Reply
from grpo_fed.aggregation.merge.rules import bind_rule
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.groups import cut_groups
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings, PolicySettings
from grpo_fed.scenario.toml.source import ScenarioError

DOC = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(python|toml)\n(.*?)```", DOC, re.DOTALL)
MODULES = {name[1]: text for kind, text in EXAMPLES if kind == "python" and (name := re.match(r"# (\w+)\.py\n", text))}
TASK, CHANGES, POLICY, PRESET, METHOD, MERGE = (text for kind, text in EXAMPLES if kind == "toml")
TINY = """
name = "custom"
rounds = 1
steps = 64
[rollout]
num_envs = 4
horizon = 16
[evaluate]
episodes = 4
"""
CART = """
[[clients]]
name = "cart"
count = 3
env = "CartPole-v1"
"""


@pytest.fixture(autouse=True)
def importable_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the modules of the examples to a folder on the import path, as a user's own would be."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    gymnasium.registry.pop("Target-v0", None)


def small_scenario(*parts: str, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a small scenario with parts of the page; keys outside of sections come first."""
    keys, sections = [part for part in parts if "[" not in part], [part for part in parts if "[" in part]
    return Scenario.loads("\n".join([*keys, TINY, *sections]), "custom.toml", overrides)


def test_a_scenario_of_the_page_uses_each_module_of_the_page() -> None:
    assert list(MODULES) == ["my_envs", "my_nets", "my_presets", "my_methods", "my_merges"]
    assert all(
        f"{name}:" in scenario for name, scenario in zip(MODULES, (TASK, POLICY, PRESET, METHOD, MERGE), strict=True)
    )


def test_a_custom_task_and_policy_learn_in_a_federation() -> None:
    result = run(small_scenario(POLICY, TASK, overrides=("objective.minibatches=2",)), workers=0)
    assert result.status == "finished"
    assert list(result.clients) == [f"target-{number}" for number in range(4)]
    assert all(client.after is not None and client.after < 0 for client in result.clients.values())
    assert result.bytes_up > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_all_custom_parts_together_learn_in_worker_processes(workers: int, tmp_path: Path) -> None:
    result = run(small_scenario(METHOD, PRESET, POLICY, MERGE, TASK), tmp_path / "run", workers=workers)
    assert result.status == "finished"
    assert not result.missing
    assert result.bytes_up > 0


# A preset and a method ------------------------------------------------------------------------------------------------


def test_a_custom_preset_sets_the_keys_that_the_scenario_omits() -> None:
    scenario = small_scenario(PRESET, CART, overrides=("objective.epochs=7",))
    assert (scenario.objective.clip, scenario.objective.minibatches, scenario.trust.stop) == (0.1, 4, 0.01)
    assert scenario.objective.epochs == 7
    assert scenario.objective.gamma == 0.99
    wide = small_scenario(CART, overrides=("objective.preset=my_presets:WIDE", "objective.minibatches=4"))
    assert (wide.objective.step, wide.trust.target, wide.trust.cg_iterations) == ("natural", 0.05, 15)


def test_a_custom_method_can_be_replaced_and_restored() -> None:
    scenario = small_scenario(METHOD, PRESET, CART)
    assert (scenario.policy.shared, scenario.merge.rule, scenario.proximity.kl_joint) == (["*"], "mean", 0.01)
    resolved = scenario.dumps()
    other = Scenario.loads(resolved, overrides=["method=fedper"])
    assert (other.policy.shared, other.proximity.mode, other.proximity.kl_joint) == (["torso.*"], "off", 0.05)
    back = Scenario.loads(other.dumps(), overrides=["method=my_methods:CAREFUL"])
    assert back == scenario


def test_a_resolved_scenario_does_not_import_the_custom_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = small_scenario(METHOD, PRESET, CART).dumps()
    for name in MODULES:
        (tmp_path / f"{name}.py").unlink()
        monkeypatch.delitem(sys.modules, name, raising=False)
    scenario = Scenario.loads(text)
    assert (scenario.method, scenario.objective.preset, scenario.objective.clip) == (
        "my_methods:CAREFUL",
        "my_presets:CAUTIOUS",
        0.1,
    )
    assert "my_methods" not in sys.modules
    sources = explain_scenario(scenario)[-1].sentences
    assert sources[0] == "Method my_methods:CAREFUL cannot be imported here; the scenario has all of its values."
    with pytest.raises(ScenarioError, match=r"my_methods:CAREFUL: cannot be imported.*without it, local cannot"):
        Scenario.loads(text, overrides=["method=local"])


def test_a_run_with_custom_rows_resumes_without_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = small_scenario(METHOD, PRESET, MERGE, CART, overrides=("rounds=2",))
    whole = run(scenario, tmp_path / "whole", workers=0)

    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scenario, tmp_path / "stopped", stop, workers=0)
    for name in ("my_methods", "my_presets"):
        (tmp_path / f"{name}.py").unlink()
        monkeypatch.delitem(sys.modules, name)
    resumed = resume(tmp_path / "stopped")
    assert resumed.status == "finished"
    scores = {name: client.after for name, client in resumed.clients.items()}
    assert scores == {name: client.after for name, client in whole.clients.items()}


def test_a_custom_method_is_compared_with_others(tmp_path: Path) -> None:
    (tmp_path / "custom.toml").write_text("\n".join([TINY, PRESET, CART]))
    comparison = compare(tmp_path / "custom.toml", ["local", "my_methods:CAREFUL"], [0], tmp_path / "side")
    assert [run.problem for run in comparison.runs] == ["", ""]
    assert [method.method for method in comparison.methods] == ["local", "my_methods:CAREFUL"]
    assert (tmp_path / "side" / "my_methods.CAREFUL" / "seed-0" / "results.json").is_file()


def test_explain_describes_custom_rows() -> None:
    *_, sources = explain_scenario(small_scenario(METHOD, PRESET, CART, overrides=("objective.clip=0.3",)))
    assert sources.sentences[:2] == (
        "Method my_methods:CAREFUL (averaging within a KL budget): this scenario changes none of its values.",
        "Preset my_presets:CAUTIOUS (PPO in small steps): this scenario changes objective.clip = 0.3.",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("missing:ROW", "cannot be imported: ModuleNotFoundError: No module named 'missing'; is it installed, or on"),
        ("my_presets:CAUTIOS", "cannot be imported: AttributeError: .*CAUTIOS"),
        ("my_presets:TRPO", "is a dict; it must be a grpo_fed.scenario.presets.Preset"),
        ("my_methods:CAREFUL", "is a Method; it must be a grpo_fed.scenario.presets.Preset"),
        ("wrong:KEY", r"has objective.clp: unknown key; did you mean clip\?"),
        ("wrong:VALUE", "has objective.clip = -1: must be greater than 0"),
        ("wrong:SECTION", 'has "objectiv", which is not a section of keys and values; there are policy language'),
        ("wrong:NAME", "has objective.preset, which names the preset itself; build on the values of PRESETS instead"),
        ("not a path:X", 'must be "package.module:Name"'),
    ],
)
def test_an_invalid_preset_is_refused_with_its_line_and_a_cure(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from grpo_fed.scenario.presets import Preset\n"
        "KEY = Preset('', '', {'objective': {'clp': 0.1}})\n"
        "VALUE = Preset('', '', {'objective': {'clip': -1.0}})\n"
        "SECTION = Preset('', '', {'objectiv': {'clip': 0.1}})\n"
        "NAME = Preset('', '', {'objective': {'preset': 'trpo'}})\n"
    )
    sys.modules.pop("wrong", None)
    with pytest.raises(ScenarioError, match=f'^custom.toml:[0-9]+: objective.preset = "{row}": {message}') as caught:
        small_scenario(f'[objective]\npreset = "{row}"', CART)
    assert len(str(caught.value).splitlines()) == 1


def test_an_invalid_row_is_reported_with_all_other_mistakes() -> None:
    with pytest.raises(ScenarioError) as caught:
        small_scenario('method = "missing:ROW"', '[objective]\nclip = -1.0\npreset = "ppo2"', CART)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert 'method = "missing:ROW": cannot be imported' in lines[0]
    assert "clip = -1: must be greater than 0" in lines[1]
    assert "did you mean" in lines[2]


# A merge --------------------------------------------------------------------------------------------------------------


def merge_points(rule: str, points: list[list[float]], **kwargs: object) -> torch.Tensor:
    """Merge clients with two shared parameters by a custom rule."""
    layout = Layout.from_shapes({"actor.weight": (1, 2)}.items(), PolicySettings())
    replies = Replies.of(Reply(f"c{number}", torch.tensor(point), 1.0) for number, point in enumerate(points))
    return bind_rule(MergeSettings(rule=rule, kwargs=kwargs))(replies, torch.zeros(2), cut_groups(layout, {})).point


def test_a_custom_merge_returns_its_point() -> None:
    square = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    rule = "my_merges:geometric_median"
    torch.testing.assert_close(merge_points(rule, square), torch.tensor([0.5, 0.5]))  # where its diagonals meet
    assert float(merge_points(rule, [*square, [1e6, 1e6]]).abs().max()) < 2
    # without an iteration it is the mean: a fifth of the outlier
    torch.testing.assert_close(merge_points(rule, [*square, [8.0, 8.0]], iterations=0), torch.tensor([2.0, 2.0]))


def test_a_custom_merge_may_let_clients_depart(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(
        "import torch\nfrom dataclasses import replace\nfrom grpo_fed.aggregation.merge import mean\n"
        "def last(replies, shared, groups):\n"
        "    merged = mean(replies, shared, groups)\n"
        "    departed = torch.zeros_like(merged.departed)\n"
        "    departed[-1] = True\n"
        "    return replace(merged, departed=departed)\n"
    )
    result = run(
        small_scenario(CART, '[merge]\nrule = "leaving:last"', overrides=("objective.minibatches=4",)), workers=0
    )
    departed = {name: set(client.personal_groups) for name, client in result.clients.items()}
    assert departed["cart-0"] == departed["cart-1"] == set()
    assert departed["cart-2"] == {"torso.0", "torso.1", "actor"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("missing:rule", "merge.rule = missing:rule: cannot be imported: ModuleNotFoundError"),
        ("odd:NUMBER", "merge.rule = odd:NUMBER: is a int; it must be a function of replies, shared and groups"),
        ("odd:alone", "merge.rule = odd:alone: cannot be called with replies, shared, groups and merge.kwargs"),
        (
            "odd:none",
            "merge.rule = odd:none: made a NoneType; it must make a tensor or a grpo_fed.aggregation.merge.Merged",
        ),
        ("odd:short", r"merge.rule = odd:short: made a point of shape \(1,\); the shared blocks have"),
        ("odd:nan", "merge.rule = odd:nan: made a point that is not finite"),
        ("odd:raises", "merge.rule = odd:raises: ZeroDivisionError: "),
        (
            "odd:strange",
            "merge.rule = odd:strange: has clusters of the blocks sea; they must be torso.0, torso.1, actor",
        ),
        ("odd:few", r"merge.rule = odd:few: has members as torch.int64 of shape \(1, 3\); int64 \(3, 3\) fits"),
        ("odd:away", "merge.rule = odd:away: has members in clusters that are not among its 1"),
    ],
)
def test_an_invalid_custom_merge_is_refused_by_name(rule: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "NUMBER = 3\n"
        "def alone(replies): ...\n"
        "def none(replies, shared, groups): ...\n"
        "def short(replies, shared, groups): return shared[:1]\n"
        "def nan(replies, shared, groups): return shared / 0 * 0\n"
        "def raises(replies, shared, groups): return 1 // 0\n"
        "from dataclasses import replace\n"
        "import torch\n"
        "from grpo_fed.aggregation.merge import RULES, Clusters\n"
        "def clusters(replies, shared, groups, **changes):\n"
        "    merged, whole = RULES['mean'](replies, shared, groups), groups.as_blocks\n"
        "    members = torch.zeros(len(replies.all), len(whole.names), dtype=torch.int64)\n"
        "    valid = Clusters(whole.names, members, merged.point[None], whole.ids)\n"
        "    return replace(merged, clusters=replace(valid, **changes))\n"
        "def strange(replies, shared, groups): return clusters(replies, shared, groups, blocks=('sea',))\n"
        "def few(*all): return clusters(*all, members=torch.zeros((1, 3), dtype=torch.int64))\n"
        "def away(*all): return clusters(*all, members=torch.ones((3, 3), dtype=torch.int64))\n"
    )
    sys.modules.pop("odd", None)
    scenario = small_scenario(CART, f'[merge]\nrule = "{rule}"', overrides=("objective.minibatches=4",))
    with pytest.raises(ValueError, match=message):
        run(scenario, workers=0)


def test_arguments_for_a_shipped_rule_are_refused() -> None:
    with pytest.raises(
        ScenarioError, match=r'merge.kwargs: these are arguments for a rule of your own.*it is "median"'
    ):
        small_scenario(CART, '[merge]\nrule = "median"\nkwargs = { iterations = 3 }')


def test_the_example_of_changes_is_a_valid_scenario():
    (settings,) = Scenario.loads(f'name = "a"\n{CHANGES}').clients
    assert [(change.round, change.kwargs) for change in settings.changes] == [(20, {"swap_actions": True})]
