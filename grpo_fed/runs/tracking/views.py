"""Saved views of an experiment, that MLflow's pages offer: which runs, which charts, in which order; and colours.

The format is MLflow's own and documented nowhere: an experiment's tag holds the state of its runs page, as its
button "Share" writes it. A page that does not know it shows its default view.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TAG = "mlflow.sharedViewState."
ROLE = "grpo_fed.role"
FEDERATION, CLIENT = "federation", "client"
TRAINED = "charts/episodic_return"
"""Comes first, since every round has it: what is played without learning is by default known of the first and the last
alone, and its line would be straight."""
LONGEST = 20_000
"""Letters that an experiment's tag may have."""


@dataclass(frozen=True)
class Chart:
    """A line chart of one metric or several by round; the page calls it by their names.

    Not by steps or bytes: the page pairs two metrics by their position, not by their round, and not all are there from
    round 0 on.
    """

    metrics: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """Some of an experiment's runs and charts of them."""

    key: str
    """In addresses."""
    name: str
    role: str
    """Of the runs in it."""
    sections: Mapping[str, tuple[Chart, ...]]
    group: str | None = None
    """Average runs with the same value of this parameter."""
    sort: tuple[str, bool] = ("attributes.start_time", False)
    """By what, and whether the least comes first."""


def views_for(metrics: Sequence[str]) -> list[View]:
    """The three that every experiment has, with the charts that these metrics are enough for."""
    every = [
        View(
            "federation",
            "Federation",
            FEDERATION,
            {
                "Learning": (
                    Chart((TRAINED,)),
                    Chart(("eval/score_iqm", "eval/score_min")),
                    Chart(_all(metrics, "task/")),
                ),
                "Steps of the shared blocks": (
                    Chart(_all(metrics, "kl/")),
                    Chart(_all(metrics, "budget/")),
                    Chart(_all(metrics, "alpha/")),
                ),
                "Federation": (
                    Chart(("fed/clients_ok", "fed/clients_failed")),
                    Chart(("fed/personal_groups",)),
                    Chart(_all(metrics, "clusters/")),
                    Chart(("comm/MB_total",)),
                    Chart(("time/round_s",)),
                    Chart(("charts/SPS",)),
                ),
            },
        ),
        View(
            "clients",
            "Clients",
            CLIENT,
            {
                "Learning": (
                    Chart((TRAINED,)),
                    Chart(("eval/episodic_return",)),
                ),
                "Policy": (
                    Chart(("kl/joint",)),
                    Chart(("fed/personal_groups",)),
                    Chart(_all(metrics, "cluster/")),
                    Chart(("losses/entropy",)),
                    Chart(("losses/approx_kl",)),
                    Chart(("losses/explained_variance",)),
                ),
            },
            sort=("tags.`mlflow.runName`", True),  # in the order of their start, they would hide under their parents
        ),
        View(
            "by-method",
            "By method",
            FEDERATION,
            {
                "Return": (
                    Chart((TRAINED,)),
                    Chart(("eval/score_iqm",)),
                    Chart(("eval/score_min",)),
                ),
                "What it takes": (
                    Chart(("comm/MB_total",)),
                    Chart(("global_step",)),
                    Chart(("time/round_s",)),
                ),
            },
            group="method",
        ),
    ]
    return [_with_data(view, set(metrics)) for view in every]


def tags_of(views: Sequence[View], now: int) -> dict[str, str]:
    """The experiment's tags that hold them; now: milliseconds since 1970."""
    tags = {}
    for view in views:
        state = json.dumps(_state(view), separators=(",", ":"))
        envelope = {"name": view.name, "createdAt": now, "updatedAt": now, "state": state}
        tags[TAG + view.key] = json.dumps(envelope, separators=(",", ":"))
    return {key: value for key, value in tags.items() if len(value) <= LONGEST}


def has_fewer_charts(old: str, new: str) -> bool:
    """Whether a view's tag is one of ours that nobody has changed, and the new one shows more."""
    try:
        envelope = json.loads(old)
        mine = envelope["createdAt"] == envelope["updatedAt"]
        return bool(mine) and len(envelope["state"]) < len(json.loads(new)["state"])
    except (ValueError, KeyError, TypeError):
        return False


def _all(metrics: Sequence[str], prefix: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in metrics if name.startswith(prefix)))


def _with_data(view: View, metrics: set[str]) -> View:
    """Without the charts that would be empty."""
    sections = {}
    for title, charts in view.sections.items():
        some = (Chart(tuple(name for name in chart.metrics if name in metrics)) for chart in charts)
        if full := tuple(chart for chart in some if chart.metrics):
            sections[title] = full
    return View(view.key, view.name, view.role, sections, view.group, view.sort)


def _state(view: View) -> dict[str, Any]:
    """As the page keeps it; what is left out has the page's defaults."""
    names = list(view.sections)
    sections = [
        {"uuid": f"{view.key}-{n}", "name": name, "display": True, "isReordered": True, "deleted": False}
        for n, name in enumerate(names)
    ]
    group = None
    if view.group is not None:
        keys = [{"mode": "param", "groupByData": view.group}]
        group = {"aggregateFunction": "average", "groupByKeys": keys}
    return {
        "searchFilter": f"tags.`{ROLE}` = '{view.role}'",
        "orderByKey": view.sort[0],
        "orderByAsc": view.sort[1],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [{**section, "isGenerated": False} for section in sections],
        "compareRunCharts": list(_charts(view)),
        "isAccordionReordered": True,
        "groupBy": group,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _charts(view: View) -> Iterator[dict[str, Any]]:
    """As the page keeps its line charts."""
    for section, charts in enumerate(view.sections.values()):
        for number, chart in enumerate(charts):
            yield {
                "uuid": f"{view.key}-{section}-{number}",
                "type": "LINE",
                "metricSectionId": f"{view.key}-{section}",
                "metricKey": chart.metrics[0],
                "selectedMetricKeys": list(chart.metrics),
                "runsCountToCompare": 64,
                "deleted": False,
                "isGenerated": False,
                "lineSmoothness": 0,
                "scaleType": "linear",
                "xAxisScaleType": "linear",
                "range": {},
                "xAxisKey": "step",
                "selectedXAxisMetricKey": "",
                "useGlobalXaxisKey": True,
                "useGlobalLineSmoothing": True,
                "yAxisKey": "metric",
                "yAxisExpressions": [],
                "ignoreOutliers": False,
            }
