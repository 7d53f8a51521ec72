"""The scenarios of runs, which the clients of a machine ask for once."""

from __future__ import annotations

import threading
from typing import final

from grpo_fed.engines.wire.flower_private import NodeConnection

MOST = 16
"""How many runs' scenarios are kept, the latest."""


@final
class RunConfigs:
    """Asks a SuperLink for the configuration of a run when a message of it comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scenarios: dict[int, str] = {}

    def find_scenario(self, connection: NodeConnection, run: int) -> str:
        """Return the scenario of a run, as TOML.

        ValueError if the run is of another app. NoConnectionError and RunOverError as a connection raises them.
        """
        with self._lock:
            if run not in self._scenarios:
                config = connection.read_run_config(run)
                if not isinstance(config.get("scenario"), str):
                    raise ValueError("this node answers runs of grpo_fed alone; other apps need flower-supernode")
                while len(self._scenarios) >= MOST:
                    del self._scenarios[next(iter(self._scenarios))]
                self._scenarios[run] = config["scenario"]
            return self._scenarios[run]
