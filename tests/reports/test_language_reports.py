"""What people see of clients with prompts: on the terminal, in the summary and on the page, of real runs."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from grpo_fed.engines.alone import train
from grpo_fed.engines.start import run
from grpo_fed.reports.displays import JsonDisplay, LineDisplay, LiveDisplay
from grpo_fed.reports.episodes import FilmedEpisodes, film_episodes
from grpo_fed.reports.figures.completions import draw_completions
from grpo_fed.reports.outcome import next_command
from grpo_fed.reports.page import page_html
from grpo_fed.reports.progress import RunHeader
from grpo_fed.reports.summary import summary_markdown
from grpo_fed.rl.records import Example
from grpo_fed.runs.colours import PALETTE
from grpo_fed.runs.equal_groups import describe_rounds, equal_groups_line, equal_groups_note
from grpo_fed.runs.examples import read_examples, write_examples
from grpo_fed.runs.history import read_history
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result, read_results
from tests.support.language_run import letters
from tests.support.small_federation import tiny

NOTE = "every group of flat had equal rewards: nothing could be learned from them"
LINE = "every group had equal rewards, so that nothing could be learned: flat in rounds 1 to 2"
CURE = "use a reward that tells completions apart, a larger group.size or a higher language.temperature"


@pytest.fixture(scope="module")
def federated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[RoundRecord]]:
    """A run of the federation, its result and its records."""
    folder, records = tmp_path_factory.mktemp("run") / "letters", []
    return folder, run(letters(), folder, watch=records.append), records


def printed(display: type[LineDisplay | LiveDisplay], run: tuple[Path, Result, list[RoundRecord]], width: int) -> str:
    """Print a whole run."""
    folder, result, records = run
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        height=40,
        force_terminal=display is LiveDisplay,
        color_system=None,
        highlight=False,
    )
    shown = display(console)
    shown.begin(RunHeader(letters(), "cpu", folder, "grpo"))
    for record in records:
        shown.round(record)
    if isinstance(shown, LiveDisplay):
        console.print(shown.live.get_renderable())
    shown.stop()
    shown.end(result)
    return file.getvalue()


def test_rounds_are_described_as_spans():
    assert describe_rounds([3]) == "round 3"
    assert describe_rounds([1, 2, 3, 7]) == "rounds 1 to 3, 7"
    assert describe_rounds([1, 3, 5, 7, 9, 11]) == "rounds 1, 3, 5, 7 and 2 more times"


def test_of_many_clients_three_are_named():
    assert equal_groups_note(["a"]) == "every group of a had equal rewards: nothing could be learned from them"
    assert " of a and b had " in equal_groups_note(["a", "b"])
    assert " of a, b, c and 2 more clients had " in equal_groups_note(["a", "b", "c", "d", "e"])
    assert equal_groups_note([]) == equal_groups_line({}) == ""
    line = equal_groups_line({"a": [1], "b": [1, 2], "c": [4], "d": [5]})
    assert "learned: b in rounds 1 to 2, a in round 1, c in round 4 and 1 more client; use a reward" in line


def test_a_round_in_which_nothing_could_be_learned_has_a_note(federated: tuple[Path, Result, list[RoundRecord]]):
    folder, result, records = federated
    assert [record.equal for record in records] == [(), ("flat",), ("flat",)]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["notes"] for line in lines] == [[NOTE], [NOTE]]
    assert result.equal == {"flat": [1, 2]}
    results = read_results(folder)
    assert results is not None
    assert results["equal"] == {"flat": [1, 2]}
    assert Result.from_json(results, folder) == Result.from_json(result.to_json(), folder)


def test_a_client_that_learns_alone_has_the_note_too(tmp_path: Path):
    result = train(letters("rounds=1"), tmp_path / "run")
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines())
    assert line["notes"] == [NOTE]
    assert result.equal == {"flat": [1]}
    assert "Round 1: every group of flat" in summary_markdown(read_history(tmp_path / "run"))


@pytest.mark.parametrize("width", [80, 120])
def test_lines_count_completions_and_say_once_what_teaches_nothing(
    federated: tuple[Path, Result, list[RoundRecord]], width: int
):
    text = printed(LineDisplay, federated, width)
    assert "2 rounds of 16 completions, grpo, dr-grpo" in text
    assert text.count(f"note: {NOTE}\n") == 1
    assert f"note: {LINE}; {CURE}\n" in text
    assert "completions/s" in text
    assert " equal groups " in text
    assert "entropy" not in text
    assert "steps" not in text
    assert "KL 0.0000  equal" not in text
    assert ", 64 completions in " in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_table_has_the_columns_that_have_values(federated: tuple[Path, Result, list[RoundRecord]], width: int):
    text = printed(LiveDisplay, federated, width)
    head, *_ = (line for line in text.splitlines() if "by round" in line)
    before = ["before"] if width == 120 else []
    assert head.split() == ["client", *before, "return", "best", "equal", "groups", "by", "round", "departed"]
    assert f"note: {NOTE}" in " ".join(text.split())
    lines = re.sub(r"\x1b\[[?\d;]*\w", "", text).splitlines()
    followed = [line for line in lines if not line.startswith(("letters: return", "note: every", "next:"))]
    assert max(map(len, followed)) <= width


def test_json_lines_have_the_note(federated: tuple[Path, Result, list[RoundRecord]]):
    out, err = io.StringIO(), io.StringIO()
    display = JsonDisplay(out, Console(file=err), quiet=False)
    for record in federated[2]:
        display.round(record)
    display.end(federated[1])
    documents = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [document.get("notes") for document in documents] == [[NOTE], [NOTE], None]
    assert documents[-1]["equal"] == {"flat": [1, 2]}


def test_the_next_command_gives_the_client_a_prompt(federated: tuple[Path, Result, list[RoundRecord]]):
    folder, result, _ = federated
    first = json.loads((folder / "examples" / "flat.jsonl").read_text().splitlines()[0])["prompt"]
    assert next_command(result) == f'grpo-fed play {folder} --client flat --prompt "{first}"'
    (folder / "examples" / "flat.jsonl").rename(folder / "away")
    try:
        assert next_command(result).endswith('--prompt "..."')
    finally:
        (folder / "away").rename(folder / "examples" / "flat.jsonl")


def test_the_summary_counts_completions_and_has_the_cure(federated: tuple[Path, Result, list[RoundRecord]]):
    text = summary_markdown(read_history(federated[0]))
    assert "64 completions," in text
    assert "environment" not in text
    assert f"- Rounds 1 to 2: {NOTE}" in text
    assert f"E{LINE[1:]}; {CURE}." in text


# Figures and the page -------------------------------------------------------------------------------------------------


def test_a_figure_has_rewards_by_function_and_the_shares(federated: tuple[Path, Result, list[RoundRecord]]):
    drawing = draw_completions(read_history(federated[0]))
    assert drawing is not None
    titles = ["reward exact", "reward length", "reward pattern", "groups with equal rewards", "completions cut off"]
    for title in (*titles, "tokens of a completion"):
        assert f">{title}<" in drawing.svg
    assert "reward pattern 0.00" in drawing.alt


def test_a_client_has_the_same_colour_in_every_panel(federated: tuple[Path, Result, list[RoundRecord]]):
    drawing = draw_completions(read_history(federated[0]))
    assert drawing is not None
    colours = {name: set(re.findall(rf"fill: (#\w+)[^>]*>{name}<", drawing.svg)) for name in ("up", "flat")}
    assert colours == {"up": {PALETTE[0]}, "flat": {PALETTE[1]}}


def test_a_run_with_environments_has_no_such_figure(tmp_path: Path):
    train(tiny(), tmp_path / "run")
    assert draw_completions(read_history(tmp_path / "run")) is None


def test_clients_with_prompts_are_not_filmed_and_no_problem(federated: tuple[Path, Result, list[RoundRecord]]):
    for clients in ((), ("up",)):
        filmed = film_episodes(federated[0], clients)
        assert filmed == FilmedEpisodes((), ())
    assert not (federated[0] / "episodes").exists()


def test_the_summary_and_the_page_have_the_examples(federated: tuple[Path, Result, list[RoundRecord]]):
    history = read_history(federated[0])
    first = read_examples(federated[0], "up")[0]
    summary, page = summary_markdown(history), page_html(history)
    row = f"| up | `{first.prompt}` | {markdown_cell(first.before)} | {first.before_reward:.2f} |"
    assert row in summary
    assert f"<code>{first.prompt}</code>" in page
    assert '<figure id="completions">' in page
    assert "Rounds 1 to 2: every group of flat had equal rewards" in page


def markdown_cell(text: str) -> str:
    return f"`{text}`" if text else "`∅`"


def test_texts_of_examples_are_escaped_and_their_lines_visible(
    federated: tuple[Path, Result, list[RoundRecord]], tmp_path: Path
):
    folder = tmp_path / "run"
    shutil.copytree(federated[0], folder)
    hostile = "<script>alert(1)</script> `code` | [link](http://a)\nsecond\x1b[31m"
    write_examples(folder, "up", [Example(hostile, "", 0.0, "x" * 1000, 1.0)])
    history = read_history(folder)
    page, summary = page_html(history), summary_markdown(history)
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; `code` | [link](http://a)↵second\ufffd[31m"
    assert f'<td class="text"><code>{escaped}</code></td>' in page
    assert "<script" not in page
    assert "``<script>alert(1)</script> `code` \\| [link](http://a)↵second\ufffd[31m``" in summary
    assert "| `∅` | 0.00 |" in summary
    assert "x" * 401 not in summary
    assert "\x1b" not in page + summary
