"""Draws what people look at once a run has finished: figures, a summary, films and its page."""

from __future__ import annotations

import importlib
import shlex
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fed.cli.errors import message_for_user, print_error
from grpo_fed.cli.options import RunOptions, use_no_display
from grpo_fed.runs.called_as import called_as

if TYPE_CHECKING:
    from grpo_fed.reports.displays import Display


def begin_importing(options: RunOptions) -> None:
    """Begin to import what draws figures, in a thread: that takes as long as drawing, and a run begins with waiting.

    The thread has ended before films are made in a fork, unless the run is shorter than an import.
    """
    if options.figures:
        threading.Thread(target=_import_drawing, name="imports", daemon=True).start()


def _import_drawing() -> None:
    with suppress(Exception):  # what it was is raised again where figures are drawn
        importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.backends.backend_agg")


def draw_run(folder: Path, options: RunOptions, display: Display, with_page: bool) -> bool:
    """Draw figures, a summary and films of a run that has finished; return False after Ctrl-C.

    The run counts as finished even if nothing can be drawn. with_page: whether to write the run's page too.
    """
    if not options.figures:
        return True
    from grpo_fed.reports.beside import begin_beside

    try:
        films = begin_beside(lambda: _film(folder)) if options.films else None
        with display.busy("drawing figures"):
            _draw_figures(folder, display)
        if films is not None:
            with display.busy("filming"):
                _say_films(films, display)
        if with_page:
            with display.busy("writing the page for MLflow"):
                _write_page(folder)
    except KeyboardInterrupt:
        command = f"{called_as()} report {shlex.quote(str(folder))}"
        message = f"the run has finished; {command} draws its figures and films"
        print_error(message, label="interrupted: ")
        return False
    return True


def _draw_figures(folder: Path, display: Display) -> None:
    try:
        from grpo_fed.reports.figures.write import FIRST, draw_figures
        from grpo_fed.reports.summary import write_summary

        figures = draw_figures(folder, FIRST)
        write_summary(folder)
    except Exception as error:  # noqa: BLE001, the results are saved
        print_error(f"no figures were drawn: {message_for_user(error)}", label="note: ")
        return
    if figures:
        command = f"{called_as()} report {shlex.quote(str(folder))}"
        display.say(f"figures: {figures[0].parent}/; {command} draws all of them, and puts them on one page")


def _write_page(folder: Path) -> None:
    """Write the run's page, which MLflow gets with the other files."""
    try:
        from grpo_fed.reports.page import write_page

        write_page(folder)
    except Exception as error:  # noqa: BLE001, the results are saved
        print_error(f"no page was written: {message_for_user(error)}", label="note: ")


def _film(folder: Path) -> str:
    """Make short films, and return a line about them; `grpo-fed report` names the clients that cannot be drawn."""
    use_no_display()
    from grpo_fed.reports.episodes import film_episodes
    from grpo_fed.reports.film import SHORT

    filmed = film_episodes(folder, style=SHORT)
    if not filmed.paths:
        return ""
    return f"films: {filmed.paths[0].parent}/, the worst and the best client before and after training"


def _say_films(films: Callable[[], str], display: Display) -> None:
    """Wait for the films, and say where they are."""
    try:
        line = films()
    except Exception as error:  # noqa: BLE001, an environment may fail in any way, and the results are saved
        print_error(f"no films were made: {message_for_user(error)}", label="note: ")
        return
    if line:
        display.say(line)
