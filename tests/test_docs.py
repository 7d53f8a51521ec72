"""The pages of docs/ and the README: what they link to is there, what they name exists, and their examples run."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import grpo_fed
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, MethodResult
from grpo_fed.rl.records import Evaluation
from grpo_fed.runs.records import ClientRecord, RoundRecord, ServerRecord
from grpo_fed.runs.results import ClientResult, Result

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")
SCENARIO = """
name = "mine"
rounds = 2
steps = 256
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 4
[evaluate]
episodes = 4
[[clients]]
name = "cart"
count = 2
env = "CartPole-v1"
"""


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`, as they are made of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path):
    for text, link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: [{text}]({link})"
        assert not anchor or anchor in anchors(target), f"{page.name}: [{text}]({link})"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_page_of_the_docs_is_linked_from_the_readme(page: Path):
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


# The algorithm --------------------------------------------------------------------------------------------------------


ALGORITHM = (DOCS / "algorithm.md").read_text(encoding="utf-8")
FUNCTIONS = [(text.strip("`"), link) for text, link in LINK.findall(ALGORITHM) if text.startswith("`")]


@pytest.mark.parametrize(("name", "link"), FUNCTIONS)
def test_a_function_that_the_algorithm_names_is_where_its_link_leads(name: str, link: str):
    path = (DOCS / link).resolve().relative_to(ROOT).with_suffix("")
    found = importlib.import_module(".".join(path.parts))
    first, *rest = name.split(".")
    for part in rest if first in path.parts else [first, *rest]:
        found = getattr(found, part)
    assert found.__module__ == ".".join(path.parts)


def test_the_algorithm_names_no_function_without_a_link():
    unlinked = re.findall(r"`([\w.]+)`", LINK.sub("", ALGORITHM))
    modules = {path.stem for path in (ROOT / "grpo_fed").rglob("*.py")} | {"Members", "Fleet", "Merging", "Federation"}
    settings = {"penalty.toward", "penalty.squared", "merge.refit", "trust.blocks", "proximity.adaptive"}
    settings |= {name for name in unlinked if name.startswith("objective.") and name.split(".")[1] in OBJECTIVE}
    assert not {name for name in unlinked if "." in name and name.split(".")[0] in modules} - settings
    assert len(FUNCTIONS) > 25


OBJECTIVE = set(grpo_fed.Scenario.model_fields["objective"].default.__class__.model_fields)


# From Python ----------------------------------------------------------------------------------------------------------


PYTHON = (DOCS / "python.md").read_text(encoding="utf-8")


def test_the_examples_of_the_python_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SCENARIO)
    scope: dict[str, object] = {}
    for text in re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL):
        exec(compile(text, "docs/python.md", "exec"), scope)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0.0003 ('cart-0', 'cart-1')"
    assert said[1] == "0 {}"
    assert any(re.fullmatch(r"cart-1: \d+ to \d+, keeps \[.*\]", line) for line in said)
    assert [line.split()[0] for line in said[-2:]] == ["local", "grpo"]
    assert (tmp_path / "runs" / "side" / "comparison.md").is_file()


@pytest.mark.parametrize(
    ("record", "heading"),
    [(RoundRecord, "of a `RoundNote`"), (Result, "of a `Result`"), (ClientResult, "of a `ClientResult`")],
)
def test_the_tables_of_the_python_page_have_all_that_a_record_has(record: type, heading: str):
    table = PYTHON.split(f"| {heading} |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)(?:\(\))?`", row.split("|")[1])}
    public = {name for name in dir(record) if isinstance(getattr(record, name), property)}
    public |= {field.name for field in dataclasses.fields(record)} | ({"document"} if record is Result else set())
    assert named == public


@pytest.mark.parametrize("record", [ClientRecord, ServerRecord, Comparison, MethodResult, ComparedRun, Evaluation])
def test_the_other_records_of_the_python_page_have_what_it_says(record: type):
    named = {
        ClientRecord: ("client", "task", "metrics", "score", "kl", "personal", "failure"),
        ServerRecord: ("kept", "up", "down", "total", "notes"),
        Comparison: ("baseline", "clients", "seeds"),
        MethodResult: ("scores", "iqm", "better", "better_by_seed", "verdict"),
        ComparedRun: ("folder", "problem"),
        Evaluation: ("scores", "lengths", "score"),
    }[record]
    known = {field.name for field in dataclasses.fields(record)} | set(dir(record))
    assert set(named) <= known
    assert all(f"`{name}`" in PYTHON for name in named)
