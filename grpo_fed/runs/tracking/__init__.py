"""What a run tells MLflow: the run appends to a spool file, and a process of its own sends what that holds.

`Tracker` is the run's side and costs it a line in a file; `writer` is the other, the only one to import mlflow. Nobody
waits for a tracking server: what it could not take stays in the run folder, and `replay` sends it later.
"""

from grpo_fed.runs.tracking.store import Store, default_store, resolve_store
from grpo_fed.runs.tracking.tracker import Tracker, replay

__all__ = ["Store", "Tracker", "default_store", "replay", "resolve_store"]
