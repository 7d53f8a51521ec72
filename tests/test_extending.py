"""The examples of docs/extending.md, as a reader would use them."""

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
TASK, POLICY, PRESET, METHOD, MERGE = (text for kind, text in EXAMPLES if kind == "toml")
TINY = """
name = "own"
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
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the modules of the examples, as a user's own would be."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    gymnasium.registry.pop("Target-v0", None)
    return tmp_path


def own(*parts: str, overrides: tuple[str, ...] = ()) -> Scenario:
    """A tiny scenario with parts of the docs; what stands above any section comes first."""
    return Scenario.loads(
        "\n".join([*(p for p in parts if "[" not in p), TINY, *(p for p in parts if "[" in p)]), "own.toml", overrides
    )


def test_every_module_of_the_page_is_used_by_a_scenario_of_the_page():
    assert list(MODULES) == ["my_envs", "my_nets", "my_presets", "my_methods", "my_merges"]
    assert all(
        f"{name}:" in scenario for name, scenario in zip(MODULES, (TASK, POLICY, PRESET, METHOD, MERGE), strict=True)
    )


def test_a_task_and_a_policy_of_ones_own_learn_in_a_federation():
    result = run(own(POLICY, TASK, overrides=("objective.minibatches=2",)), workers=0)
    assert result.status == "finished"
    assert list(result.clients) == [f"target-{number}" for number in range(4)]
    assert all(client.after is not None and client.after < 0 for client in result.clients.values())
    assert result.bytes_up > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_all_of_ones_own_together_learn_in_worker_processes_too(workers: int, tmp_path: Path):
    result = run(own(METHOD, PRESET, POLICY, MERGE, TASK), tmp_path / "run", workers=workers)
    assert result.status == "finished"
    assert not result.missing
    assert result.bytes_up > 0


# A preset and a method ------------------------------------------------------------------------------------------------


def test_a_preset_of_ones_own_fills_in_what_the_scenario_leaves_open():
    scenario = own(PRESET, CART, overrides=("objective.epochs=7",))
    assert (scenario.objective.clip, scenario.objective.minibatches, scenario.trust.stop) == (0.1, 4, 0.01)
    assert scenario.objective.epochs == 7
    assert scenario.objective.gamma == 0.99
    wide = own(CART, overrides=("objective.preset=my_presets:WIDE", "objective.minibatches=4"))
    assert (wide.objective.step, wide.trust.target, wide.trust.cg_iterations) == ("natural", 0.05, 15)


def test_a_method_of_ones_own_makes_room_for_another_and_takes_it():
    scenario = own(METHOD, PRESET, CART)
    assert (scenario.policy.shared, scenario.merge.rule, scenario.proximity.kl_joint) == (["*"], "mean", 0.01)
    resolved = scenario.dumps()
    other = Scenario.loads(resolved, overrides=["method=fedper"])
    assert (other.policy.shared, other.proximity.mode, other.proximity.kl_joint) == (["torso.*"], "off", 0.05)
    back = Scenario.loads(other.dumps(), overrides=["method=my_methods:SHY"])
    assert back == scenario


def test_a_resolved_scenario_needs_the_modules_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = own(METHOD, PRESET, CART).dumps()
    for name in MODULES:
        (tmp_path / f"{name}.py").unlink()
        monkeypatch.delitem(sys.modules, name, raising=False)
    scenario = Scenario.loads(text)
    assert (scenario.method, scenario.objective.preset, scenario.objective.clip) == (
        "my_methods:SHY",
        "my_presets:CAUTIOUS",
        0.1,
    )
    assert "my_methods" not in sys.modules
    sources = explain_scenario(scenario)[-1].sentences
    assert sources[0] == "Method my_methods:SHY cannot be imported here; this scenario has all its values."
    with pytest.raises(
        ScenarioError, match=r"method = my_methods:SHY: cannot be imported.*without it, local cannot replace its values"
    ):
        Scenario.loads(text, overrides=["method=local"])


def test_a_run_with_rows_of_ones_own_goes_on_without_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scenario = own(METHOD, PRESET, MERGE, CART, overrides=("rounds=2",))
    whole = run(scenario, tmp_path / "whole", workers=0)

    def stops(note: RoundRecord) -> None:
        if note.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scenario, tmp_path / "halved", stops, workers=0)
    for name in ("my_methods", "my_presets"):
        (tmp_path / f"{name}.py").unlink()
        monkeypatch.delitem(sys.modules, name)
    ended = resume(tmp_path / "halved")
    assert ended.status == "finished"
    assert {name: one.after for name, one in ended.clients.items()} == {
        n: one.after for n, one in whole.clients.items()
    }


def test_a_method_of_ones_own_stands_beside_others(tmp_path: Path):
    (tmp_path / "own.toml").write_text("\n".join([TINY, PRESET, CART]))
    found = compare(tmp_path / "own.toml", ["local", "my_methods:SHY"], [0], tmp_path / "side")
    assert [one.problem for one in found.runs] == ["", ""]
    assert [one.method for one in found.methods] == ["local", "my_methods:SHY"]
    assert (tmp_path / "side" / "my_methods.SHY" / "seed-0" / "results.json").is_file()


def test_explain_says_what_a_row_of_ones_own_is():
    *_, sources = explain_scenario(own(METHOD, PRESET, CART, overrides=("objective.clip=0.3",)))
    assert sources.sentences[:2] == (
        "Method my_methods:SHY (averaging within a KL budget): this scenario changes none of its values.",
        "Preset my_presets:CAUTIOUS (PPO in small steps): this scenario changes objective.clip = 0.3.",
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("missing:ROW", "cannot be imported: ModuleNotFoundError: No module named 'missing'; is it installed, or on"),
        ("my_presets:CAUTIOS", "cannot be imported: AttributeError: .*CAUTIOS"),
        ("my_presets:TRPO", "is a dict; it must be a grpo_fed.scenario.presets.Preset"),
        ("my_methods:SHY", "is a Method; it must be a grpo_fed.scenario.presets.Preset"),
        ("wrong:KEY", r"has objective.clp: unknown key; did you mean clip\?"),
        ("wrong:VALUE", "has objective.clip = -1: must be greater than 0"),
        ("wrong:SECTION", 'has "objectiv", which is not a section of keys and values; there are policy rollout'),
        ("wrong:NAME", "has objective.preset, which names the preset itself; build on the values of PRESETS instead"),
        ("not a path:X", 'must be "package.module:Name"'),
    ],
)
def test_a_preset_that_does_not_fit_is_refused_with_its_place_and_cure(row: str, said: str, tmp_path: Path):
    (tmp_path / "wrong.py").write_text(
        "from grpo_fed.scenario.presets import Preset\n"
        "KEY = Preset('', '', {'objective': {'clp': 0.1}})\n"
        "VALUE = Preset('', '', {'objective': {'clip': -1.0}})\n"
        "SECTION = Preset('', '', {'objectiv': {'clip': 0.1}})\n"
        "NAME = Preset('', '', {'objective': {'preset': 'trpo'}})\n"
    )
    sys.modules.pop("wrong", None)
    with pytest.raises(ScenarioError, match=f'^own.toml:[0-9]+: objective.preset = "{row}": {said}') as caught:
        own(f'[objective]\npreset = "{row}"', CART)
    assert len(str(caught.value).splitlines()) == 1


def test_a_wrong_row_is_told_with_all_other_mistakes():
    with pytest.raises(ScenarioError) as caught:
        own('method = "missing:ROW"', '[objective]\nclip = -1.0\npreset = "ppo2"', CART)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert 'method = "missing:ROW": cannot be imported' in lines[0]
    assert "clip = -1: must be greater than 0" in lines[1]
    assert "did you mean" in lines[2]


# A merge --------------------------------------------------------------------------------------------------------------


def merged_by(rule: str, points: list[list[float]], **kwargs: object) -> torch.Tensor:
    """Where two shared parameters go by a rule of one's own."""
    layout = Layout.from_shapes({"actor.weight": (1, 2)}.items(), PolicySettings())
    replies = Replies.of(Reply(f"c{number}", torch.tensor(point), 1.0) for number, point in enumerate(points))
    return bind_rule(MergeSettings(rule=rule, kwargs=kwargs))(replies, torch.zeros(2), cut_groups(layout, {})).point


def test_a_merge_of_ones_own_makes_what_it_says():
    square = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    rule = "my_merges:geometric_median"
    torch.testing.assert_close(merged_by(rule, square), torch.tensor([0.5, 0.5]))  # where its diagonals meet
    assert float(merged_by(rule, [*square, [1e6, 1e6]]).abs().max()) < 2
    # not a step from the mean: a fifth of the outlier
    torch.testing.assert_close(merged_by(rule, [*square, [8.0, 8.0]], iterations=0), torch.tensor([2.0, 2.0]))


def test_a_merge_of_ones_own_may_say_who_departs(tmp_path: Path):
    (tmp_path / "leaving.py").write_text(
        "import torch\nfrom dataclasses import replace\nfrom grpo_fed.aggregation.merge import mean\n"
        "def last(replies, shared, groups):\n"
        "    found = mean(replies, shared, groups)\n"
        "    departed = torch.zeros_like(found.departed)\n"
        "    departed[-1] = True\n"
        "    return replace(found, departed=departed)\n"
    )
    result = run(own(CART, '[merge]\nrule = "leaving:last"', overrides=("objective.minibatches=4",)), workers=0)
    kept = {name: set(client.personal_groups) for name, client in result.clients.items()}
    assert kept["cart-0"] == kept["cart-1"] == set()
    assert kept["cart-2"] == {"torso.0", "torso.1", "actor"}


@pytest.mark.parametrize(
    ("rule", "said"),
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
def test_a_merge_that_does_not_fit_is_refused_by_name(rule: str, said: str, tmp_path: Path):
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
        "def parts(replies, shared, groups, **other):\n"
        "    found = RULES['clusters'](replies, shared, groups)\n"
        "    own = found.clusters\n"
        "    own = replace(own, members=torch.zeros_like(own.members), points=own.points[:1])\n"
        "    return replace(found, clusters=replace(own, **other))\n"
        "def strange(replies, shared, groups): return parts(replies, shared, groups, blocks=('sea',))\n"
        "def few(*all): return parts(*all, members=torch.zeros((1, 3), dtype=torch.int64))\n"
        "def away(*all): return parts(*all, members=torch.ones((3, 3), dtype=torch.int64))\n"
    )
    sys.modules.pop("odd", None)
    scenario = own(CART, f'[merge]\nrule = "{rule}"', overrides=("objective.minibatches=4",))
    with pytest.raises(ValueError, match=said):
        run(scenario, workers=0)


def test_arguments_for_a_rule_of_ours_are_refused():
    with pytest.raises(ScenarioError, match=r'merge.kwargs: these are arguments for a rule of your own.*it is "huber"'):
        own(CART, "[merge]\nkwargs = { iterations = 3 }")
