"""Saved views of an experiment, which MLflow's pages offer: which runs are shown, and which charts of them.

The format is MLflow's own and is not documented: a tag of the experiment holds the state of its runs page, as the
page's button "Share" writes it. A page that does not know the format shows its default view.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_fed.runs.metrics import (
    ADAPTATION,
    ADAPTED_RETURN,
    CALLBACK,
    CLIENTS_FAILED,
    CLIENTS_OK,
    COST_LIMIT,
    COST_MULTIPLIER,
    CUT,
    DEPARTED_GROUPS,
    ENTROPY,
    ENTROPY_MULTIPLIER,
    ENV_STEPS,
    EQUAL_GROUPS,
    EVALUATION_COST,
    EVALUATION_RETURN,
    KL_REFERENCE,
    MB_TOTAL,
    NORMALISED_IQM,
    NORMALISED_MIN,
    NORMALISED_TRAINING,
    OF_ENVIRONMENT,
    PENALTY_NORM,
    PENALTY_VALUE,
    PENALTY_ZEROS,
    RHO_LIMIT,
    ROLLBACKS,
    ROUND_SECONDS,
    SCORE_IQM,
    SCORE_MIN,
    STEPS_PER_SECOND,
    TOKENS_PER_SECOND,
    TRAINING_COST,
    TRAINING_LENGTH,
    TRAINING_RETURN,
    TWIN_GAIN,
    TWIN_GAIN_HIGH,
    TWIN_GAIN_LOW,
    TWIN_RETURN,
)

TAG = "mlflow.sharedViewState."
GROUP = "grpo_fed.group"
"""The tag with the unique name of the group that a run belongs to."""
ROLE = "grpo_fed.role"
FEDERATION, CLIENT = "federation", "client"
MOST_RHO_CHARTS = 8
"""Blocks whose rho has a chart with a line for each client."""
MOST_REWARD_CHARTS = 8
"""Functions whose rewards have a chart with a line for each client."""
LONGEST = 20_000
"""Characters that an experiment's tag may have."""


@dataclass(frozen=True)
class Chart:
    """Describes a line chart of metrics by round; the page titles it with their names.

    It is not by steps or bytes: the page pairs two metrics by their position, not by their round, and some metrics have
    no value in round 0.
    """

    metrics: tuple[str, ...]
    """The keys of the metrics."""


@dataclass(frozen=True)
class View:
    """Describes a saved view: some of an experiment's runs, and charts of them."""

    key: str
    """The view's name in addresses."""
    name: str
    """The view's title."""
    role: str
    """The role of the runs that are shown: `FEDERATION` or `CLIENT`."""
    sections: Mapping[str, tuple[Chart, ...]]
    """The charts, by the title of their section."""
    group: str | None = None
    """The parameter by which runs are averaged; None to show each run."""
    sort: tuple[str, bool] = ("attributes.start_time", False)
    """The column that runs are sorted by, and whether the lowest value comes first."""
    of_group: str | None = None
    """The group whose runs alone are shown; None for those of all."""


def make_views(metrics: Sequence[str]) -> list[View]:
    """Make the three views of an experiment. metrics: the keys that it has; charts of others are left out."""
    views = [
        View(
            "federation",
            "Federation",
            FEDERATION,
            {
                # The training return comes first, since every round has it: evaluations are by default those of the
                # first and the last round, and their line would be straight.
                "Learning": (
                    Chart((TRAINING_RETURN,)),
                    Chart((SCORE_IQM, SCORE_MIN)),
                    Chart((NORMALISED_TRAINING,)),
                    Chart((NORMALISED_IQM, NORMALISED_MIN)),
                    Chart((f"{ADAPTATION}0", ADAPTED_RETURN)),
                    Chart(_with_prefix(metrics, "task/")),
                    *_environment_charts(metrics),
                ),
                "Constraints": _constraint_charts(metrics),
                "Completions": _completion_charts(metrics, (Chart(_with_prefix(metrics, "reward/")),)),
                "Steps of the shared blocks": (
                    Chart(_with_prefix(metrics, "kl/")),
                    Chart(_with_prefix(metrics, "budget/")),
                    Chart(_with_prefix(metrics, "alpha/")),
                ),
                "Penalty": _penalty_charts(metrics),
                "Callbacks": tuple(Chart((key,)) for key in _with_prefix(metrics, CALLBACK)),
                "Federation": (
                    Chart((CLIENTS_OK, CLIENTS_FAILED)),
                    Chart((DEPARTED_GROUPS,)),
                    Chart((*_with_prefix(metrics, "rho/"), RHO_LIMIT)),
                    Chart(_with_prefix(metrics, "clusters/")),
                    Chart((MB_TOTAL,)),
                    Chart((ROUND_SECONDS,)),
                    Chart((STEPS_PER_SECOND,)),
                ),
            },
        ),
        View(
            "clients",
            "Clients",
            CLIENT,
            {
                "Learning": (
                    Chart((TRAINING_RETURN,)),
                    Chart((EVALUATION_RETURN,)),
                    Chart((f"{ADAPTATION}0", ADAPTED_RETURN)),
                    Chart((TWIN_GAIN, TWIN_GAIN_LOW, TWIN_GAIN_HIGH)),
                    Chart((TWIN_RETURN,)),
                ),
                "Completions": _completion_charts(
                    metrics, tuple(Chart((key,)) for key in _with_prefix(metrics, "reward/")[:MOST_REWARD_CHARTS])
                ),
                "Constraints": _constraint_charts(metrics),
                "Policy": (
                    Chart(("kl/joint",)),
                    Chart(_with_prefix(metrics, "last_kl/")),
                    Chart((DEPARTED_GROUPS,)),
                    *(Chart((key,)) for key in _with_prefix(metrics, "rho/")[:MOST_RHO_CHARTS]),
                    Chart(_with_prefix(metrics, "cluster/")),
                    Chart(("losses/entropy",)),
                    Chart(("losses/approx_kl",)),
                    Chart(("losses/explained_variance",)),
                ),
                "Penalty": _penalty_charts(metrics),
            },
            sort=("tags.`mlflow.runName`", True),  # sorted by their start, they would be folded under their parents
        ),
        View(
            "by-method",
            "By method",
            FEDERATION,
            {
                "Return": (
                    Chart((TRAINING_RETURN,)),
                    Chart((SCORE_IQM,)),
                    Chart((SCORE_MIN,)),
                    Chart((NORMALISED_IQM,)),
                    Chart((ADAPTED_RETURN,)),
                ),
                "Cost": (
                    Chart((MB_TOTAL,)),
                    Chart((ENV_STEPS,)),
                    Chart((ROUND_SECONDS,)),
                ),
            },
            group="method",
        ),
    ]
    return [_with_data(view, set(metrics)) for view in views]


def make_group_view(unique: str, name: str, metrics: Sequence[str]) -> View:
    """Make the view that shows the runs of a sweep or a comparison alone, best first.

    unique: the group's unique name. metrics: as for `make_views`.
    """
    sections = {
        "Return": tuple(Chart((key,)) for key in (TRAINING_RETURN, SCORE_IQM, SCORE_MIN, NORMALISED_IQM)),
        "Cost": (Chart((MB_TOTAL,)), Chart((ENV_STEPS,)), Chart((ROUND_SECONDS,))),
    }
    is_normalised = NORMALISED_IQM in metrics and SCORE_IQM not in metrics
    sort = (f"metrics.`{NORMALISED_IQM if is_normalised else SCORE_IQM}`", False)
    return _with_data(
        View(f"{name.split()[0]}-{unique[:8]}", name, FEDERATION, sections, sort=sort, of_group=unique), set(metrics)
    )


def make_view_tags(views: Sequence[View], now: int) -> dict[str, str]:
    """Make the experiment's tags that hold the views. now: milliseconds since 1970."""
    tags = {}
    for view in views:
        state = json.dumps(_state(view), separators=(",", ":"))
        envelope = {"name": view.name, "createdAt": now, "updatedAt": now, "state": state}
        tags[TAG + view.key] = json.dumps(envelope, separators=(",", ":"))
    return {key: value for key, value in tags.items() if len(value) <= LONGEST}


def has_fewer_charts(old: str, new: str) -> bool:
    """Return whether a view's old tag is ours, unchanged by users, and shows less than the new one."""
    try:
        envelope = json.loads(old)
        is_unchanged = envelope["createdAt"] == envelope["updatedAt"]
        return bool(is_unchanged) and len(envelope["state"]) < len(json.loads(new)["state"])
    except (ValueError, KeyError, TypeError):
        return False


def _completion_charts(metrics: Sequence[str], rewards: tuple[Chart, ...]) -> tuple[Chart, ...]:
    """Make the charts of what language models wrote; none of a run without them, whose episodes have lengths too."""
    if EQUAL_GROUPS not in metrics:
        return ()
    keys = (TRAINING_LENGTH, EQUAL_GROUPS, CUT, KL_REFERENCE, TOKENS_PER_SECOND)
    return (*rewards, *(Chart((key,)) for key in keys))


def _constraint_charts(metrics: Sequence[str]) -> tuple[Chart, ...]:
    """Make the charts of costs beside their limit, of entropies that have a target, and of updates taken back."""
    return (
        Chart((TRAINING_COST, EVALUATION_COST, COST_LIMIT)),
        Chart((COST_MULTIPLIER,)),
        Chart(_with_prefix(metrics, ENTROPY)),
        Chart(_with_prefix(metrics, ENTROPY_MULTIPLIER)),
        Chart((ROLLBACKS,)),
    )


def _environment_charts(metrics: Sequence[str]) -> tuple[Chart, ...]:
    """Make a chart of each environment's returns, since they are unlike."""
    of_environment = _with_prefix(metrics, OF_ENVIRONMENT)
    labels = dict.fromkeys(key.removesuffix(f"/{TRAINING_RETURN}") for key in of_environment)
    named = [label for label in labels if f"{label}/{TRAINING_RETURN}" in of_environment]
    return tuple(Chart(_with_prefix(metrics, f"{label}/")) for label in named)


def _penalty_charts(metrics: Sequence[str]) -> tuple[Chart, ...]:
    """Make the charts of a group penalty: its value, the share of exact zeros, and what it penalises in each block."""
    return (Chart((PENALTY_VALUE,)), Chart((PENALTY_ZEROS,)), Chart(_with_prefix(metrics, PENALTY_NORM)))


def _with_prefix(metrics: Sequence[str], prefix: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in metrics if name.startswith(prefix)))


def _with_data(view: View, metrics: set[str]) -> View:
    """Remove the charts and lines that would be empty."""
    sections = {}
    for title, charts in view.sections.items():
        present = (Chart(tuple(key for key in chart.metrics if key in metrics)) for chart in charts)
        if filled := tuple(chart for chart in present if chart.metrics):
            sections[title] = filled
    return replace(view, sections=sections)


def _state(view: View) -> dict[str, Any]:
    """Make the page's state that shows a view; keys that are left out have the page's defaults."""
    names = list(view.sections)
    sections = [
        {"uuid": f"{view.key}-{n}", "name": name, "display": True, "isReordered": True, "deleted": False}
        for n, name in enumerate(names)
    ]
    group = None
    if view.group is not None:
        keys = [{"mode": "param", "groupByData": view.group}]
        group = {"aggregateFunction": "average", "groupByKeys": keys}
    of_group = "" if view.of_group is None else f" and tags.`{GROUP}` = '{view.of_group}'"
    return {
        "searchFilter": f"tags.`{ROLE}` = '{view.role}'{of_group}",
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
    """Yield the view's charts in the page's format."""
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
