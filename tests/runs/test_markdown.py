"""Words of clients and scenarios are shown as they are: they make no link, image, code or HTML."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fed.reports.page import page_html
from grpo_fed.reports.summary import summary_markdown
from grpo_fed.runs.history import read_history
from grpo_fed.runs.markdown import escape_markdown, plain
from grpo_fed.runs.records import Failure
from grpo_fed.runs.tracking.run_page import page_at_end
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run

HOSTILE = "`x` <script>alert(1)</script> ![a](http://evil/a.png) [b](http://evil) [c][d] \n\n# Title \\<b>"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a <b> c", r"a \<b> c"),
        ("1 < 2, a[3] and b_c * 2", "1 < 2, a[3] and b_c * 2"),
        ("[a](http://x)", r"\[a]\(http://x)"),
        ("![a](http://x)", r"!\[a]\(http://x)"),
        ("<http://x>", r"\<http://x>"),
        (r"\<b>", r"\\\<b>"),
        ("# a", r"\# a"),
        ("`a<b>` <c>", r"`a<b>` \<c>"),
        ("", ""),
    ],
)
def test_markdown_by_hand(text: str, escaped: str):
    assert escape_markdown(text) == escaped


def test_foreign_words_are_one_line_without_code():
    assert plain("a`b`\n\nc\x1b[31m") == "a'b' c [31m"


def test_what_clients_and_scenarios_say_is_escaped_wherever_it_is_shown(tmp_path: Path):
    scenario = sample_scenario(more="rounds = 2").model_copy(update={"description": HOSTILE})
    sample = SampleRun(failure=lambda round_, client: Failure("raised", HOSTILE) if client == 0 else None)
    history = read_history(write_run(tmp_path, scenario, sample))
    page = page_html(history)
    assert "<script>" not in page
    assert "<b>" not in page
    assert 'src="http' not in page
    params = {"rounds": 2, "method": HOSTILE, "seed": 0}
    begin = {"scenario": "made", "description": HOSTILE, "clients": {}, "params": params}
    assert history.results is not None
    document = {**history.results, "error": HOSTILE, "missing": {"cart-0": [[1, "raised", HOSTILE]]}}
    document["clients"]["cart-0"]["env_steps"] = 0
    for text in (summary_markdown(history), page_at_end(begin, document, "failed")):
        assert r"\<script>" in text
        assert "<script>" not in text.replace(r"\<", "")
        assert "](" not in text.replace("](figures/", "")
        assert "\n# Title" not in text
        assert "`x`" not in text
