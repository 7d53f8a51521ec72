"""What a scenario may say: every knob with its doc, as records, as markdown and as a JSON schema.

`python -m grpo_fed.scenario.reference > docs/configuration.md`, `python -m grpo_fed.scenario.reference --methods > docs/methods.md` and
`python -m grpo_fed.scenario.reference --schema > scenarios/scenario.schema.json` keep the files up to date.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from grpo_fed.scenario.methods import MERGE_RULES, METHODS, Method
from grpo_fed.scenario.presets import PRESETS, Preset
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.tables import as_toml_lines
from grpo_fed.scenario.toml.reading import all_keys, section_at
from grpo_fed.scenario.toml.text import short_toml

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Knob:
    """One key of a scenario."""

    section: str
    """Its table; empty for the top of the file."""
    key: str
    type: str
    """In words."""
    default: str
    """As TOML writes it; empty where the key must be given or is left out."""
    limits: str
    """Such as `> 0`; empty if there are none."""
    doc: str


def list_knobs(model: type[BaseModel] = Scenario) -> list[Knob]:
    """All knobs, in the order in which a file has them."""
    return [
        Knob(
            ".".join(map(str, path[:-1])),
            str(path[-1]),
            _type(shape := _schema_of(info)),
            _default(info),
            ", ".join(_limits(shape)),
            " ".join((info.description or "").split()),
        )
        for path, info in all_keys(model)
    ]


def json_schema(model: type[BaseModel] = Scenario) -> dict[str, Any]:
    """A JSON schema, by which editors complete and check a scenario as it is typed."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_without_infinity(model.model_json_schema())}


def _without_infinity(shape: Any) -> Any:
    """JSON has no infinity: a default that is one is left out."""
    if isinstance(shape, dict):
        return {key: _without_infinity(value) for key, value in shape.items() if value != math.inf}
    return [_without_infinity(value) for value in shape] if isinstance(shape, list) else shape


def knobs_markdown(model: type[BaseModel] = Scenario) -> str:
    """The reference of all knobs."""
    parts = [_HEAD]
    for section, members in groupby(list_knobs(model), key=lambda knob: knob.section):
        parts.append(_section(model, section, list(members)))
    return "\n".join(parts)


def methods_markdown() -> str:
    """The page of methods, presets and merge rules."""
    keys = {knob.key: knob for knob in list_knobs() if knob.section == "merge"}
    rules = [
        (
            f"`{name}`",
            f"{rule.name}. {_linked(rule.paper)}",
            "<br>".join(f"`merge.{key} = {keys[key].default}`" for key in rule.keys),
            rule.when,
        )
        for name, rule in MERGE_RULES.items()
    ]
    table = _table(("`merge.rule =`", "is", "reads, by default", "take it"), rules)
    parts = (
        _rows("Methods", "method", _ABOUT_METHODS, METHODS),
        _rows("Presets", "objective.preset", _ABOUT_PRESETS, PRESETS),
    )
    return "\n".join([_METHODS, *parts, f"## Merge rules\n\n{_ABOUT_RULES}\n{table}"])


_HEAD = """\
<!-- Written by `python -m grpo_fed.scenario.reference > docs/configuration.md`: change grpo_fed/scenario/settings.py instead. -->
# Configuration

A scenario is a TOML file. It needs a `name` and one `[[clients]]` table; all else has a default. `--set KEY=VALUE`
changes one key for one run and goes through the same checks: `--set objective.clip=0.3`, `--set clients.cart.count=8`
(a client by its name, or by its number, counted from 0), `--set 'trust.blocks."torso.*"=0.01'`.

- A key that is not given takes the value of `method`'s row in the [table of methods](methods.md#methods), or else of
  `objective.preset`'s row in the [table of presets](methods.md#presets), or else its default.
- `--set method=fedavg` outranks the file: what it gives for keys of either method's row makes way.
- `inf` is no limit, for the keys whose doc says so. Where a count can be left out, 0 does it.
- Whole numbers may stand for numbers; numbers in quotes may not.
- Every run saves its resolved scenario, with every value in it, as a file that can be run again.
- Editors that know TOML schemas (VS Code with Even Better TOML) complete and explain keys in a file whose first line is
  `#:schema` and the path of `scenarios/scenario.schema.json`.
"""


_METHODS = """\
<!-- Written by `python -m grpo_fed.scenario.reference --methods > docs/methods.md`: change grpo_fed/scenario/methods.py or presets.py. -->
# Methods, presets and merge rules

Three choices by name, each a line of TOML: `method` says what is shared and how, `objective.preset` what a client
climbs, `merge.rule` how the server makes one policy of what it hears. Methods and presets are rows of values for keys
that stand in [configuration.md](configuration.md) and have no code of their own, so each can be taken apart and put
together anew; [algorithm.md](algorithm.md) has the equations, [extending.md](extending.md) how to add one of your own.
How they compare on our tasks: the [README](../README.md) and [RESULTS.md](../benchmarks/RESULTS.md); on yours:
`grpo-fed compare mine.toml --methods local,fedavg,grpo`.
"""
_ABOUT_METHODS = """\
What a method does not mention keeps its default. A key that the scenario gives wins; `--set method=fedavg` outranks
the file.
"""
_ABOUT_PRESETS = """\
What a preset does not mention keeps its default, which is PPO's. `inf` is no limit.
"""
_ABOUT_RULES = """\
Most methods bring their rule; this is to change it. Where no memory is named, all replies of a round are held.
"""


def _section(model: type[BaseModel], section: str, members: Sequence[Knob]) -> str:
    path = tuple(section.split(".")) if section else ()
    title = f"`[{section}]`" if section else "At the top of the file"
    if section and model.model_fields[section].is_required():
        title = f"`[[{section}]]`"
    doc = " ".join((getattr(section_at(model, path), "__doc__", None) or "").split())
    rows = [(f"`{m.key}`", m.type, _code(m.default), m.limits, m.doc) for m in members]
    return f"## {title}\n\n{doc}\n\n{_table(('key', 'type', 'default', 'limits', 'meaning'), rows)}"


def _rows(title: str, key: str, about: str, named: Mapping[str, Preset] | Mapping[str, Method]) -> str:
    lines = [
        (
            f"`{name}`",
            f"{row.name}. {_linked(row.paper)}",
            "<br>".join(f"`{one}`" for one in as_toml_lines(row.values)),
            row.when,
        )
        for name, row in named.items()
    ]
    return f"## {title}\n\n{about}\n{_table((f'`{key} =`', 'is', 'sets', 'take it'), lines)}"


def _linked(paper: str) -> str:
    """With the numbers of arXiv as links."""
    return re.sub(r"\b\d{4}\.\d{5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", paper)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _schema_of(info: FieldInfo) -> Schema:
    return TypeAdapter(_annotated(info)).json_schema()


def _default(info: FieldInfo) -> str:
    """The value as a file would have it."""
    if info.is_required():
        return ""
    value = TypeAdapter(_annotated(info)).dump_python(info.get_default(call_default_factory=True))
    return "" if value is None else short_toml(value)


def _annotated(info: FieldInfo) -> Any:
    """The type that a field was declared with, limits and all."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _type(shape: Schema) -> str:
    """Of a value, in words."""
    if "enum" in shape:
        return " | ".join(short_toml(choice) for choice in shape["enum"])
    if "const" in shape:
        return short_toml(shape["const"])
    if options := shape.get("anyOf") or shape.get("oneOf"):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if shape.get("type") == "array":
        return f"list of {_type(shape.get('items', {}))}"
    if shape.get("type") == "object":
        inner = shape.get("additionalProperties")
        return f"table of {_type(inner)}" if isinstance(inner, dict) and inner else "table"
    if "pattern" in shape:
        return "import path"
    names = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false"}
    return names.get(str(shape.get("type")), "anything")


def _limits(shape: Schema) -> Iterator[str]:
    """Of a value, or of each item in it."""
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    for word, sign in signs.items():
        if word in shape:
            yield f"{sign} {short_toml(shape[word])}"
    for word in ("anyOf", "oneOf"):
        for option in shape.get(word, ()):
            yield from _limits(option)
    for word in ("items", "additionalProperties"):
        if isinstance(shape.get(word), dict):
            yield from _limits(shape[word])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--schema"]:
            sys.stdout.write(json.dumps(json_schema(), indent=1, allow_nan=False) + "\n")
        case ["--methods"]:
            sys.stdout.write(methods_markdown())
        case _:
            sys.stdout.write(knobs_markdown())
