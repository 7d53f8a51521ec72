"""Says for which clients sharing pays, as their twins told: in a round's notes, for the results and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from grpo_fed.runs.metrics import TWIN_GAIN, TWIN_GAIN_HIGH, TWIN_GAIN_LOW, TWIN_SINCE, TWIN_VERDICT

Verdict: TypeAlias = Literal["pays", "costs", "open"]
VERDICTS: Mapping[int, Verdict] = {1: "pays", -1: "costs", 0: "open"}
"""The verdicts by the value of the metric."""
MOST_NAMES = 4
"""Clients that a sentence names."""


@dataclass(frozen=True)
class SharingVerdict:
    """Holds what a client's twin says of sharing at the end of a run."""

    verdict: Verdict
    """Whether sharing pays for the client or costs it, or whether that is open."""
    since: int
    """The round since which the verdict has held; 0 while it is open."""
    gain: float
    """The mean over the rounds of what sharing brought, as a part of what the better of the two had learned."""
    low: float
    """The lower end of the mean's interval; each end holds at 95 % in all rounds together."""
    high: float
    """The upper end."""

    @classmethod
    def of(cls, metrics: Mapping[str, float | None]) -> Self | None:
        """Read the verdict from a client's metrics of a round; None without a comparison."""
        gain, low, high = (metrics.get(key) for key in (TWIN_GAIN, TWIN_GAIN_LOW, TWIN_GAIN_HIGH))
        if gain is None or low is None or high is None:
            return None
        verdict = VERDICTS.get(round(metrics.get(TWIN_VERDICT) or 0), "open")
        return cls(verdict, round(metrics.get(TWIN_SINCE) or 0), gain, low, high)

    def describe(self) -> str:
        """Write the verdict with its numbers, such as `costs since round 5: -81 % (-100 % to -48 %)`."""
        since = f" since round {self.since}" if self.since else ""
        return f"{self.verdict}{since}: {_percent(self.gain)} ({_percent(self.low)} to {_percent(self.high)})"


def note_costs(round: int, metrics_of: Mapping[str, Mapping[str, float | None]]) -> str:
    """Warn in a round of the clients that sharing has been found to cost in it; empty if there are none."""
    found = {name: SharingVerdict.of(metrics) for name, metrics in metrics_of.items()}
    names = [name for name, each in found.items() if each and each.verdict == "costs" and each.since == round]
    if not names:
        return ""
    return f"sharing costs {_join(names)}: {'it' if len(names) == 1 else 'each'} learns more alone, as its twin shows"


def verdicts_line(verdicts: Mapping[str, SharingVerdict]) -> str:
    """Say about a run for how many clients sharing pays, and which it costs; empty without twins."""
    if not verdicts:
        return ""
    paid = sum(each.verdict == "pays" for each in verdicts.values())
    cost = [name for name, each in verdicts.items() if each.verdict == "costs"]
    rest = len(verdicts) - paid - len(cost)
    parts = [f"pays for {paid}"] if paid else []
    parts += [f"costs {_join(cost)}"] if cost else []
    parts += [f"is open for {rest}"] if rest else []
    return f"sharing {', '.join(parts)} of {len(verdicts):,} {'client' if len(verdicts) == 1 else 'clients'}"


def _join(names: list[str]) -> str:
    rest = len(names) - MOST_NAMES
    if rest > 0:
        return f"{', '.join(names[:MOST_NAMES])} and {rest:,} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _percent(part: float) -> str:
    return f"{100 * part:+.0f} %"
