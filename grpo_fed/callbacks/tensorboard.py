"""TensorBoard: writes what a run records for TensorBoard, in the run's folder."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, final

from grpo_fed.callbacks.control import RunControl
from grpo_fed.runs.folder import TENSORBOARD
from grpo_fed.runs.metrics import is_tracked
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.runs.results import Result

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@final
class TensorBoard:
    """Writes each round's metrics to `RUN/tensorboard`; `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: str | None = None, clients: bool = True) -> None:
        """Prepare to write.

        folder: where to, by default `tensorboard` in the run's folder. clients: whether each client's metrics are
        written too, under `NAME/KEY`.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                f"{type(self).__name__} needs the package tensorboard: install grpo-fed with its extra tensorboard"
            )
        self.folder, self.clients = folder, clients
        self._writer: SummaryWriter | None = None

    def on_run_start(self, run: RunControl) -> None:
        """Open the file; of a run that goes on, TensorBoard leaves out rounds that are trained again."""
        from torch.utils.tensorboard import SummaryWriter

        if self.folder is None and run.folder is None:
            raise ValueError(f"{type(self).__name__}: the run has no folder; give it one with out, or set folder")
        folder = self.folder if run.folder is None or self.folder else str(run.folder / TENSORBOARD)
        purge = run.round + 1 if run.round else None
        self._writer = SummaryWriter(folder, purge_step=purge)

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        """Write the metrics of the whole, and those of each client."""
        line = record_to_line(record)
        self._write("", line, record.round)
        for client, metrics in line["clients"].items() if self.clients else ():
            self._write(f"{client}/", metrics, record.round)
        if self._writer is not None:
            self._writer.flush()

    def on_run_end(self, run: RunControl, result: Result) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, prefix: str, metrics: dict[str, object], round: int) -> None:
        """Write the numbers of a line that are metrics."""
        assert self._writer is not None, "the run has begun"
        for key, value in metrics.items():
            if is_tracked(key) and isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}{key}", value, round)
