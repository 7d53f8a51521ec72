"""Generates the documentation of all keys: two pages of markdown and a JSON schema for editors.

These commands write the files, and tests check that they are up to date:

    python -m grpo_fed.scenario.reference > docs/configuration.md
    python -m grpo_fed.scenario.reference --methods > docs/methods.md
    python -m grpo_fed.scenario.reference --schema > scenarios/scenario.schema.json
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel

from grpo_fed.scenario.curricula import CURRICULA
from grpo_fed.scenario.knobs import Knob, list_knobs
from grpo_fed.scenario.methods import MERGE_RULES, METHODS, Method
from grpo_fed.scenario.presets import PRESETS, Preset
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.tables import as_toml_lines
from grpo_fed.scenario.toml.keys import section_at, section_is_list


def json_schema(model: type[BaseModel] = Scenario) -> dict[str, Any]:
    """Make a JSON schema with which editors complete and check a scenario while it is typed."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_without_infinity(model.model_json_schema())}


def _without_infinity(schema: Any) -> Any:
    """Leave out defaults that are infinite, since JSON has no infinity."""
    if isinstance(schema, dict):
        return {key: _without_infinity(value) for key, value in schema.items() if value != math.inf}
    return [_without_infinity(value) for value in schema] if isinstance(schema, list) else schema


# docs/configuration.md ------------------------------------------------------------------------------------------------


def knobs_markdown(model: type[BaseModel] = Scenario) -> str:
    """Write the page of all knobs."""
    parts = [_CONFIGURATION]
    for section, knobs in groupby(list_knobs(model), key=lambda knob: knob.section):
        parts.append(_section(model, section, list(knobs)))
    return "\n".join(parts)


_CONFIGURATION = """\
<!-- Generated from grpo_fed/scenario/settings.py; change it there and run
`python -m grpo_fed.scenario.reference > docs/configuration.md`. -->
# Configuration

A scenario is a TOML file. It needs a `name` and one `[[clients]]` table; everything else has a default.
`--set KEY=VALUE` changes one key for one run and is checked like the file: `--set objective.clip=0.3`,
`--set clients.cart.count=8` (a client by its name, or by its index, counted from 0),
`--set 'trust.blocks."torso.*"=0.01'`.

- A key that is not given takes its value from the row of `method` in the [table of methods](methods.md#methods), else
  from the row of `objective.preset` in the [table of presets](methods.md#presets), else its default.
- `--set method=fedavg` has precedence over the file: values in the file are ignored for keys in the row of the old or
  the new method.
- A key that has no effect beside other values is allowed; `grpo-fed check` names it and the reason.
- `inf` means no limit, for the keys whose description says so. 0 turns a count off where its description says so.
- A whole number may be written where a number is expected; a number in quotes may not.
- Every run saves its resolved scenario, with all values, as a file that can be run again.
- Editors that support TOML schemas (VS Code with Even Better TOML) complete and explain keys in a file whose first line
  is `#:schema` and the path of `scenarios/scenario.schema.json`.
"""


def _section(model: type[BaseModel], section: str, knobs: Sequence[Knob]) -> str:
    path = tuple(section.split(".")) if section else ()
    title = f"`[{section}]`" if section else "At the top of the file"
    if section and section_is_list(model, path):
        title = f"`[[{section}]]`"
    doc = " ".join((getattr(section_at(model, path), "__doc__", None) or "").split())
    rows = [(f"`{knob.key}`", knob.type, _code(knob.default), knob.limits, knob.doc) for knob in knobs]
    return f"## {title}\n\n{doc}\n\n{_table(('key', 'type', 'default', 'limits', 'meaning'), rows)}"


# docs/methods.md ------------------------------------------------------------------------------------------------------


def methods_markdown() -> str:
    """Write the page of methods, presets and merge rules."""
    defaults = {knob.key: knob.default for knob in list_knobs() if knob.section == "merge"}
    rules = [
        (
            f"`{name}`",
            f"{rule.name}. {_with_links(rule.paper)}",
            "<br>".join(f"`merge.{key} = {defaults[key]}`" for key in rule.keys),
            rule.when,
        )
        for name, rule in MERGE_RULES.items()
    ]
    rule_table = _table(("`merge.rule =`", "is", "reads, with default", "when to use it"), rules)
    parts = (
        _rows("Methods", "method", _ABOUT_METHODS, METHODS),
        _rows("Presets", "objective.preset", _ABOUT_PRESETS, PRESETS),
    )
    return "\n".join(
        [
            _METHODS,
            *parts,
            f"## Merge rules\n\n{_ABOUT_RULES}\n{rule_table}",
            _ABOUT_SITES,
            _curricula(),
            _constraints(),
        ]
    )


def _curricula() -> str:
    """Write the section of curricula."""
    defaults = {knob.key: knob.default for knob in list_knobs() if knob.section == "clients.curriculum"}
    rows = [
        (
            f"`{name}`",
            f"{kind.name}. {_with_links(kind.paper)}",
            "<br>".join(f"`{key}{f' = {defaults[key]}' if defaults[key] else ''}`" for key in kind.keys),
            kind.when,
        )
        for name, kind in CURRICULA.items()
    ]
    table = _table(("`kind =`", "is", "reads, with default", "when to use it"), rows)
    return f"## Curricula\n\n{_ABOUT_CURRICULA}\n{table}"


def _constraints() -> str:
    """Write the section of constraints."""
    defaults = {f"{knob.section}.{knob.key}": knob.default for knob in list_knobs()}
    rows = [
        (
            f"`{key}`",
            f"{name}. {_with_links(paper)}",
            "<br>".join(f"`{other} = {defaults[other]}`" for other in others),
            when,
        )
        for key, name, paper, others, when in _CONSTRAINTS
    ]
    table = _table(("key", "is", "reads too, with default", "when to use it"), rows)
    return f"## Constraints\n\n{_ABOUT_CONSTRAINTS}\n{table}"


_CONSTRAINTS = (
    (
        "objective.cost.limit",
        "a limit on what an episode costs",
        "Ray et al. 2019, PPO-Lagrangian: a multiplier by projected dual ascent, and advantages of costs.",
        ("objective.cost.rate", "objective.cost.key"),
        "Where the environment reports costs and some of them are acceptable. It is kept in the mean, after learning.",
    ),
    (
        "objective.entropy_target",
        "an entropy that the policy keeps",
        "Haarnoja et al. 2018, 1812.05905, section 5, for on-policy learning and for sets of components.",
        ("objective.entropy_rate", "objective.entropy_groups"),
        "Where a policy stops exploring too early, and no fixed weight of the entropy is right throughout.",
    ),
    (
        "trust.rollback",
        "updates that made it worse are taken back",
        "Ours.",
        ("trust.rollback_episodes",),
        "Where a bad policy does harm even for a round. It costs episodes after every update.",
    ),
)
"""Key, name, source, other keys, and when to use it."""

_METHODS = """\
<!-- Generated from grpo_fed/scenario/methods.py and presets.py; change it there and run
`python -m grpo_fed.scenario.reference --methods > docs/methods.md`. -->
# Methods, presets and merge rules

Three choices are made by name, each in a line of TOML: `method` determines what clients share and how,
`objective.preset` what a client optimises and how, and `merge.rule` how the server merges the clients' parameters. A
fourth is for clients whose tasks have levels: the `kind` of their `curriculum` determines on which of them they train.
Methods and presets are rows of values for keys in [configuration.md](configuration.md) and have no code of their own,
so you can change single values and make new combinations. [algorithm.md](algorithm.md) has the equations,
[extending.md](extending.md) explains how to add a row or a rule of your own. The [README](../README.md) and
[RESULTS.md](../benchmarks/RESULTS.md) compare them on our tasks, `grpo-fed compare mine.toml --methods
local,fedavg,grpo` compares them on yours.
"""
_ABOUT_METHODS = """\
Keys that a method does not mention keep their default. A value in the scenario has precedence over the method's, except
that `--set method=fedavg` has precedence over the file.
"""
_ABOUT_PRESETS = """\
Keys that a preset does not mention keep their default, which is PPO's. `inf` means no limit.
"""
_ABOUT_CURRICULA = """\
How the levels of a client's task are chosen, by `kind` in its `curriculum`; [curriculum.md](curriculum.md) has an
example, and what came out of comparing them.
"""
_ABOUT_CONSTRAINTS = """\
What a policy has to keep while it learns. They go with every method and merge rule, each client keeps its own, and
without the key there is none. [algorithm.md](algorithm.md#constraints) has the equations.
"""
_ABOUT_RULES = """\
Most methods determine the rule; set it to change only that. Unless the last column says otherwise, the server holds all
replies of a round in memory.
"""


_ABOUT_SITES = """\
### Over sites

With `[[sites]]` there is a tree of servers: each site merges its own clients, and the server merges the sites. It goes
with every method and rule but `clusters`, `fisher` and `scaffold`, and `sites.merge` and `sites.proximity` give a site
another rule or other budgets. Use it where clients belong together beforehand, as the lines of a factory do: a whole
site may leave a block and go on sharing it within, which single clients that leave cannot. More in
[algorithm.md](algorithm.md#sites).

### By learned groups

With `policy.groups = { "*" = "learned" }`, or for the blocks that a pattern names, `persistence` learns as well which
rows and columns of weights a client leaves together. Use it where clients may differ in a part of a layer, such as in
some of their sensors, and nobody knows in which; `"column"` or `"row"` where that is known. It goes with every method
that has this rule. More in [algorithm.md](algorithm.md#learned-groups); `grpo-fed run learned-groups` is an example.
"""


def _rows(title: str, key: str, about: str, table: Mapping[str, Preset] | Mapping[str, Method]) -> str:
    rows = [
        (
            f"`{name}`",
            f"{row.name}. {_with_links(row.paper)}",
            "<br>".join(f"`{line}`" for line in as_toml_lines(row.values)),
            row.when,
        )
        for name, row in table.items()
    ]
    return f"## {title}\n\n{about}\n{_table((f'`{key} =`', 'is', 'sets', 'when to use it'), rows)}"


def _with_links(paper: str) -> str:
    """Make links of the numbers of arXiv."""
    return re.sub(r"\b\d{4}\.\d{5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", paper)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--schema"]:
            sys.stdout.write(json.dumps(json_schema(), indent=1, allow_nan=False) + "\n")
        case ["--methods"]:
            sys.stdout.write(methods_markdown())
        case _:
            sys.stdout.write(knobs_markdown())
