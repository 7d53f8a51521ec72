"""All commands: each is registered where it is written."""

from __future__ import annotations

from grpo_fed.cli import compare, deploy, run, scenarios, tracking  # noqa: F401
from grpo_fed.cli.application import answer, app

__all__ = ["answer", "app"]
