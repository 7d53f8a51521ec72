"""A scenario in tables, before anything is trained: its clients, how their policies are cut, what a round sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeGuard, final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from grpo_fed.federation.client_reports import needs_fisher
from grpo_fed.federation.participation import ceil_fraction
from grpo_fed.policy.base import Policy, StackedPolicy
from grpo_fed.policy.blocks import Block
from grpo_fed.policy.groups import cut_groups
from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.formatting import format_count
from grpo_fed.reports.tables import make_table
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.learner import Learner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import clients_of_sites
from grpo_fed.scenario.toml.text import short_toml, shorten
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.task import ActionSpec, Task

FLOAT_BYTES = 4
"""Bytes of a parameter."""
MAX_LETTERS = 70
"""Characters of a list of clients."""


def scenario_overview(
    scenario: Scenario, learners: Sequence[Learner], shared: SharedBlocks
) -> Iterator[RenderableType]:
    """Describe the whole, the clients, and the blocks of each shape of policy.

    learners: one for each shape of policy, with all clients of that shape.
    """
    clients = sum(len(learner.tasks) for learner in learners)
    trained = len(shared.training_clients)
    steps = scenario.rounds * scenario.steps * trained
    yield Text.assemble((scenario.name, "bold cyan"), f": {scenario.description}" if scenario.description else "")
    unit = scenario.unit
    who = format_count(clients, "client")
    who += f", {len(shared.held_out):,} of them held out" if shared.held_out else ""
    yield Text(
        f"{who}, {format_count(scenario.rounds, 'round')} of {scenario.steps:,} {unit} each"
        f": {steps:,} {unit}; {scenario.objective.preset} on {resolve_device(scenario.device)}, seed {scenario.seed}"
    )
    yield _clients_table(scenario, learners)
    if sites := clients_of_sites(scenario):
        named = ", ".join(f"{name} ({format_count(len(names), 'client')})" for name, names in sites.items())
        yield Text(f"Sites, each of which merges its own clients: {named}.")
    changes = _changes(scenario)
    if changes:
        yield Text(f"Changes of tasks: {changes}.")
    for learner in learners:
        names = shorten(", ".join(_entries_of(scenario, learner.names)), MAX_LETTERS)
        yield Text.assemble("Policy of ", (names, "bold"), f": {_sizes(learner, shared)}")
        yield _blocks_table(learner, scenario, shared)
    yield Text(_traffic(scenario, shared, trained))


def _traffic(scenario: Scenario, shared: SharedBlocks, clients: int) -> str:
    """Say what a round sends: all shared parameters to each sampled client, and at most as much back."""
    if not shared.size:
        return "Nothing is shared: no parameters are sent."
    part = scenario.round.buffer if scenario.round.mode == "buffered" else scenario.round.fraction
    sampled = ceil_fraction(part, clients)
    groups = format_count(len(shared.groups.names), "group")
    who = "the one client" if sampled == 1 else f"each of {sampled:,} clients"
    rests = " A client rests after two answers." if scenario.round.again == "at-once" else ""
    buffered = (
        f" The server merges as soon as {format_count(sampled, 'client')} of {clients:,} have answered, and does not"
        f" wait for others; their answers come into a later merge.{rests}"
        if scenario.round.mode == "buffered"
        else ""
    )
    up = 0.5 if scenario.wire.dtype == "float16" else 1.0
    up += needs_fisher(scenario)
    fisher = ", the diagonal of its Fisher matrix included" if needs_fisher(scenario) else ""
    both = _bytes((1 + up) * sampled * shared.size)
    return (
        f"Shared by all: {', '.join(shared.blocks)}, in {groups}. In a round {who} receives {_bytes(shared.size)} and"
        f" sends at most {_bytes(up * shared.size)}{fisher}: {both} in all, without the messages that measure the"
        f" step.{buffered}"
    )


@final
class FittingTable:
    """A table whose last column has long texts; where it would break words, they have a table of their own below."""

    def __init__(self, *head: str, left: Collection[str] = ()) -> None:
        """head: the names of the columns. left: those between the first and the last that hold words."""
        self.head, self.left = head, left
        self.rows: list[Sequence[RenderableType]] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = self._table(len(self.head) - 1)
        width = console.measure(numbers, options=options.update(max_width=1000)).maximum
        word = max((len(word) for row in self.rows for word in str(row[-1]).split()), default=0)
        if width + max(word, len(self.head[-1])) + 3 <= options.max_width:  # 3: between the columns
            yield self._table(len(self.head))
        else:
            yield numbers
            table = make_table(self.head[0])
            table.add_column(self.head[-1], overflow="fold")
            for row in self.rows:
                table.add_row(row[0], row[-1])
            yield table

    def _table(self, columns: int) -> Table:
        """Make a table of the first columns."""
        table = make_table(self.head[0])
        for name in self.head[1:columns]:
            if name == self.head[-1]:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="left" if name in self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row[:columns])
        return table


def _clients_table(scenario: Scenario, learners: Sequence[Learner]) -> FittingTable:
    """Make a row for each client, or for neighbouring clients of an entry with tasks that differ in numbers alone."""
    entry_of = {name: entry.name for entry in scenario.clients for name in entry.names}
    answers = all(isinstance(task, LanguageTask) for learner in learners for task in learner.tasks)
    numbers = ("context", "tokens", "batch", "length") if answers else ("obs", "actions", "envs", "limit")
    table = FittingTable("client", *numbers, "task")
    for learner in learners:
        for (_, kind), group in groupby(learner.tasks, key=lambda task: (entry_of[task.client], _task_kind(task))):
            alike = list(group)
            first, last, limit = alike[0], alike[-1], kind[-1]
            limits = [steps for steps in (limit, learner.scenario.rollout.episode_limit) if steps]
            table.rows.append(
                (
                    first.client if len(alike) == 1 else f"{first.client} to {last.client} ({len(alike):,})",
                    *_inputs_and_actions(first, learner.policy),
                    str(learner.scenario.rollout.num_envs),
                    f"{min(limits):,}" if limits else "none",
                    _task_text(alike),
                )
            )
    return table


def _entries_of(scenario: Scenario, names: Sequence[str]) -> list[str]:
    """Name the entries of these clients, with how many of them each has."""
    counts = {entry.name: len(set(entry.names) & set(names)) for entry in scenario.clients}
    return [name if name in names else f"{name} ({count:,})" for name, count in counts.items() if count]


def _changes(scenario: Scenario) -> str:
    """List the changes of the clients' tasks, and those that the run does not reach."""
    return "; ".join(
        f"{entry.name} from round {change.round} on {short_toml(change.kwargs)}"
        + (f" (not reached in {format_count(scenario.rounds, 'round')})" if change.round > scenario.rounds else "")
        for entry in scenario.clients
        for change in entry.changes
    )


def _task_kind(task: Task) -> tuple[str, str, str, int]:
    """Describe what tells the rows of an entry apart: the task, its arguments but for numbers, the rest, its limit."""
    name, arguments, rest, limit = _task_parts(task)
    kinds = {key: None if _is_number(value) else value for key, value in arguments.items()}
    return name, repr(kinds), rest, limit


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _task_text(alike: Sequence[Task]) -> str:
    """Write the task of clients that differ in numbers alone, each of these as a range."""
    name, arguments, rest, _ = _task_parts(alike[0])
    texts = []
    for key, value in arguments.items():
        text = short_toml(value)
        if _is_number(value):
            values = [_task_parts(task)[1][key] for task in alike]
            low, high = min(values), max(values)
            text = short_toml(value) if low == high else f"{short_toml(low)} to {short_toml(high)}"
        texts.append(f"{key} = {text}")
    return f"{name} {', '.join(texts)}{rest}".strip() if texts else f"{name}{rest}"


def _task_parts(task: Task) -> tuple[str, Mapping[str, Any], str, int]:
    """Take a task apart: its name, its arguments, its rewards or its levels and wrappers in words, and its limit."""
    if isinstance(task, LanguageTask):
        settings = task.settings
        rewards = " and ".join(reward.function for reward in settings.rewards) or "the task itself"
        return settings.task, settings.kwargs, f" rewarded by {rewards}", task.language.length
    assert isinstance(task, GymTask)
    wrappers = "".join(f" in {wrapper}" for wrapper in task.wrappers)
    ranges = {} if task.curriculum is None else task.curriculum.settings.ranges
    levels = "".join(f", level {key} = {low:g} to {high:g}" for key, (low, high) in ranges.items())
    return task.env, task.kwargs, levels + wrappers, task.episode_limit


def _inputs_and_actions(task: Task, policy: Policy) -> tuple[str, str]:
    """Write the size of an observation, and the actions; of a language model, the tokens that it reads and knows."""
    if isinstance(policy, AdapterPolicy):
        return f"{policy.shape.context:,}", f"1 of {policy.shape.vocabulary:,}"
    assert isinstance(task, GymTask)
    size = f"{_shape(task.picture)} uint8" if task.picture else str(task.observation_size)
    return size, action_text(task.action)


def action_text(action: ActionSpec) -> str:
    """Write the actions: `1 of 2`, `2 x 1 of 3`, `1 real`, `1 x 1 of 3 and 2 real`."""
    if action.kind == "categorical":
        return f"1 of {action.sizes[0]}"
    counts = Counter(action.choices)
    parts = [f"{times} x 1 of {size}" for size, times in counts.items()]
    return " and ".join([*parts, *([f"{action.reals} real"] if action.reals else [])])


def _sizes(learner: Learner, shared: SharedBlocks) -> str:
    """Write the parameters of a policy, those that are shared, and its distribution or what they adapt."""
    policy, layout = learner.policy, learner.policy.layout
    text = f"{layout.size:,} parameters, {_bytes(layout.size)}; shared {shared.size:,}, {_bytes(shared.size)};"
    if isinstance(policy, StackedPolicy):
        alone = getattr(policy, "not_stacked", "")
        note = f"; clients are computed one by one, as torch.func cannot stack the module ({alone})" if alone else ""
        return f"{text} {type(policy.distribution).__name__}{note}"
    return f"{text} adapters of {learner.scenario.language.model}, sha256 {shared.base[:12]}"


def _blocks_table(learner: Learner, scenario: Scenario, shared: SharedBlocks) -> FittingTable:
    """Make a row for each block of a policy."""
    layout = learner.policy.layout
    groups = Counter(cut_groups(layout, scenario.policy.groups).blocks)
    penalised = {block.name for block in layout.select(scenario.penalty.blocks)}
    budgets = {
        block.name: limit for pattern, limit in scenario.trust.blocks.items() for block in layout.select([pattern])
    }
    has_penalty = any(task.penalty for task in learner.tasks) or scenario.penalty.l1 or scenario.penalty.outer
    table = FittingTable("block", "parameters", "bytes", "groups", "role", "tensors", left=("role",))
    for block in layout.blocks:
        is_shared = block.name in shared.blocks
        roles = ["shared" if is_shared else "frozen" if block.frozen else "private"]
        roles += ["penalised"] if has_penalty and block.name in penalised and not block.frozen else []
        roles += [f"KL <= {budgets[block.name]:g}"] if block.name in budgets else []
        table.rows.append(
            (
                block.name,
                f"{block.size:,}",
                _bytes(block.size),
                f"{groups[block.name]:,}",
                Text(", ".join(roles), style="green" if is_shared else ""),
                _tensors(block),
            )
        )
    return table


def _tensors(block: Block) -> str:
    """List a block's tensors with their shapes, without the block's own name before theirs."""
    return ", ".join(f"{slot.name.removeprefix(block.name + '.')} {_shape(slot.shape)}" for slot in block.slots)


def _shape(shape: tuple[Any, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _bytes(parameters: float) -> str:
    """Write the size of a number of parameters in float32."""
    size = round(parameters * FLOAT_BYTES)
    return f"{size:,} B" if size < 1_000 else f"{size / 1_000:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
