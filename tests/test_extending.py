"""The examples of docs/extending.md, as a reader would use them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from grpo_fed.blocks import Layout
from grpo_fed.engines.local import federate
from grpo_fed.groups import groups_of
from grpo_fed.merge import Merged, Replies, Reply
from grpo_fed.merge.average import merged
from grpo_fed.scenario import PolicySettings, Scenario

DOC = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(python|toml)\n(.*?)```", DOC, re.DOTALL)
TINY = """
name = "own"
rounds = 1
steps = 64
[rollout]
num_envs = 4
horizon = 16
[objective]
minibatches = 2
[evaluate]
episodes = 4
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the modules of the examples, as a user's own would be."""
    for kind, text in EXAMPLES:
        name = re.match(r"# (\w+\.py)\n", text)
        if kind == "python" and name is not None:
            (tmp_path / name[1]).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("my_envs", "my_nets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


@pytest.mark.usefixtures("beside")
def test_a_task_and_a_policy_of_ones_own_learn_in_a_federation():
    task, policy = (text for kind, text in EXAMPLES if kind == "toml")
    result = federate(Scenario.loads(f"{TINY}\n{policy}\n{task}"), workers=0)
    assert result.status == "finished"
    assert list(result.clients) == [f"target-{number}" for number in range(4)]
    assert all(client.after is not None and client.after < 0 for client in result.clients.values())
    assert result.bytes_up > 0


def test_a_merge_of_ones_own_has_the_signature_of_ours():
    (text,) = (text for kind, text in EXAMPLES if kind == "python" and "geometric_median" in text)
    names = {"Replies": Replies, "Merged": Merged, "Groups": object, "Tensor": torch.Tensor, "torch": torch}
    scope = {**names, "merged": merged}
    exec(compile(text, "docs/extending.md", "exec"), scope)
    layout = Layout.cut({"actor.weight": (1, 2)}.items(), PolicySettings())
    groups = groups_of(layout, {})
    points = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    replies = Replies.of(Reply(f"c{number}", torch.tensor(point), 1.0) for number, point in enumerate(points))
    found = scope["geometric_median"](replies, torch.zeros(2), groups)  # type: ignore[operator]
    torch.testing.assert_close(found.point, torch.tensor([0.5, 0.5]))  # where the diagonals of a square meet
    outlier = Replies.of([*replies.all, Reply("far", torch.tensor([1e6, 1e6]), 1.0)])
    assert float(scope["geometric_median"](outlier, torch.zeros(2), groups).point.abs().max()) < 2  # type: ignore[operator]
