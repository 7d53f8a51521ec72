"""The server app: Flower's own FedAvg, which measures the time of every round."""

import time
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sb3_peer.work import Work, first_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    work = Work(str(config["task"]), int(config["clients"]), int(config["rounds"]), int(config["steps"]))
    print("seconds of each round:", [round(seconds, 3) for seconds in serve(grid, work)])


def serve(grid: Grid, work: Work) -> list[float]:
    """Run all rounds; returns the seconds of each, from choosing clients to averaging their replies."""
    strategy = Timed(
        fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients, min_evaluate_nodes=0
    )
    strategy.start(grid, first_arrays(work), num_rounds=work.rounds, train_config=work.record())
    if len(strategy.answers) != work.rounds or set(strategy.answers) != {work.clients}:
        raise RuntimeError(f"of {work.clients} clients there answered, by round: {strategy.answers}")
    return strategy.seconds


class Timed(FedAvg):
    """FedAvg that measures the time of every round."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)
        self.seconds: list[float] = []
        self.answers: list[int] = []
        self._began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        received = list(replies)
        merged = super().aggregate_train(server_round, received)
        self.seconds.append(time.perf_counter() - self._began)
        self.answers.append(sum(not message.has_error() for message in received))
        return merged
