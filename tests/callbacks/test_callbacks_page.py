"""The examples of docs/callbacks.md, used as a reader would use them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from grpo_fed import Scenario, run
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.runs.records import record_to_line
from tests.support.small_federation import TINY

DOC = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
MODULES = {name[1]: text for text in PYTHON if (name := re.match(r"# (\w+)\.py\n", text))}
(TOML,) = re.findall(r"```toml\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the page's modules where they can be imported, with a stand-in for the package that one of them needs."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_the_scenario_of_the_page_trains_and_is_explained(tmp_path: Path) -> None:
    scenario = Scenario.loads(f"{TOML}{TINY}", overrides=["rounds=2", "evaluate.every=1"])
    records = []
    result = run(scenario, tmp_path / "run", records.append, workers=0)
    assert result.status == "finished"
    assert [record.logged["callback/learning_rate"] for record in records[1:]] == [0.0005, 0.001]
    assert (tmp_path / "run" / "best" / "best.json").is_file()
    assert (tmp_path / "run" / "tensorboard").is_dir()
    (sentence,) = [
        text for part in explain_scenario(scenario) for text in part.sentences if text.startswith("The server calls")
    ]
    assert "my_callbacks:Warmup (rounds = 2), grpo_fed.callbacks:KeepBest" in sentence


def test_the_tracker_of_the_page_gets_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        logged: dict[int, dict[str, float]] = {}  # noqa: RUF012
        code: int | None = None

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.logged[step] = numbers

        def finish(self, exit_code: int) -> None:
            type(self).code = exit_code

    wandb = ModuleType("wandb")
    wandb.init = lambda **given: Session() if given["project"] == "carts" else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (entry,) = re.findall(r"`(callbacks = \[\{ path = \"my_wandb.*?)`", DOC)
    records = []
    run(Scenario.loads(f"{entry}\n{TINY}", overrides=["rounds=1"]), watch=records.append, workers=0)
    assert Session.logged.keys() == {0, 1}
    assert Session.code == 0
    line = record_to_line(records[-1])
    assert Session.logged[1]["charts/episodic_return"] == line["charts/episodic_return"]
