"""Figures: numbers by hand before they are drawn, and the contents of the files."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grpo_fed.reports.charts import (
    DARK_COLOURS,
    DEPARTED_COLOUR,
    SHARED_COLOUR,
    Drawing,
    inline_svg,
    label_line,
    make_drawing,
    spread_positions,
)
from grpo_fed.reports.figures.constraints import draw_costs
from grpo_fed.reports.figures.cost import draw_traffic
from grpo_fed.reports.figures.evidence import draw_evidence
from grpo_fed.reports.figures.learning import draw_learning
from grpo_fed.reports.figures.sharing import draw_clusters, draw_groups
from grpo_fed.reports.figures.stepping import draw_kl, draw_steps
from grpo_fed.reports.figures.write import ORDER, draw_all, draw_figures
from grpo_fed.reports.summary import summary_markdown
from grpo_fed.runs.colours import PALETTE
from grpo_fed.runs.folder import check_unfinished
from grpo_fed.runs.history import fill_forward, read_history
from grpo_fed.runs.records import Failure
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run

SVG = "{http://www.w3.org/2000/svg}"


def png_names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths if path.suffix == ".png"]


def read_pixels(file: Path | bytes) -> np.ndarray:
    """[height, width, 3]."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
        return np.asarray(picture.convert("RGB"))


def has_colour(array: np.ndarray, colour: str) -> np.ndarray:
    """Mark the pixels that have exactly this colour."""
    return (array == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(axis=-1)


def texts(drawing: Drawing | None) -> list[str]:
    """All texts of a drawing."""
    assert drawing is not None
    return [text.text or "" for text in ElementTree.fromstring(drawing.svg).iter(f"{SVG}text")]


# Reading a folder -----------------------------------------------------------------------------------------------------


def test_a_client_without_a_new_episode_has_its_last_return(tmp_path: Path):
    returns = {(1, 0): None, (2, 0): 5.0, (3, 0): None, (1, 1): 7.0, (2, 1): 8.0, (3, 1): 9.0}
    made = SampleRun(returns=lambda number, client: returns[number, client])
    history = read_history(write_run(tmp_path, sample_scenario([("cart", 2, "CartPole-v1")], "rounds = 3"), made))
    np.testing.assert_array_equal(history.returns, [[np.nan, 7], [5, 8], [5, 9]])


def test_gaps_are_filled_forwards_and_never_backwards():
    nan = np.nan
    np.testing.assert_array_equal(fill_forward(np.array([nan, 1, nan, nan, 2])), [nan, 1, 1, 1, 2])
    assert fill_forward(np.zeros((0, 3))).shape == (0, 3)


def test_departures_are_read_from_the_lines_of_rounds(tmp_path: Path):
    made = SampleRun(
        departed=lambda number, client: ("actor",) if client == 2 and number in (2, 3) else (), finished=False
    )
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 4"), made))
    assert tuple(history.block_of_group) == ("torso.0", "torso.1", "actor")
    expected = np.zeros((4, 3, 3), bool)
    expected[1:3, 2, 2] = True
    np.testing.assert_array_equal(history.departed, expected)
    assert (history.status, history.personal["cart-2"]) == ("unfinished", ())


def test_missing_answers_are_the_same_with_and_without_results(tmp_path: Path):
    made = SampleRun(
        failure=lambda number, client: Failure("late", "no answer") if (number, client) == (2, 1) else None
    )
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 3"), made))
    (miss,) = history.missing["cart-1"]
    assert (miss.round, miss.kind, miss.reason) == (2, "late", "no answer")
    (tmp_path / "results.json").unlink()
    without = read_history(tmp_path)
    expected = np.zeros((3, 3), bool)
    expected[1, 1] = True
    for read in (history, without):
        np.testing.assert_array_equal(read.failed, expected)
        np.testing.assert_array_equal(read.trained, ~expected)


def test_a_line_that_was_cut_off_is_ignored(tmp_path: Path):
    write_run(tmp_path, sample_scenario(more="rounds = 3"))
    path = tmp_path / "rounds.jsonl"
    path.write_text(path.read_text()[:-40])
    assert read_history(tmp_path).rounds.tolist() == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path):
    write_run(tmp_path, sample_scenario(more="rounds = 3"))
    path = tmp_path / "rounds.jsonl"
    path.write_text(path.read_text().replace('{"round": 2', '{"round" 2'))
    with pytest.raises(ValueError, match=r"rounds\.jsonl:2: is no line of a run"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"round": 2', '"round": 1', "round = 1 comes after 1"),
        ('"round": 2', '"round": "two"', "round = 'two' comes after 1"),
        ('"global_step": ', '"global_step": "x", "was": ', "global_step = 'x' is no number"),
        ('"clients": {', '"clients": [], "was": {', "names no clients"),
    ],
)
def test_a_line_with_invalid_values_is_named(tmp_path: Path, old: str, new: str, why: str):
    path = write_run(tmp_path, sample_scenario(more="rounds = 3")) / "rounds.jsonl"
    lines = path.read_text().splitlines()
    assert old in lines[1]
    path.write_text("\n".join([lines[0], lines[1].replace(old, new), lines[2], ""]))
    with pytest.raises(ValueError, match=r"rounds\.jsonl:2: is no line of a run: .*" + re.escape(why)):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ("[1]", "no table of results"),
        ("{}", "has no scenario"),
        ('{"scenario": 3}', "scenario is 3"),
        (None, "clients is 0"),
    ],
)
def test_damaged_results_are_named_with_the_cure(tmp_path: Path, content: str | None, why: str):
    path = write_run(tmp_path, sample_scenario(more="rounds = 3")) / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "clients": 0}) if content is None else content)
    for read in (read_history, check_unfinished):
        with pytest.raises(ValueError, match=rf"results\.json: is damaged: .*{why}.*; remove it"):
            read(tmp_path)


# Files ----------------------------------------------------------------------------------------------------------------

ALL = ["learning", "kl", "steps", "bytes", "time"]


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (8, 30), (1000, 4)])
def test_every_size_of_run_has_its_figures(tmp_path: Path, clients: int, rounds: int):
    def has_departed(round_: int, client: int) -> bool:
        return 2 * client + 1 >= clients and 2 * round_ > rounds

    half = SampleRun(
        departed=lambda number, client: ("actor",) if has_departed(number, client) else (),
        clusters=lambda number, client: {"torso.0": 0, "actor": int(has_departed(number, client))},
        zeros=lambda number, client: number / rounds,
        rho=lambda number, client: {"actor": client / clients},
    )
    of = sample_scenario([("cart", clients, "CartPole-v1")], f"rounds = {rounds}")
    paths = draw_figures(write_run(tmp_path, of, half))
    # these take prompts, a limit on costs, `evaluate.adapt`, twins, sites, a privacy budget and callbacks
    others = ("completions", "costs", "adaptation", "twins", "sites", "privacy", "callbacks")
    assert png_names(paths) == [name for name in ORDER if name not in others]
    for path in paths:
        if path.suffix == ".png":
            array = read_pixels(path)
            assert array.shape[1] == 1600
            assert (array < 200).any(axis=-1).mean() > 0.005
        else:
            assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"


def test_a_run_without_federation_has_returns_and_time(tmp_path: Path):
    paths = draw_figures(
        write_run(tmp_path, sample_scenario(more='method = "local"\nrounds = 5'), SampleRun(federated=False))
    )
    assert png_names(paths) == ["learning", "time"]


def test_an_unfinished_run_has_figures_of_its_rounds(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario(more="rounds = 50"), SampleRun(rounds=7, finished=False))
    assert png_names(draw_figures(folder)) == ALL
    assert "over 7 rounds" in next(draw_all(read_history(folder))).alt


def test_a_run_without_rounds_has_no_figures(tmp_path: Path):
    assert draw_figures(write_run(tmp_path, sample_scenario()))
    (tmp_path / "rounds.jsonl").write_text("")
    assert draw_figures(tmp_path) == []
    assert list((tmp_path / "figures").iterdir()) == []


def test_budgets_without_a_limit_are_not_drawn(tmp_path: Path):
    of = sample_scenario(more='rounds = 5\nmethod = "fedavg"')
    folder = write_run(tmp_path, of, SampleRun(budget=float("inf")))
    history = read_history(folder)
    with_joint = draw_kl(history)
    assert with_joint is not None
    assert has_colour(read_pixels(with_joint.png), PALETTE[1]).any()  # together at most 0.05
    for line in history.lines:
        line.pop("budget/joint")  # type: ignore[attr-defined]
    without = draw_kl(history)
    assert "There is no budget." in " ".join(texts(without))
    assert without is not None
    assert not has_colour(read_pixels(without.png), PALETTE[1]).any()


def test_the_same_folder_gives_the_same_files_to_the_byte(tmp_path: Path):
    folder = write_run(
        tmp_path, sample_scenario(more="rounds = 6"), SampleRun(departed=lambda number, client: ("actor",))
    )
    for draw in (draw_learning, draw_groups):
        first, second = draw(read_history(folder)), draw(read_history(folder))
        assert first is not None
        assert second is not None
        assert (first.png, first.svg, first.bare_svg) == (second.png, second.svg, second.bare_svg)


def test_the_alternative_text_has_the_numbers(tmp_path: Path):
    # 100, 101, 102, 103: the interquartile mean is that of 101 and 102. KL 0.01 of 0.02, together 0.02 of 0.05.
    folder = write_run(tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))
    alts = {drawing.name: drawing.alt for drawing in draw_all(read_history(folder))}
    assert "CartPole-v1: at the end interquartile mean 101.5, from 100.0 to 103.0" in alts["learning"]
    assert "all blocks at most 0.02 of 0.05; torso.0 at most 0.01 of 0.02" in alts["kl"]
    assert alts["steps"].endswith("torso.0 0.50, torso.1 0.50, actor 0.50.")
    # 3 rounds of 1 kB up and 2 kB down for each of 4 clients.
    assert "12.0 kB up, 24.0 kB down" in alts["bytes"]


def test_the_figure_of_the_penalty_tells_zeros_and_norms(tmp_path: Path):
    # Shares 0.1 and 0.3 in the last of 3 rounds: 20 % in the mean, and half of that as the norms.
    made = SampleRun(zeros=lambda number, client: number * (1 + 2 * client) / 30)
    folder = write_run(tmp_path, sample_scenario([("cart", 2, "CartPole-v1")], "rounds = 3"), made)
    (alt,) = [drawing.alt for drawing in draw_all(read_history(folder)) if drawing.name == "penalty"]
    assert alt.startswith("At the end 20 % of the penalised groups are exactly at zero.")
    assert alt.endswith("torso.0 0.1, torso.1 0.1, actor 0.1.")


def test_the_figure_of_costs_has_the_limit_as_a_line_and_tells_who_keeps_it(tmp_path: Path):
    # Costs 1 and 3 in the last of 3 rounds: one of them within 1.5, 2 in the mean.
    made = SampleRun(cost=lambda number, client: number * (1 + 2 * client) / 3)
    limited = sample_scenario([("point", 2, "grpo_fed/PointMass-v0")], "rounds = 3\nobjective.cost.limit = 1.5")
    history = read_history(write_run(tmp_path / "limited", limited, made))
    drawing = draw_costs(history)
    assert drawing is not None
    assert drawing.alt == (
        "At the end 1 of 2 clients cost no more than the limit of 1.5; the mean cost is 2, at most 3."
    )
    assert "price of costs" in texts(drawing)
    free = sample_scenario([("point", 2, "grpo_fed/PointMass-v0")], "rounds = 3")
    assert draw_costs(read_history(write_run(tmp_path / "free", free))) is None


def test_the_map_has_a_cell_for_each_departure(tmp_path: Path):
    # Of 4 clients and 10 rounds one client leaves the actor after round 5: 5 of 40 cells, and none of the torso.
    made = SampleRun(departed=lambda number, client: ("actor",) if client == 3 and number > 5 else ())
    folder = write_run(tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 10"), made)
    drawn = draw_groups(read_history(folder))
    assert drawn is not None
    shares = []
    for encoded in re.findall(r"base64,([^\"]+)", drawn.svg):
        cells = read_pixels(base64.b64decode(encoded))
        orange, blue = has_colour(cells, DEPARTED_COLOUR), has_colour(cells, SHARED_COLOUR)
        assert (orange | blue).all()
        shares.append(orange.mean())
    assert shares == pytest.approx([0, 0, 5 / 40], abs=0.01)


def test_the_map_of_clusters_has_a_colour_for_each_cluster(tmp_path: Path):
    # Of 4 clients and 10 rounds client 3 is alone with its actor after round 5; all share the torso.
    def clusters(number: int, client: int) -> dict[str, int]:
        return {"torso.0": 0, "actor": int(client == 3 and number > 5)}

    folder = write_run(
        tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 10"), SampleRun(clusters=clusters)
    )
    history = read_history(folder)
    assert history.clustered == ("torso.0", "actor")
    drawn = draw_clusters(history)
    assert drawn is not None
    assert drawn.alt == "At the end all clients share torso.0, actor is shared in 2 clusters, the main one and cart-3."
    shares = []
    for encoded in re.findall(r"base64,([^\"]+)", drawn.svg):
        cells = read_pixels(base64.b64decode(encoded))
        orange, blue = has_colour(cells, DEPARTED_COLOUR), has_colour(cells, SHARED_COLOUR)
        assert (orange | blue).all()
        shares.append(orange.mean())
    assert shares == pytest.approx([0, 5 / 40], abs=0.01)
    assert draw_groups(history) is None
    text = summary_markdown(history)
    assert "- `torso.0`: shared by all." in text
    assert "- `actor`: shared in 2 clusters: `cart-0`, `cart-1`, `cart-2` (#0); `cart-3` (#1)." in text
    assert "| cart-3 |" in text
    assert "| `actor #1` |" in text


def evidence_run(left_round: int = 4, back_round: int | None = None) -> SampleRun:
    """Make a run in which client 3 leaves the actor with rho 0.93, and all others have 0.1."""

    def is_out(number: int, client: int) -> bool:
        return client == 3 and left_round <= number < (back_round or 99)

    def rho(number: int, client: int) -> dict[str, float]:
        if number < 4:
            return {}
        known = {} if is_out(number - 1, client) else {"actor": 0.93 if client == 3 else 0.1}
        return {"torso.0": 0.1, **known}

    return SampleRun(
        rho=rho,
        departed=lambda number, client: ("actor",) if is_out(number, client) else (),
        left=lambda number, client: {"actor": 0.93} if client == 3 and number == left_round else {},
        returned=lambda number, client: {"actor": 12.0} if client == 3 and number == back_round else {},
    )


def test_evidence_has_a_panel_for_each_compared_block_a_line_at_one_half_and_a_mark_of_the_departure(tmp_path: Path):
    of = sample_scenario([("cart", 3, "CartPole-v1"), ("odd", 2, "CartPole-v1")], "rounds = 10")
    history = read_history(write_run(tmp_path, of, evidence_run()))
    assert history.compared == ("torso.0", "actor")
    drawn = draw_evidence(history)
    assert drawn is not None
    assert drawn.alt == "rho of 5 clients by round: odd-0 left actor in round 4 with rho 0.93."
    words = texts(drawn)
    assert {"torso.0", "actor", "0.5", "odd-0", "cart (3)", "odd (2)"} <= set(words)
    assert "torso.1" not in words
    assert "Filled mark: it leaves." in " ".join(words)
    assert "Open mark" not in " ".join(words)


def test_evidence_marks_a_return(tmp_path: Path):
    of = sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 10")
    history = read_history(write_run(tmp_path, of, evidence_run(back_round=8)))
    assert [(move.round, move.client, move.group, move.left, move.evidence) for move in history.moves] == [
        (4, 3, "actor", True, 0.93),
        (8, 3, "actor", False, 12.0),
    ]
    assert history.departures["cart-3"] == {}
    assert "Open mark: it returns." in " ".join(texts(draw_evidence(history)))


@pytest.mark.parametrize("entries", [1, 2, 15])
@pytest.mark.parametrize("clients", [30, 300])
def test_evidence_of_many_clients_names_their_entries_if_these_are_few(tmp_path: Path, entries: int, clients: int):
    of = sample_scenario([(f"e{n}", clients // entries, "CartPole-v1") for n in range(entries)], "rounds = 6")
    drawn = draw_evidence(read_history(write_run(tmp_path, of, evidence_run())))
    words = texts(drawn)
    assert [word for word in words if re.fullmatch(r"e\d+ \(\d+\)", word)] == (
        [f"e{n} ({clients // entries})" for n in range(2)] if entries == 2 else []
    )
    assert ("Bands:" in " ".join(words)) == (clients == 300)


def test_without_rho_there_is_no_figure_of_evidence(tmp_path: Path):
    made = SampleRun(departed=lambda number, client: ("actor",))
    assert draw_evidence(read_history(write_run(tmp_path, sample_scenario(more="rounds = 5"), made))) is None


def test_a_client_outside_the_latest_merge_has_no_cluster(tmp_path: Path):
    def clusters(number: int, client: int) -> dict[str, int]:
        return {} if client == 3 and number == 2 else {"actor": 0}

    folder = write_run(
        tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 2"), SampleRun(clusters=clusters)
    )
    history = read_history(folder)
    drawn = draw_clusters(history)
    assert drawn is not None
    assert drawn.alt == "At the end all clients of the latest merge share actor."
    text = summary_markdown(history)
    assert "Clusters are those of the latest merge." in text
    assert "- `actor`: shared by all clients of that merge." in text


def test_many_groups_are_shown_by_block(tmp_path: Path):
    more = 'rounds = 4\npolicy = { hidden = [16], groups = { "torso.*" = "row" } }'
    rows = tuple(f"torso.0.weight:rows[{row}]" for row in range(4))
    made = SampleRun(departed=lambda number, client: rows if client else ())
    folder = write_run(tmp_path, sample_scenario(more=more), made)
    drawn = draw_groups(read_history(folder))
    assert drawn is not None
    titles = re.findall(r">([^<>]* \(\d+ groups?\))<", drawn.svg)
    assert titles == ["torso.0 (16 groups)", "actor (1 group)"]
    assert "At the end 2 of 3 clients have departed from groups: cart-1 from torso.0.weight:rows[0]" in drawn.alt


def test_every_environment_has_a_panel(tmp_path: Path):
    of = sample_scenario([("cart", 3, "CartPole-v1"), ("pendulum", 1, "Pendulum-v1")], "rounds = 3")
    folder = write_run(tmp_path, of, SampleRun(returns=lambda number, client: 100.0 if client < 3 else -900.0))
    shown = texts(draw_learning(read_history(folder)))
    assert {"CartPole-v1", "Pendulum-v1", "cart-0", "pendulum"} <= set(shown)


def test_above_ten_lines_only_the_ends_have_names(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario([("cart", 15, "CartPole-v1")], "rounds = 3"))
    shown = texts(draw_learning(read_history(folder)))
    assert [text for text in shown if text.startswith("cart-")] == ["cart-14", "cart-0"]


# The style ------------------------------------------------------------------------------------------------------------


def test_labels_of_equal_lines_do_not_overlap(tmp_path: Path):
    folder = write_run(
        tmp_path, sample_scenario([("cart", 8, "CartPole-v1")], "rounds = 5"), SampleRun(returns=lambda *_: 100.0)
    )
    drawn = draw_learning(read_history(folder))
    assert drawn is not None
    labels = [
        text
        for text in ElementTree.fromstring(drawn.svg).iter(f"{SVG}text")
        if (text.text or "").startswith("cart-") or text.text == "IQM of clients"
    ]
    heights = sorted(float(text.attrib["y"]) for text in labels)
    assert len(heights) == 9
    assert min(high - low for low, high in pairwise(heights)) > 10  # points, of letters of 9


def test_positions_are_moved_as_little_as_possible():
    assert spread_positions([10, 10, 10], 4, 0, 100) == [6, 10, 14]
    assert spread_positions([50, 10, 52], 4, 0, 100) == [49, 10, 53]
    assert spread_positions([0, 1], 4, 0, 100) == [0, 4]
    assert spread_positions([99, 100], 4, 0, 100) == [96, 100]


@given(st.lists(st.floats(0, 100), max_size=12))
def test_spread_positions_keep_their_order_and_distance(wanted: list[float]):
    positions = spread_positions(wanted, 4.0, 0.0, 100.0)
    in_order = [positions[index] for index in sorted(range(len(wanted)), key=lambda index: wanted[index])]
    assert all(high - low >= 4 - 1e-9 for low, high in pairwise(in_order))
    assert all(-1e-9 <= position <= 100 + 1e-9 for position in in_order)


def test_figures_and_other_programs_do_not_share_a_style(tmp_path: Path):
    import matplotlib

    folder = write_run(tmp_path, sample_scenario(more="rounds = 2"))
    history = read_history(folder)
    first = draw_learning(history)
    assert first is not None
    picture = first.png
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        again = draw_learning(history)
        assert again is not None
        assert again.png == picture
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_when_a_figure_is_drawn(tmp_path: Path):
    write_run(tmp_path, sample_scenario(more="rounds = 2"))
    code = f"""
import sys
import grpo_fed.reports.comparison.compare, grpo_fed.reports.page
from grpo_fed.reports.figures.stepping import draw_steps
from grpo_fed.runs.history import read_history
assert "matplotlib" not in sys.modules
drawing = draw_steps(read_history({str(tmp_path)!r}))
assert "matplotlib" not in sys.modules
assert drawing.png
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_special_characters_of_a_name_are_drawn():
    def paint(figure: object) -> None:
        axes = figure.subplots()  # type: ignore[attr-defined]
        axes.plot([0, 1], [0, 1])
        label_line(axes, 1.0, "a$b$_c & <d>", PALETTE[0])

    drawing = make_drawing("signs", "x", "", 'says "a" & <b>', 2.0, paint)
    assert "a$b$_c & <d>" in texts(drawing)
    assert ElementTree.fromstring(inline_svg(drawing)).get("aria-label") == 'says "a" & <b>'


def test_a_figure_on_a_page_has_the_colours_of_the_page(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario(more="rounds = 2"), SampleRun(departed=lambda *_: ("actor",)))
    history = read_history(folder)
    drawings = [drawing for drawing in (draw_learning(history), draw_groups(history)) if drawing is not None]
    for drawing in drawings:
        text = inline_svg(drawing)
        assert not [colour for colour in DARK_COLOURS if colour in text]
        assert "var(--ink)" in text
    elements = [element for drawing in drawings for element in ElementTree.fromstring(inline_svg(drawing)).iter()]
    ids = [element.get("id") for element in elements if element.get("id")]
    assert len(ids) == len(set(ids))


def test_colours_differ_for_readers_with_colour_blindness():
    # Vienot, Brettel and Mollon 1999: linear RGB, what a deuteranope and a protanope see of it.
    def linear(colour: str) -> np.ndarray:
        values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        return values**2.2

    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    for matrix in (deutan, protan):
        for pair in ((PALETTE[0], PALETTE[1]), (SHARED_COLOUR, DEPARTED_COLOUR), *pairwise(PALETTE[:6])):
            seen = [np.clip(matrix @ linear(colour), 0, 1) ** (1 / 2.2) for colour in pair]
            assert np.abs(seen[0] - seen[1]).max() > 0.15, pair


def test_equal_lines_are_one_line_with_all_names(tmp_path: Path):
    folder = write_run(tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))  # alpha = 0.5 everywhere
    history = read_history(folder)
    assert "all blocks" in texts(draw_steps(history))
    for line in history.lines:
        line["alpha/actor"] = 1.0  # type: ignore[index]
    shown = texts(draw_steps(read_history(folder)))
    assert "all blocks" in shown  # the file has not changed
    shown = texts(draw_steps(history))
    assert {"torso.0, torso.1", "actor"} <= set(shown)
    assert "all blocks" not in shown


def test_the_bytes_of_a_run_include_its_evaluations(tmp_path: Path):
    # 12 kB up and 24 kB down in the rounds
    folder = write_run(tmp_path, sample_scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "bytes_up": 13_000, "bytes_down": 30_000}))
    shown = " ".join(texts(draw_traffic(read_history(folder))))
    assert "all rounds: 12.0 kB up, 24.0 kB down; with the evaluations before and after them 43.0 kB" in shown
    (folder / "results.json").unlink()
    assert "evaluations before" not in " ".join(texts(draw_traffic(read_history(folder))))
