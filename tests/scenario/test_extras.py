"""The command that installs the packages of an extra."""

from __future__ import annotations

import shlex
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from grpo_fed.scenario import extras
from grpo_fed.scenario.extras import write_install_command

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_extra_is_installed_by_the_requirements_of_pyproject(monkeypatch: pytest.MonkeyPatch):
    """Held against a second reader of requirements."""
    named = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    metadata = [f'{each} ; extra == "{extra}"' for extra, wanted in named.items() for each in wanted]
    monkeypatch.setattr(extras, "requires", lambda _: ["numpy>=2", *metadata])
    for extra, wanted in named.items():
        pip, install, *packages = shlex.split(write_install_command(extra))
        assert (pip, install) == ("pip", "install")
        assert {str(Requirement(each)) for each in packages} == {str(Requirement(each)) for each in wanted}, extra


def test_what_is_installed_names_the_packages_of_its_extras():
    assert write_install_command("box2d").startswith("pip install 'gymnasium[box2d]")


def test_without_metadata_the_place_is_named_where_packages_are(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: str) -> list[str]:
        raise PackageNotFoundError

    monkeypatch.setattr(extras, "requires", refuse)
    assert write_install_command("box2d") == 'install the packages of the extra "box2d" in pyproject.toml'
