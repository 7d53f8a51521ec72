"""What a scenario starts from, which levels it trains on, what does not learn, and how it scales rewards, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from grpo_fed.reports.formatting import format_count, list_names
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.scenario.toml.text import short_toml
from grpo_fed.tasks.curriculum import Curriculum


def explain_start(scenario: Scenario, frozen: Sequence[str]) -> Iterator[str]:
    """Explain what policies begin with, and which blocks do not learn."""
    if scenario.policy.start is not None:
        yield f"Policies begin with those of {scenario.policy.start}, and so do the shared blocks."
    for entry in scenario.clients:
        if entry.start is not None:
            yield f"What {entry.name} does not share begins with the policy of {entry.start}."
    if frozen:
        yield f"Frozen, so neither learned nor sent: {list_names(frozen)}."


def explain_adaptation(scenario: Scenario) -> Iterator[str]:
    """Explain which clients take no part in training, and what adapts to its task in evaluations."""
    held_out, updates = [entry for entry in scenario.clients if not entry.trains], scenario.evaluate.adapt
    if held_out:
        count = format_count(sum(entry.count for entry in held_out), "client")
        names = list_names([entry.name for entry in held_out])
        yield (
            f"{count} of {names} {'takes' if count == '1 client' else 'take'} no part in training, and no score counts"
            " them: each evaluation begins with the shared blocks as they are."
        )
    if updates:
        batch = scenario.rollout.num_envs * scenario.rollout.horizon
        steps = f" on {batch:,} steps of its own each" if scenario.unit == "steps" else " on a batch of its own each"
        yield (
            f"In an evaluation with the likeliest actions each client makes {format_count(updates, 'local update')}"
            f"{steps} on a copy of its policy, and is evaluated after each; nothing else depends on them."
        )


def explain_callbacks(scenario: Scenario) -> Iterator[str]:
    """Explain which callbacks the server calls."""
    names = []
    for entry in scenario.callbacks:
        path, kwargs = (entry, {}) if isinstance(entry, str) else (entry["path"], entry["kwargs"])
        given = ", ".join(f"{key} = {short_toml(value)}" for key, value in kwargs.items())
        names.append(f"{path} ({given})" if given else path)
    if names:
        yield f"The server calls {list_names(names)} while the run goes on; a callback may end the run early."


def explain_twins(scenario: Scenario) -> Iterator[str]:
    """Explain how clients find out whether sharing pays for them."""
    if scenario.evaluate.twins:
        yield (
            f"Each client also trains a twin on {scenario.steps:,} {scenario.unit} of its own a round, which begins as"
            " it does and shares nothing; their returns in training say whether sharing pays for the client."
        )


def explain_newcomers(scenario: Scenario) -> Iterator[str]:
    """Explain who may join while the run goes on."""
    newcomers = scenario.newcomers
    if newcomers.like is not None:
        yield (
            f"In a deployment up to {format_count(newcomers.most, 'client')} that the scenario does not name may join"
            f" the run, each with the task of {newcomers.like}; they begin with the shared blocks."
        )


def explain_levels(scenario: Scenario) -> Iterator[str]:
    """Explain which levels tasks have, how those of training are chosen, and who moves them."""
    entries = [(entry, entry.curriculum) for entry in scenario.clients if entry.curriculum is not None]
    for entry, curriculum in entries:
        what = _box_in_words(curriculum.ranges) if curriculum.ranges else "the seeds of episodes"
        yield f"Levels of {entry.name}: {what}. {_draws_in_words(curriculum)}."
    if not entries:
        return
    yield "Evaluations play levels that are spread evenly over all ranges."
    if any(Curriculum(curriculum).slots for _, curriculum in entries):
        yield (
            "The server moves the levels of all clients of an entry by all their returns."
            if scenario.curriculum.by == "server"
            else "Each client moves its levels by its own returns."
        )


def _box_in_words(box: Mapping[str, Sequence[float]]) -> str:
    return list_names([f"{name} {low:g} to {high:g}" for name, (low, high) in box.items()])


def _draws_in_words(curriculum: CurriculumSettings) -> str:
    """Explain how the levels of training are chosen."""
    first, episodes = _box_in_words(curriculum.start), format_count(curriculum.episodes, "episode")
    moves = f"by {curriculum.step:g} of the way whenever the mean return of {episodes}"
    back = "" if curriculum.floor is None else f" and back whenever it is below {curriculum.floor:g}"
    match curriculum.kind:
        case "schedule":
            return (
                f"Training draws from a box that grows from {first} to all of this by {curriculum.until:.0%} of the run"
            )
        case "return":
            return (
                f"Training draws from a box that grows from {first} to all of this, {moves} is at least"
                f" {curriculum.target:g}{back}"
            )
        case "expanding":
            return (
                f"Training draws from a box that begins with {first}, with {curriculum.edges:.0%} of the copies at its"
                f" edges; an edge moves outwards {moves} there is at least {curriculum.target:g}{back}"
            )
        case "learnability":
            return (
                f"Training draws from {curriculum.levels:,} levels, by how uncertain it is that an episode returns"
                f" {curriculum.target:g} or more, and {curriculum.explore:.0%} of them alike"
            )
        case "replay":
            return (
                f"Training plays new seeds in {curriculum.explore:.0%} of the copies, and in the others again those of"
                f" {curriculum.levels:,} seeds where the critic errs most"
            )
        case _:
            return "Training draws from all of this alike"


def explain_optimiser(scenario: Scenario) -> Iterator[str]:
    """Explain how the server steps towards the merge, and what clients add to their own steps."""
    merge, inner_rate = scenario.merge, scenario.personal.inner_rate
    if not scenario.policy.shared:
        return
    if merge.optimiser != "sgd" or merge.rate != 1:
        how = {
            "sgd": f"The server goes {merge.rate:g} times the way to it",
            "momentum": f"The server steps towards it with momentum {merge.momentum:g} and rate {merge.rate:g}",
            "adam": f"The server steps towards it by Adam with rate {merge.rate:g}",
        }[merge.optimiser]
        yield f"{how}{'' if scenario.proximity.mode == 'off' else '; KL budgets limit this step'}."
    if merge.correct_drift:
        yield "Each client adds to its steps what all clients' mean step in the last round had more than its own."
    if inner_rate:
        yield (
            f"Every second minibatch gives an inner step of {inner_rate:g} times its gradient, and the next one the"
            " gradient there, by which the client moves from before that step."
        )


def explain_rewards(scenario: Scenario) -> Iterator[str]:
    """Explain what is done to rewards before clients learn from them."""
    rollout = scenario.rollout
    scales = {rollout.reward_scale if entry.reward_scale is None else entry.reward_scale for entry in scenario.clients}
    if scenario.unit == "completions":
        return
    if scales != {1.0}:
        low, high = min(scales), max(scales)
        by_client = f"{low:g}" if low == high else f"{low:g} to {high:g} (by client)"
        yield f"Rewards are multiplied by {by_client} to learn from; returns are reported as they were."
    if rollout.reward_clip is not None:
        yield f"Rewards are clipped to +-{rollout.reward_clip:g} to learn from."
