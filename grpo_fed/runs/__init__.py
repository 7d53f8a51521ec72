"""What a run leaves behind, and reading it back. The files here are those of the run's folder.

    metrics.py        every metric's name
    records.py        RoundRecord: what happened in a round, and its line in rounds.jsonl
    line_numbers.py   numbers as such a line has them
    evaluations.py    what clients scored when they were evaluated
    equal_groups.py   words about rounds in which clients could learn nothing
    sharing_verdicts.py  for which clients sharing pays
    privacy.py        what was spent of a privacy budget
    departures.py     since when a client has left a parameter group, and on which evidence
    results.py        Result: results.json
    folder.py         the run's folder: its names, and whether it may be used
    recorder.py       writes all of it while a run goes on
    totals.py         what a run has done so far
    checkpoint.py     state to go on from
    merge_order.py    whose answers were in which merge, where rounds do not wait
    continuation.py   a folder that goes on from a run's checkpoint with changed settings
    policies.py       policies on disk, and LoadedPolicy
    played_levels.py  the levels that a policy is played at
    shared_policy.py  what a run shares, as the policy of a client that was never there
    adapters.py       LoadedAdapters: a language model's adapters, which answer prompts
    examples.py       what clients wrote before and after training
    export.py         a client's policy for other programs
    predictor.py      a client's policy as a torch module that needs none of our code
    graph_export.py   a network as ONNX, TorchScript or PyTorch's exported form
    sb3_export.py     a network as a PPO of stable-baselines3
    history.py        History: a run as arrays
    statistics.py     interquartile mean, bootstrap intervals
    mean_returns.py   means of returns: of one environment, normalised, or by environment
    colours.py        a client's and a method's colour, in figures and in MLflow
    markdown.py       words of clients and scenarios in summaries
    serialisation.py  records to JSON and back
    files.py          atomic writes
    provenance.py     command, commit and versions of a run
    csv_tables.py     a run as tables for other programs: CSV, pandas
    called_as.py      how the program was called, for commands in messages
    library_warnings.py  warnings of libraries, each shown once
    tracking/         MLflow: a spool in the folder, and a process that sends it

Begin with records.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.runs.checkpoint import Checkpoint
    from grpo_fed.runs.history import History, read_history
    from grpo_fed.runs.metrics import METRICS
    from grpo_fed.runs.policies import LoadedPolicy, load_policy
    from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord
    from grpo_fed.runs.results import ClientResult, Result

__all__ = [
    "METRICS",
    "Checkpoint",
    "ClientRecord",
    "ClientResult",
    "Failure",
    "History",
    "LoadedPolicy",
    "Result",
    "RoundRecord",
    "ServerRecord",
    "load_policy",
    "read_history",
]

MODULES = {
    "Checkpoint": "grpo_fed.runs.checkpoint",
    "ClientRecord": "grpo_fed.runs.records",
    "ClientResult": "grpo_fed.runs.results",
    "Failure": "grpo_fed.runs.records",
    "History": "grpo_fed.runs.history",
    "LoadedPolicy": "grpo_fed.runs.policies",
    "METRICS": "grpo_fed.runs.metrics",
    "Result": "grpo_fed.runs.results",
    "RoundRecord": "grpo_fed.runs.records",
    "ServerRecord": "grpo_fed.runs.records",
    "load_policy": "grpo_fed.runs.policies",
    "read_history": "grpo_fed.runs.history",
}

__getattr__ = lazy_getattr(__name__, MODULES)
