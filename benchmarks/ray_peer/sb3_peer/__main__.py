"""Run it in this process, `python -m sb3_peer '{"task": ...}'`, and print the seconds of each round as JSON.

`flwr run` starts a SuperLink and several processes before the same simulation; to leave these out is to the peer's
advantage.
"""

import json
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from benchmarks.memory import peak_mb
from sb3_peer.client_app import app as client_app
from sb3_peer.server_app import serve
from sb3_peer.work import Work, one_thread


def main() -> None:
    work, seconds = Work(**json.loads(sys.argv[1])), []
    server_app = ServerApp()

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:
        seconds.extend(serve(grid, work))

    one_thread()
    run_simulation(
        server_app, client_app, work.clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    )
    print(json.dumps({"round_seconds": seconds, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
