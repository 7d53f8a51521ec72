"""What a run has spent of its privacy budget, in its summary."""

from __future__ import annotations

import numpy as np

from grpo_fed.reports.explain_privacy import WITHOUT_NOISE
from grpo_fed.reports.section import Section
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import PRIVACY_EPSILON
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.runs.serialisation import from_json


def privacy_section(history: History) -> Section | None:
    """Say what was spent, and what it covers; None for a run without privacy."""
    epsilons = history.server_series(PRIVACY_EPSILON)
    if not np.isfinite(epsilons).any():
        return None
    saved = None if history.results is None else history.results.get("privacy")
    if saved is None:
        last = float(epsilons[np.isfinite(epsilons)][-1])
        return Section("Privacy", (f"The merges so far have spent epsilon {last:.3g}. {WITHOUT_NOISE}",))
    cost = from_json(PrivacyCost, saved)
    text = (
        f"The merges have spent {cost.line}: this bounds what the shared blocks reveal about any one client. The noise"
        f" in the mean is {cost.price:.2g} times as long as a client's difference may be. {WITHOUT_NOISE}"
    )
    return Section("Privacy", (text,))
