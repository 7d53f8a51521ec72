"""The part of a summary that says how to make the run again."""

from __future__ import annotations

from grpo_fed.reports.section import Section
from grpo_fed.runs.called_as import NAME
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.history import History
from grpo_fed.runs.provenance import read_provenance


def reproduction_section(history: History) -> Section:
    """Name the command, the commit and the versions of the run, and the command that needs its scenario alone."""
    title, verb = "How to reproduce", "run" if history.federated else "train"
    again = (
        f"`{NAME} {verb} {SCENARIO}`, with the file of this folder, repeats it: that has every value of the scenario."
    )
    provenance = read_provenance(history.folder)
    if provenance is None:
        return Section(title, (again,))
    return Section(title, (f"Made by `{provenance.command}` with {provenance.sentence}.", again))
