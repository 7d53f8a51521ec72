"""The scenarios of runs, which the clients of a machine ask for once."""

from __future__ import annotations

import threading
from typing import final

from grpo_fed.engines.wire.flower_private import ALL_CLIENTS, OWN_CLIENT, NodeConnection

MOST = 1024
"""How many scenarios are kept, the latest."""


@final
class RunConfigs:
    """Asks a SuperLink for the configuration of a run when a message of it comes first.

    A SuperLink that knows its nodes by their keys gives each its own scenario; others give all of them the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scenarios: dict[tuple[int, int | None], str] = {}
        """By run and node; None for all nodes."""

    def find_scenario(self, connection: NodeConnection, run: int) -> str:
        """Return the scenario of a run, as TOML.

        ValueError if the run is of another app. NoConnectionError and RunOverError as a connection raises them.
        """
        with self._lock:
            for key in ((run, None), (run, connection.node)):
                if key in self._scenarios:
                    return self._scenarios[key]
            config = connection.read_run_config(run)
            if not isinstance(config.get("scenario"), str):
                raise ValueError("this node answers runs of grpo_fed alone; other apps need flower-supernode")
            while len(self._scenarios) >= MOST:
                del self._scenarios[next(iter(self._scenarios))]
            whose = None if config.get(OWN_CLIENT, ALL_CLIENTS) == ALL_CLIENTS else connection.node
            self._scenarios[run, whose] = config["scenario"]
            return str(config["scenario"])
