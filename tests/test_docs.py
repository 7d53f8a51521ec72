"""README, CONTRIBUTING and the pages of docs/: links lead somewhere, names exist, examples run."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import grpo_fed
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, MethodResult
from grpo_fed.rl.records import Evaluation
from grpo_fed.runs import ClientRecord, ClientResult, Result, RoundRecord, ServerRecord

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")
PATH = re.compile(r"`((?:grpo_fed|tests|scenarios|benchmarks|docs)/[\w./-]*|(?:clients|server)/\w+\.py)`")
DOTTED_NAME = re.compile(r"(?<![\w./-])grpo_fed((?:\.[A-Za-z_]\w*)+)")
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
    """Return what a link may have after `#`: the page's headings, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for text, link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: [{text}]({link})"
        assert not anchor or anchor in anchors(target), f"{page.name}: [{text}]({link})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    registered = {path for path in paths if re.fullmatch(r"grpo_fed/\w+-v\d", path)}  # ids of environments
    assert not [path for path in paths if path not in registered and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_of_the_package_on_a_page_exists(page: Path) -> None:
    for name in DOTTED_NAME.findall(page.read_text(encoding="utf-8")):
        parts, value = name.split(".")[1:], grpo_fed
        for count, part in enumerate(parts, 1):
            if not hasattr(value, part):
                importlib.import_module(".".join(["grpo_fed", *parts[:count]]))
            value = getattr(value, part)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_readme_links_every_page_of_the_docs(page: Path) -> None:
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


# Links to functions and classes ---------------------------------------------------------------------------------------


def code_links() -> Iterator[tuple[str, Path]]:
    """Find every link whose text is code and which leads to a Python file; yield the text and the file."""
    for page in PAGES:
        for text, link in LINK.findall(page.read_text(encoding="utf-8")):
            if text.startswith("`") and link.endswith(".py"):
                yield text.strip("`"), (page.parent / link).resolve().relative_to(ROOT)


CODE_LINKS = sorted({(name, path.as_posix()) for name, path in code_links()})
ALGORITHM = (DOCS / "algorithm.md").read_text(encoding="utf-8")
OBJECTIVE_KEYS = set(grpo_fed.Scenario.model_fields["objective"].default.__class__.model_fields)
SETTINGS = {"penalty.toward", "penalty.squared", "trust.blocks", "proximity.adaptive", "normalise.observations"}
SETTINGS |= {"round.mode", "round.buffer", "round.staleness", "round.rate_fair", "round.again", "clients.pace"}
SETTINGS |= {"clients.jitter"}
SETTINGS |= {"merge.refit", "merge.episodes", "merge.rejoin", "merge.most", "evaluate.adapt", "wire.dtype"}
SETTINGS |= {"evaluate.twins", "personal.model", "merge.rule", "merge.confirm"}
SETTINGS |= {"merge.mix", "merge.correct_drift", "proximity.mode", "proximity.states", "evaluate.episodes"}
SETTINGS |= {"trust.rollback", "trust.rollback_episodes"}
SETTINGS |= {f"objective.{key}" for key in OBJECTIVE_KEYS}


@pytest.mark.parametrize(("name", "path"), CODE_LINKS)
def test_a_linked_name_is_defined_in_the_linked_file(name: str, path: str) -> None:
    module = ".".join(Path(path).with_suffix("").parts)
    value = importlib.import_module(module)
    first, *rest = name.split(".")
    for part in rest if first == Path(path).stem else [first, *rest]:
        value = getattr(value, part)
    assert value.__module__ == module


def test_the_algorithm_page_links_every_function_that_it_names() -> None:
    unlinked = {name for name in re.findall(r"`([\w.]+)`", LINK.sub("", ALGORITHM)) if "." in name}
    assert not {name for name in unlinked if not name.endswith((".py", ".md", ".json", ".jsonl"))} - SETTINGS
    assert len([text for text, _ in LINK.findall(ALGORITHM) if text.startswith("`")]) > 25


# From Python ----------------------------------------------------------------------------------------------------------


PYTHON = (DOCS / "python.md").read_text(encoding="utf-8")


def test_the_examples_of_the_python_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SCENARIO)
    names: dict[str, object] = {}
    for text in re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL):
        exec(compile(text, "docs/python.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0.0003 ('cart-0', 'cart-1')"
    assert lines[1] == "0 {}"
    assert any(re.fullmatch(r"cart-1: \d+ to \d+, departed from \[.*\]", line) for line in lines)
    assert [line.split()[0] for line in lines[-2:]] == ["local", "grpo"]
    assert (tmp_path / "runs" / "side" / "comparison.md").is_file()


@pytest.mark.parametrize("record", [RoundRecord, Result, ClientResult])
def test_a_table_of_the_python_page_lists_every_field(record: type) -> None:
    table = PYTHON.split(f"| field of a `{record.__name__}` |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)(?:\(\))?`", row.split("|")[1])}
    public = {name for name in dir(record) if isinstance(getattr(record, name), property)}
    public |= {field.name for field in dataclasses.fields(record)} | (
        {"to_json", "to_pandas"} if record is Result else set()
    )
    assert listed == public


@pytest.mark.parametrize(
    ("record", "listed"),
    [
        (ClientRecord, ("client", "task", "metrics", "score", "kl", "departed", "clusters", "failure")),
        (ServerRecord, ("step", "bytes_up", "bytes_down", "bytes_total", "notes")),
        (Comparison, ("baseline", "clients", "seeds", "methods", "runs")),
        (MethodResult, ("scores", "iqm", "better", "better_by_seed", "verdict")),
        (ComparedRun, ("folder", "problem")),
        (Evaluation, ("scores", "lengths", "score")),
    ],
)
def test_a_record_has_the_fields_that_the_python_page_mentions(record: type, listed: tuple[str, ...]) -> None:
    public = {field.name for field in dataclasses.fields(record)} | set(dir(record))
    assert set(listed) <= public
    assert all(f"`{name}`" in PYTHON for name in listed)
