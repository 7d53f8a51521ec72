"""Environments for the tests of tasks."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import pytest

from tests.support.toy_envs import register_toy_envs


@pytest.fixture(autouse=True)
def toy_envs() -> Iterator[None]:
    """Register the toy environments, and restore gymnasium's registry after the test."""
    registry = dict(gymnasium.registry)
    register_toy_envs()
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(registry)
