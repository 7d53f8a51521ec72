"""Contradictions of the levels of clients' tasks, and of who moves them, with other settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.curricula import CURRICULA
from grpo_fed.scenario.language_checks import Contradiction
from grpo_fed.scenario.settings import ClientSettings, CurriculumSettings
from grpo_fed.scenario.toml.lines import KeyPath

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

KINDS_WITH_BOX = tuple(name for name, kind in CURRICULA.items() if "start" in kind.keys)
"""The kinds of curriculum whose levels are drawn from a box that begins as `start`."""
KINDS_BY_RETURNS = tuple(name for name, kind in CURRICULA.items() if kind.by_returns)
"""The kinds of curriculum that returns move."""
NO_LEVELS = ("max_episode_steps", "render_mode")
"""Arguments that are gymnasium's, and not the environment's."""


def curriculum_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """List what contradicts a client's curriculum, or the server that steers it: a text and the keys."""
    group = scenario.group
    for number, client in enumerate(scenario.clients):
        curriculum, path = client.curriculum, ("clients", number, "curriculum")
        if curriculum is None:
            continue
        yield from _range_contradictions(curriculum, path)
        yield from _kind_contradictions(curriculum, path)
        yield from _argument_contradictions(client, curriculum, path)
        if scenario.objective.advantage == "group" and group.by != "start":
            text = 'episodes of one group must be of one level: use group.by = "start"'
            yield text, (path, ("group", "by"), ("objective", "advantage"))
        if curriculum.kind == "replay":
            yield from _replay_contradictions(scenario, path)
        if scenario.curriculum.by == "server" and curriculum.kind in KINDS_BY_RETURNS:
            yield from _steering_contradictions(scenario, path)


def _range_contradictions(curriculum: CurriculumSettings, path: KeyPath) -> Iterator[Contradiction]:
    """Check that ranges are in order, and that the first box lies in them."""
    for table, ranges in (("ranges", curriculum.ranges), ("start", curriculum.start)):
        for name, (low, high) in ranges.items():
            is_ordered = low < high if table == "ranges" else low <= high
            if not is_ordered:
                yield "must be the lowest value and then the highest", ((*path, table, name),)
    for name, (low, high) in curriculum.start.items():
        keys: tuple[KeyPath, ...] = ((*path, "start", name), (*path, "ranges"))
        if name not in curriculum.ranges:
            yield f"is no argument of ranges, which has {' '.join(curriculum.ranges)}", keys
        elif low < curriculum.ranges[name][0] or high > curriculum.ranges[name][1]:
            yield f"must be within ranges.{name} = {curriculum.ranges[name]}", keys


def _kind_contradictions(curriculum: CurriculumSettings, path: KeyPath) -> Iterator[Contradiction]:
    """Check that a kind has what it needs."""
    kind = (*path, "kind")
    if not curriculum.ranges and curriculum.kind != "replay":
        text = f'kind = "{curriculum.kind}" needs ranges, such as {{ length = [0.05, 2.0] }}'
        yield text, ((*path, "ranges"), kind)
    if curriculum.kind in KINDS_WITH_BOX and not curriculum.start:
        text = f'kind = "{curriculum.kind}" needs start, the box of levels that it begins with'
        yield text, ((*path, "start"), kind)
    if curriculum.kind not in KINDS_BY_RETURNS:
        return
    if curriculum.target is None:
        text = f'kind = "{curriculum.kind}" needs target, the return from which a level counts as solved'
        yield text, ((*path, "target"), kind)
    elif curriculum.floor is not None and curriculum.floor >= curriculum.target:
        text = f"must be below target = {curriculum.target:g}, or the box would grow and shrink at once"
        yield text, ((*path, "floor"), (*path, "target"))


def _argument_contradictions(
    client: ClientSettings, curriculum: CurriculumSettings, path: KeyPath
) -> Iterator[Contradiction]:
    """Check that nothing else gives the arguments that levels give."""
    entry = path[:2]
    for name in curriculum.ranges:
        key = (*path, "ranges", name)
        if name in NO_LEVELS:
            yield "is no argument that may change from episode to episode; leave it out", (key,)
        for other, given in (("kwargs", client.kwargs), ("spread", client.spread)):
            if name in given:
                yield f"is in both curriculum.ranges and {other}; use one of them", (key, (*entry, other, name))
        for index, change in enumerate(client.changes):
            if name in change.kwargs:
                text = "is in both curriculum.ranges and changes; use one of them"
                yield text, (key, (*entry, "changes", index, "kwargs", name))


def _replay_contradictions(scenario: Scenario, path: KeyPath) -> Iterator[Contradiction]:
    """Check that a client has a critic, and that nothing but its own errors decides."""
    kind = (*path, "kind")
    if scenario.objective.advantage != "gae":
        text = '"replay" goes by the errors of the critic, and there is none: use objective.advantage = "gae"'
        yield text, (kind, ("objective", "advantage"))
    if scenario.curriculum.by == "server":
        text = '"replay" goes by advantages, and a server steers by returns alone: use curriculum.by = "client"'
        yield text, (kind, ("curriculum", "by"))


def _steering_contradictions(scenario: Scenario, path: KeyPath) -> Iterator[Contradiction]:
    """Check that the server gets the returns of all clients together, and of one policy each."""
    by: KeyPath = ("curriculum", "by")
    if scenario.round.mode == "buffered":
        text = 'the server steers by the returns of a whole round: use round.mode = "sync", or curriculum.by = "client"'
        yield text, (by, ("round", "mode"), path)
    if scenario.personal.model:
        text = "a second policy has returns of its own, which the server does not get: use curriculum.by"
        yield f'{text} = "client"', (by, ("personal", "model"), path)
    if scenario.evaluate.twins:
        text = "a twin would have the levels that other clients' returns have moved: use curriculum.by"
        yield f'{text} = "client"', (by, ("evaluate", "twins"), path)
