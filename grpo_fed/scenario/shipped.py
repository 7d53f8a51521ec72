"""The scenarios that ship: `scenarios/` in the repository, `grpo_fed/_scenarios` where a wheel was installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.scenario.toml.text import closest_match, did_you_mean


@dataclass(frozen=True)
class Shipped:
    """A scenario that ships."""

    name: str
    """Of its file, without `.toml`: what a user types."""
    path: Path
    header: str
    """The comment at its top: what it shows and what to expect."""


def shipped_scenarios() -> list[Shipped]:
    """All of them, by name."""
    paths = sorted(_folder().glob("*.toml"))
    return [Shipped(path.stem, path, _header(path.read_text(encoding="utf-8"))) for path in paths]


def find_scenario(scenario: str) -> Path:
    """The file that a user means by a path or by the name of a scenario that ships; ScenarioError if there is none."""
    here = Path(scenario)
    names = {one.name: one.path for one in shipped_scenarios()}
    if scenario in names:
        return names[scenario]
    if here.is_dir():
        inside = here / "scenario.toml"
        cure = f"did you mean {inside}?" if inside.is_file() else "name a file in it"
        raise ScenarioError(f"{scenario}: is a folder; {cure}")
    if here.is_file() or here.suffix == ".toml" or len(here.parts) > 1:
        return here  # whether it is there, and what beside it was meant, is said when it is read
    close = closest_match(scenario, names)
    cure = did_you_mean(close) or "; a path ends in .toml, and `grpo-fed list` names those that ship"
    raise ScenarioError(f"{scenario}: no scenario of this name ships{cure}")


def _folder() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "_scenarios"
    return installed if installed.is_dir() else package.parent / "scenarios"


def _header(text: str) -> str:
    """The first comment of a file as one line, without what is meant for editors."""
    lines = []
    for line in text.splitlines():
        if line.startswith("#:"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)
