"""What people see of a run.

    explain.py           a scenario in sentences, before it runs
    explain_merge.py     the sentences about its merge
    explain_constraints.py the sentences about a client's constraints
    explain_language.py  the sentences about a language model
    explain_privacy.py   the sentences about privacy and its price
    explain_secure.py    the sentences about secure aggregation
    explain_setups.py    the sentences about what runs start from
    overview.py          a scenario in tables, before it runs: clients, policies, blocks, bytes
    progress.py          the progress of a run as records, and a round as a line of text
    displays.py          displays of a run that goes on: live table, lines, JSON, quiet
    outcome.py           the outcome of a run on the terminal
    tables.py            tables of clients on the terminal
    formatting.py        numbers, counts and lists of names as people read them
    axis.py              what their horizontal axis counts
    charts.py            what all figures share: style, colours, labels
    figures/             the figures of a run
    film.py              an episode as a film
    episodes.py          which episodes of a run are filmed
    summary.py           a run in words: summary.md
    sections.py          the parts of such a summary
    score_text.py    the scores of a run in words
    section.py           their form: paragraphs, lists, tables
    twins_section.py     the part about whether sharing pays
    privacy_section.py   the part about what was spent of a privacy budget
    site_sections.py     the part about sites
    beside.py            what is done in a process beside this one
    page.py              a run on one page: report.html
    reproduction_section.py the part about how to make the run again
    paper.py             figures for a paper: PDF, PGF, captions
    latex.py             text and tables as LaTeX
    comparison/          methods side by side, with intervals
    sweep/               one scenario with many values
    attack_board.py      attacks against merge rules

Begin with summary.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.reports.comparison.compare import compare
    from grpo_fed.reports.episodes import film_episodes
    from grpo_fed.reports.explain import explain_scenario
    from grpo_fed.reports.figures.write import draw_figures
    from grpo_fed.reports.page import write_page
    from grpo_fed.reports.summary import write_summary

__all__ = [
    "compare",
    "draw_figures",
    "explain_scenario",
    "film_episodes",
    "write_page",
    "write_summary",
]

MODULES = {
    "compare": "grpo_fed.reports.comparison.compare",
    "draw_figures": "grpo_fed.reports.figures.write",
    "explain_scenario": "grpo_fed.reports.explain",
    "film_episodes": "grpo_fed.reports.episodes",
    "write_page": "grpo_fed.reports.page",
    "write_summary": "grpo_fed.reports.summary",
}

__getattr__ = lazy_getattr(__name__, MODULES)
