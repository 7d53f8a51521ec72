"""Figures for a paper: as wide as its columns, without titles, with captions in a file of their own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from grpo_fed.reports.charts import label_line, make_drawing
from grpo_fed.reports.latex import escape_latex, tabular
from grpo_fed.reports.paper import PAPERS, find_paper, write_paper, write_paper_figures
from grpo_fed.runs.history import read_history
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run


def paint(figure: object) -> None:
    axes = figure.subplots()  # type: ignore[attr-defined]
    axes.plot([0, 1], [-1, 1])
    axes.imshow([[0, 1]], extent=(0, 1, 0, 1))
    label_line(axes, 1.0, "a_$1 & 50 %", "#000000")


DRAWING = make_drawing("signs", "Signs of 50 %", "Read `a_b`.", "signs", 2.0, paint)


@pytest.fixture
def no_latex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be found that could be LaTeX, nor be started."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_latex")
def test_a_drawing_is_written_without_latex_as_wide_as_a_column(tmp_path: Path):
    paths = write_paper_figures(tmp_path, [DRAWING], PAPERS["icml"])
    assert [path.name for path in paths] == ["signs.pdf", "signs.pgf", "figures.tex"]
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", paths[0].read_bytes())
    assert box is not None
    assert float(box[1]) == 3.25 * 72
    assert float(box[2]) == pytest.approx(2.0 * (3.25 / 8) ** 0.5 * 72)
    pgf = paths[1].read_text()
    assert r"a\_\$1 \& 50 \%" in pgf
    assert "Signs of 50" not in pgf
    assert r"\pgfqpoint{3.250000in}" in pgf
    assert r"{\includegraphics" in pgf
    assert "mathdefault" not in pgf  # numbers are text like all others, since names may have a dollar in them
    assert "}0.5}}%" in pgf
    assert (tmp_path / "signs-img0.png").is_file()


def test_the_letters_of_a_paper_are_embedded_as_outlines_that_printers_take(tmp_path: Path):
    content = write_paper_figures(tmp_path, [DRAWING], PAPERS["neurips"])[0].read_bytes()
    assert b"STIXGeneral" in content
    assert b"/Type3" not in content


def test_captions_are_apart_and_escaped(tmp_path: Path):
    text = write_paper_figures(tmp_path, [DRAWING], PAPERS["ieee-wide"])[-1].read_text()
    assert text.startswith("\\begin{figure*}\n")
    assert r"\caption{\textbf{Signs of 50 \%.} Read \texttt{a\_b}.}" in text
    assert r"\label{fig:signs}" in text


def test_a_run_gets_all_of_its_figures_and_loses_those_of_an_earlier_call(tmp_path: Path):
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 2"), SampleRun()))
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "old.pdf").write_text("")
    names = {path.stem for path in write_paper(history, PAPERS["article"]) if path.suffix == ".pdf"}
    assert {"learning", "kl", "bytes"} <= names
    assert not (tmp_path / "paper" / "old.pdf").exists()


def test_an_unknown_paper_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="--paper nature: must be one of article neurips iclr icml"):
        find_paper("nature")


def test_latex_prints_every_sign_as_it_is():
    assert escape_latex("100 % & $x_1^2$ ~ {a}\\b < \u2265") == (
        r"100 \% \& \$x\_1\textasciicircum{}2\$ \textasciitilde{} \{a\}\textbackslash{}b \ensuremath{<} "
        r"\ensuremath{\geq}"
    )
    assert escape_latex("an odd ` stays") == "an odd ` stays"
    assert tabular(["a", "b"], [["x_1", "2"]], "lr").splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a & b \\",
        r"\midrule",
        r"x\_1 & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
