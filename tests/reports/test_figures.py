"""Figures: numbers by hand before they are drawn, and the files that come of it, opened and looked into."""

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

from grpo_fed.reports import charts, figures
from grpo_fed.reports.charts import PALETTE, PERSONAL, SHARED, Drawing, drawing, inline, spread
from grpo_fed.reports.figures import draw_figures, drawings
from grpo_fed.reports.summary import markdown
from grpo_fed.runs.folder import check_unfinished
from grpo_fed.runs.history import fill_forward, read_history
from grpo_fed.runs.records import Failure
from tests.support.sample_run_folder import Made, scenario, write_run

SVG = "{http://www.w3.org/2000/svg}"


def names(paths: list[Path]) -> list[str]:
    """Of the PNGs."""
    return [path.stem for path in paths if path.suffix == ".png"]


def opened(file: Path | bytes) -> np.ndarray:
    """[height, width, 3]."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
        return np.asarray(picture.convert("RGB"))


def has(array: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture has this colour to the letter."""
    return (array == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(axis=-1)


def texts(one: Drawing | None) -> list[str]:
    assert one is not None
    return [text.text or "" for text in ElementTree.fromstring(one.svg).iter(f"{SVG}text")]


# What a folder tells --------------------------------------------------------------------------------------------------


def test_a_client_that_finished_no_episode_still_has_its_last_return(tmp_path: Path):
    returns = {(1, 0): None, (2, 0): 5.0, (3, 0): None, (1, 1): 7.0, (2, 1): 8.0, (3, 1): 9.0}
    made = Made(returns=lambda number, client: returns[number, client])
    history = read_history(write_run(tmp_path, scenario([("cart", 2, "CartPole-v1")], "rounds = 3"), made))
    np.testing.assert_array_equal(history.returns, [[np.nan, 7], [5, 8], [5, 9]])


def test_gaps_are_filled_forwards_and_never_backwards():
    nan = np.nan
    np.testing.assert_array_equal(fill_forward(np.array([nan, 1, nan, nan, 2])), [nan, 1, 1, 1, 2])
    assert fill_forward(np.zeros((0, 3))).shape == (0, 3)


def test_who_left_what_is_known_from_the_lines_alone(tmp_path: Path):
    made = Made(left=lambda number, client: ("actor",) if client == 2 and number in (2, 3) else (), finished=False)
    history = read_history(write_run(tmp_path, scenario(more="rounds = 4"), made))
    assert tuple(history.block_of_group) == ("torso.0", "torso.1", "actor")
    expected = np.zeros((4, 3, 3), bool)
    expected[1:3, 2, 2] = True
    np.testing.assert_array_equal(history.departed, expected)
    assert (history.status, history.personal["cart-2"]) == ("unfinished", ())


def test_who_was_missing_is_the_same_with_and_without_results(tmp_path: Path):
    made = Made(failure=lambda number, client: Failure("late", "no answer") if (number, client) == (2, 1) else None)
    history = read_history(write_run(tmp_path, scenario(more="rounds = 3"), made))
    (miss,) = history.missing["cart-1"]
    assert (miss.round, miss.kind, miss.reason) == (2, "late", "no answer")
    (tmp_path / "results.json").unlink()
    without = read_history(tmp_path)
    expected = np.zeros((3, 3), bool)
    expected[1, 1] = True
    for one in (history, without):
        np.testing.assert_array_equal(one.failed, expected)
        np.testing.assert_array_equal(one.trained, ~expected)


def test_a_line_that_was_cut_off_is_not_there(tmp_path: Path):
    write_run(tmp_path, scenario(more="rounds = 3"))
    path = tmp_path / "rounds.jsonl"
    path.write_text(path.read_text()[:-40])
    assert read_history(tmp_path).rounds.tolist() == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path):
    write_run(tmp_path, scenario(more="rounds = 3"))
    path = tmp_path / "rounds.jsonl"
    path.write_text(path.read_text().replace('{"round": 2', '{"round" 2'))
    with pytest.raises(ValueError, match=r"rounds\.jsonl:2: is no line of a run"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"round": 2', '"round": 1', "round = 1 comes after 1"),
        ('"round": 2', '"round": "two"', "round = 'two' comes after 1"),
        ('"global_step": ', '"global_step": "x", "was": ', 'global_step = "x" is no number'),
        ('"clients": {', '"clients": [], "was": {', "names no clients"),
    ],
)
def test_a_line_with_something_else_in_it_is_named(tmp_path: Path, old: str, new: str, why: str):
    path = write_run(tmp_path, scenario(more="rounds = 3")) / "rounds.jsonl"
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
    path = write_run(tmp_path, scenario(more="rounds = 3")) / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "clients": 0}) if content is None else content)
    for read in (read_history, check_unfinished):
        with pytest.raises(ValueError, match=rf"results\.json: is damaged: .*{why}.*; remove it"):
            read(tmp_path)


# Files ----------------------------------------------------------------------------------------------------------------

ALL = ["learning", "kl", "steps", "bytes", "time"]


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (8, 30), (1000, 4)])
def test_every_size_of_run_has_its_figures(tmp_path: Path, clients: int, rounds: int):
    def late(number: int, client: int) -> bool:
        return 2 * client + 1 >= clients and 2 * number > rounds

    half = Made(
        left=lambda number, client: ("actor",) if late(number, client) else (),
        clusters=lambda number, client: {"torso.0": 0, "actor": int(late(number, client))},
    )
    of = scenario([("cart", clients, "CartPole-v1")], f"rounds = {rounds}")
    paths = draw_figures(write_run(tmp_path, of, half))
    assert names(paths) == list(figures.ORDER)
    for path in paths:
        if path.suffix == ".png":
            array = opened(path)
            assert array.shape[1] == 1600
            assert (array < 200).any(axis=-1).mean() > 0.005
        else:
            assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"


def test_a_run_without_federation_has_returns_and_time(tmp_path: Path):
    paths = draw_figures(write_run(tmp_path, scenario(more='method = "local"\nrounds = 5'), Made(federated=False)))
    assert names(paths) == ["learning", "time"]


def test_a_run_that_stopped_is_drawn_as_far_as_it_came(tmp_path: Path):
    folder = write_run(tmp_path, scenario(more="rounds = 50"), Made(rounds=7, finished=False))
    assert names(draw_figures(folder)) == ALL
    assert "over 7 rounds" in next(drawings(read_history(folder))).alt


def test_a_run_of_no_rounds_has_no_figures_and_old_ones_go(tmp_path: Path):
    assert draw_figures(write_run(tmp_path, scenario()))
    (tmp_path / "rounds.jsonl").write_text("")
    assert draw_figures(tmp_path) == []
    assert list((tmp_path / "figures").iterdir()) == []


def test_budgets_without_a_limit_are_not_drawn(tmp_path: Path):
    of = scenario(more='rounds = 5\nmethod = "fedavg"')
    folder = write_run(tmp_path, of, Made(budget=float("inf")))
    history = read_history(folder)
    with_joint = figures.kl(history)
    assert with_joint is not None
    assert has(opened(with_joint.png), PALETTE[1]).any()  # together at most 0.05
    for line in history.lines:
        line.pop("budget/joint")  # type: ignore[attr-defined]
    without = figures.kl(history)
    assert "There is no budget." in " ".join(texts(without))
    assert without is not None
    assert not has(opened(without.png), PALETTE[1]).any()


def test_the_same_folder_gives_the_same_files_to_the_byte(tmp_path: Path):
    folder = write_run(tmp_path, scenario(more="rounds = 6"), Made(left=lambda number, client: ("actor",)))
    for figure in (figures.learning, figures.groups):
        assert figure(read_history(folder)) == figure(read_history(folder))


def test_the_alternative_text_has_the_numbers(tmp_path: Path):
    # 100, 101, 102, 103: the middle half is 101 and 102. KL 0.01 of 0.02, together 0.02 of 0.05.
    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))
    alts = {one.name: one.alt for one in drawings(read_history(folder))}
    assert "CartPole-v1: at the end 101.5 in the middle half, from 100.0 to 103.0" in alts["learning"]
    assert "all together at most 0.02 of 0.05; torso.0 at most 0.01 of 0.02" in alts["kl"]
    assert alts["steps"].endswith("torso.0 0.50, torso.1 0.50, actor 0.50.")
    # 3 rounds of 1 kB up and 2 kB down for each of 4 clients.
    assert "12.0 kB up, 24.0 kB down" in alts["bytes"]


def test_the_map_has_as_many_personal_cells_as_there_are(tmp_path: Path):
    # Of 4 clients and 10 rounds one client leaves the actor after round 5: 5 of 40 cells, and none of the torso.
    made = Made(left=lambda number, client: ("actor",) if client == 3 and number > 5 else ())
    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 10"), made)
    drawn = figures.groups(read_history(folder))
    assert drawn is not None
    shares = []
    for encoded in re.findall(r"base64,([^\"]+)", drawn.svg):
        cells = opened(base64.b64decode(encoded))
        orange, blue = has(cells, PERSONAL), has(cells, SHARED)
        assert (orange | blue).all()
        shares.append(orange.mean())
    assert shares == pytest.approx([0, 0, 5 / 40], abs=0.01)


def test_the_map_of_clusters_has_a_colour_for_each(tmp_path: Path):
    # Of 4 clients and 10 rounds client 3 is alone with its actor after round 5; all share the torso.
    def clusters(number: int, client: int) -> dict[str, int]:
        return {"torso.0": 0, "actor": int(client == 3 and number > 5)}

    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 10"), Made(clusters=clusters))
    history = read_history(folder)
    assert history.clustered == ("torso.0", "actor")
    drawn = figures.clusters(history)
    assert drawn is not None
    assert drawn.alt == "At the end all share torso.0, actor is shared in 2 clusters, apart from most cart-3."
    shares = []
    for encoded in re.findall(r"base64,([^\"]+)", drawn.svg):
        cells = opened(base64.b64decode(encoded))
        orange, blue = has(cells, PERSONAL), has(cells, SHARED)
        assert (orange | blue).all()
        shares.append(orange.mean())
    assert shares == pytest.approx([0, 5 / 40], abs=0.01)
    assert figures.groups(history) is None
    text = markdown(history)
    assert "- `torso.0`: shared by all." in text
    assert "- `actor`: shared in 2 clusters: `cart-0`, `cart-1`, `cart-2` (#0); `cart-3` (#1)." in text
    assert "| cart-3 |" in text
    assert "| `actor #1` |" in text


def test_who_was_not_in_the_latest_merge_is_said_to_share_with_nobody(tmp_path: Path):
    def clusters(number: int, client: int) -> dict[str, int]:
        return {} if client == 3 and number == 2 else {"actor": 0}

    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 2"), Made(clusters=clusters))
    history = read_history(folder)
    drawn = figures.clusters(history)
    assert drawn is not None
    assert drawn.alt == "At the end all of the latest merge share actor."
    text = markdown(history)
    assert "So it was in the latest merge." in text
    assert "- `actor`: shared by all of its clients." in text


def test_many_groups_are_shown_by_block(tmp_path: Path):
    more = 'rounds = 4\npolicy = { hidden = [16], groups = { "torso.*" = "row" } }'
    rows = tuple(f"torso.0.weight:rows[{row}]" for row in range(4))
    made = Made(left=lambda number, client: rows if client else ())
    folder = write_run(tmp_path, scenario(more=more), made)
    drawn = figures.groups(read_history(folder))
    assert drawn is not None
    titles = re.findall(r">([^<>]* \(\d+ groups?\))<", drawn.svg)
    assert titles == ["torso.0 (16 groups)", "actor (1 group)"]
    assert "At the end 2 of 3 clients keep groups of their own" in drawn.alt


def test_unlike_environments_have_panels_of_their_own(tmp_path: Path):
    of = scenario([("cart", 3, "CartPole-v1"), ("pendulum", 1, "Pendulum-v1")], "rounds = 3")
    folder = write_run(tmp_path, of, Made(returns=lambda number, client: 100.0 if client < 3 else -900.0))
    found = texts(figures.learning(read_history(folder)))
    assert {"CartPole-v1", "Pendulum-v1", "cart-0", "pendulum"} <= set(found)


def test_above_ten_lines_only_the_ends_have_names(tmp_path: Path):
    folder = write_run(tmp_path, scenario([("cart", 15, "CartPole-v1")], "rounds = 3"))
    found = texts(figures.learning(read_history(folder)))
    assert [text for text in found if text.startswith("cart-")] == ["cart-14", "cart-0"]


# The style ------------------------------------------------------------------------------------------------------------


def test_labels_of_level_lines_do_not_overlap(tmp_path: Path):
    folder = write_run(tmp_path, scenario([("cart", 8, "CartPole-v1")], "rounds = 5"), Made(returns=lambda *_: 100.0))
    drawn = figures.learning(read_history(folder))
    assert drawn is not None
    labels = [
        text
        for text in ElementTree.fromstring(drawn.svg).iter(f"{SVG}text")
        if (text.text or "").startswith("cart-") or text.text == "middle half"
    ]
    heights = sorted(float(text.attrib["y"]) for text in labels)
    assert len(heights) == 9
    assert min(high - low for low, high in pairwise(heights)) > 10  # points, of letters of 9


def test_places_are_spread_as_little_as_can_be():
    assert spread([10, 10, 10], 4, 0, 100) == [6, 10, 14]
    assert spread([50, 10, 52], 4, 0, 100) == [49, 10, 53]
    assert spread([0, 1], 4, 0, 100) == [0, 4]
    assert spread([99, 100], 4, 0, 100) == [96, 100]


@given(st.lists(st.floats(0, 100), max_size=12))
def test_spread_places_keep_their_order_and_their_distance(wanted: list[float]):
    found = spread(wanted, 4.0, 0.0, 100.0)
    places = [found[number] for number in sorted(range(len(wanted)), key=lambda number: wanted[number])]
    assert all(high - low >= 4 - 1e-9 for low, high in pairwise(places))
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)


def test_the_style_is_ours_alone(tmp_path: Path):
    import matplotlib

    folder = write_run(tmp_path, scenario(more="rounds = 2"))
    history = read_history(folder)
    first = figures.learning(history)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert figures.learning(history) == first
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_loaded_when_something_is_drawn_and_its_windows_never(tmp_path: Path):
    write_run(tmp_path, scenario(more="rounds = 2"))
    code = f"""
import sys
import grpo_fed.reports.comparison.compare, grpo_fed.runs.history
from grpo_fed.reports import episodes, figures, report, side_by_side, summary
assert "matplotlib" not in sys.modules
figures.steps(grpo_fed.runs.history.history_of({str(tmp_path)!r}))
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_name_with_signs_is_drawn_as_it_is():
    def paint(figure: object) -> None:
        axes = figure.subplots()  # type: ignore[attr-defined]
        axes.plot([0, 1], [0, 1])
        charts.label_end(axes, 1.0, "a$b$_c & <d>", PALETTE[0])

    one = drawing("signs", "x", "", 'says "a" & <b>', 2.0, paint)
    found = [text.text for text in ElementTree.fromstring(one.svg).iter(f"{SVG}text")]
    assert "a$b$_c & <d>" in found
    assert ElementTree.fromstring(inline(one)).get("aria-label") == 'says "a" & <b>'


def test_a_page_lends_its_colours_to_a_figure(tmp_path: Path):
    folder = write_run(tmp_path, scenario(more="rounds = 2"), Made(left=lambda *_: ("actor",)))
    history = read_history(folder)
    drawn = [one for one in (figures.learning(history), figures.groups(history)) if one is not None]
    for one in drawn:
        text = inline(one)
        assert not [colour for colour in charts.AT_NIGHT if colour in text]
        assert "var(--ink)" in text
    ids = [element.get("id") for one in drawn for element in ElementTree.fromstring(inline(one)).iter()]
    known = [one for one in ids if one]
    assert len(known) == len(set(known))


def test_colours_are_told_apart_by_who_sees_no_red_or_green():
    # Vienot, Brettel and Mollon 1999: linear RGB, what a deuteranope and a protanope see of it.
    def linear(colour: str) -> np.ndarray:
        values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        return values**2.2

    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    for matrix in (deutan, protan):
        for pair in ((PALETTE[0], PALETTE[1]), (SHARED, PERSONAL), *pairwise(PALETTE[:6])):
            seen = [np.clip(matrix @ linear(colour), 0, 1) ** (1 / 2.2) for colour in pair]
            assert np.abs(seen[0] - seen[1]).max() > 0.15, pair


def test_lines_that_lie_upon_each_other_are_one_line_with_all_their_names(tmp_path: Path):
    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))  # alpha = 0.5 everywhere
    history = read_history(folder)
    assert "all blocks" in texts(figures.steps(history))
    for line in history.lines:
        line["alpha/actor"] = 1.0  # type: ignore[index]
    said = texts(figures.steps(read_history(folder)))
    assert "all blocks" in said  # the file has not changed
    said = texts(figures.steps(history))
    assert {"torso.0, torso.1", "actor"} <= set(said)
    assert "all blocks" not in said


def test_bytes_before_the_first_round_and_after_the_last_are_in_the_sum_of_the_run(tmp_path: Path):
    # 12 kB up and 24 kB down in the rounds
    folder = write_run(tmp_path, scenario([("cart", 4, "CartPole-v1")], "rounds = 3"))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "bytes_up": 13_000, "bytes_down": 30_000}))
    said = " ".join(texts(figures.traffic(read_history(folder))))
    assert "in all rounds 12.0 kB up, 24.0 kB down, and with the plays before and after them 43.0 kB" in said
    (folder / "results.json").unlink()
    assert "plays before" not in " ".join(texts(figures.traffic(read_history(folder))))
