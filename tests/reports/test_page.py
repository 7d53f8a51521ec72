"""The page of a run: one file, readable without a network, with films of episodes."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grpo_fed import train
from grpo_fed.reports.episodes import film_episodes, first_policy, worst_and_best
from grpo_fed.reports.film import SHORT
from grpo_fed.reports.page import write_page
from grpo_fed.runs.history import read_history
from grpo_fed.runs.policies import load_policy
from grpo_fed.scenario.scenario import Scenario
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run

VOID = {"meta", "img", "source", "br", "link"}


class ParsedPage(HTMLParser):
    """All elements of a page with their attributes; asserts that they are nested correctly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with normalisers, so that a first policy differs from the last one in more than parameters."""
    folder = tmp_path_factory.mktemp("learned")
    of = Scenario.loads(
        'name = "learned"\nrounds = 2\nsteps = 256\nrollout = { num_envs = 4, horizon = 64 }\n'
        "normalise = { observations = true }\nevaluate = { episodes = 4 }\n"
        '[[clients]]\nname = "cart"\ncount = 3\nenv = "CartPole-v1"'
    )
    train(of, folder)
    return folder


def write_and_parse(folder: Path) -> tuple[str, ParsedPage]:
    text = write_page(folder).read_text()
    page = ParsedPage(text)
    assert not page.open
    return text, page


def test_the_page_needs_no_network_and_no_script(tmp_path: Path):
    text, page = write_and_parse(
        write_run(tmp_path, sample_scenario(more="rounds = 3"), SampleRun(departed=lambda *_: ("actor",)))
    )
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "use-external"}
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert set(re.findall(r"https?://[^\s\"')<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in text


def test_every_picture_has_an_alternative_text(learned: Path):
    film_episodes(learned)
    _, page = write_and_parse(learned)
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert pictures
    assert all(attributes["alt"] for attributes in pictures)
    drawn = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert drawn
    assert all(attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20 for attributes in drawn)


def test_ids_are_unique(tmp_path: Path):
    _, page = write_and_parse(
        write_run(tmp_path, sample_scenario(more="rounds = 3"), SampleRun(departed=lambda *_: ("actor",)))
    )
    counted = Counter(attributes["id"] for _, attributes in page.elements if attributes.get("id"))
    assert counted.most_common(1)[0][1] == 1


def test_every_reference_of_a_figure_is_on_the_page(tmp_path: Path):
    text, page = write_and_parse(write_run(tmp_path, sample_scenario(more="rounds = 3")))
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    pointed = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert pointed
    assert pointed <= ids


def test_the_text_of_a_user_is_escaped(tmp_path: Path):
    of = sample_scenario(more='rounds = 2\ndescription = "<script>alert(1)</script> & <b>more</b>"')
    text, page = write_and_parse(write_run(tmp_path, of))
    assert "<script" not in text
    assert "<b>" not in text
    assert "<script>alert(1)</script> & <b>more</b>." in page.text


def test_the_page_has_a_light_and_a_dark_mode(tmp_path: Path):
    text, _ = write_and_parse(write_run(tmp_path, sample_scenario(more="rounds = 2")))
    named = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{([^}]*)\}", text))
    assert named <= light
    assert light == dark
    assert "@media print" in text


def test_the_page_may_be_written_elsewhere(tmp_path: Path):
    folder = write_run(tmp_path / "run", sample_scenario(more="rounds = 1"))
    assert write_page(folder, tmp_path / "page.html") == tmp_path / "page.html"
    assert not (folder / "report.html").exists()


# Episodes -------------------------------------------------------------------------------------------------------------


def test_the_worst_and_the_best_client_are_filmed(tmp_path: Path):
    scores = {0: 5.0, 1: 9.0, 2: 1.0}
    folder = write_run(tmp_path, sample_scenario(more="rounds = 1"), SampleRun(scores=lambda client: scores[client]))
    assert worst_and_best(read_history(folder)) == ("cart-2", "cart-1")


def test_an_unfinished_run_is_ranked_by_training_returns(tmp_path: Path):
    made = SampleRun(returns=lambda number, client: (3.0, 1.0, 2.0)[client], rounds=1, finished=False)
    assert worst_and_best(read_history(write_run(tmp_path, sample_scenario(), made))) == ("cart-1", "cart-0")


def test_the_first_policy_has_the_returns_of_the_first_evaluation(learned: Path):
    # The run itself played before its first round: the same episodes, the same returns.
    before = read_history(learned).before
    for name, score in zip(read_history(learned).clients, before, strict=True):
        assert first_policy(load_policy(learned, name)).play().score == score
    assert not np.array_equal(before, read_history(learned).after)


def test_an_episode_is_filmed_before_and_after_training(learned: Path):
    filmed = film_episodes(learned, ["cart-1"])
    assert [path.name for path in filmed.paths] == ["cart-1-before.gif", "cart-1-after.gif"]
    assert filmed.problems == ()
    for path in filmed.paths:
        with Image.open(path) as film:
            assert film.n_frames > 5  # type: ignore[attr-defined]
    text, page = write_and_parse(learned)
    shown = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [one["alt"] for one in shown] == [
        f"An episode of cart-1 {when} training, with its step and return below" for when in ("before", "after")
    ]
    still = re.search(r'srcset="data:image/png;base64,([^"]+)"', text)
    assert still is not None
    with Image.open(io.BytesIO(base64.b64decode(still[1]))) as picture:
        assert picture.format == "PNG"


def test_a_client_that_cannot_be_filmed_is_named(learned: Path):
    path = learned / "policies" / "cart-0.safetensors"
    content = path.read_bytes()
    path.unlink()
    filmed = film_episodes(learned, ["cart-0", "cart-2"])
    path.write_bytes(content)
    assert [one.name for one in filmed.paths] == ["cart-2-before.gif", "cart-2-after.gif"]
    assert len(filmed.problems) == 1
    assert "cart-0.safetensors: there is no such file" in filmed.problems[0]


def test_a_short_film_shows_the_end_of_the_episode(learned: Path):
    filmed = film_episodes(learned, ["cart-1"], style=replace(SHORT, max_seconds=float("inf")))
    played = load_policy(learned, "cart-1").play(episodes=1)
    with Image.open(filmed.paths[1]) as film:
        assert film.size == (300, 224)
        assert film.n_frames == min(80, -(-int(played.lengths[0]) // 5)) + 1  # type: ignore[attr-defined]
    impatient = film_episodes(learned, ["cart-1"], style=replace(SHORT, max_seconds=0.0))
    with Image.open(impatient.paths[1]) as film:
        assert film.n_frames == 2  # type: ignore[attr-defined]
