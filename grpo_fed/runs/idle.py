"""Who took no part in a run that ended well without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def idle_in(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Of `results.json`, the clients that were asked to train and learned nothing; none where nobody was asked yet."""
    clients, missing = results["clients"], results.get("missing", {})
    if not results["rounds"]:
        return ()
    return tuple(name for name in missing if name in clients and not clients[name].get("env_steps"))
