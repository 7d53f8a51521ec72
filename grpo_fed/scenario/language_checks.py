"""Finds contradictions of clients with `prompts`, and of what only these can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.scenario.toml.lines import KeyPath

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

Contradiction = tuple[str, tuple[KeyPath, ...]]
"""What is wrong in words, and the keys that it concerns."""

GROUP_PRESETS = '"grpo", "dr-grpo", "rloo", "dapo" or "gspo"'
"""The presets without a critic."""
NO_START = (
    "is for clients with env: a client with prompts starts from language.model, which may be the folder that"
    " `grpo-fed export --merge` writes"
)
NETWORK_BLOCKS = frozenset(("torso.*", "actor"))
"""Patterns of `policy.shared` in the table of methods that no adapter matches."""


def language_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """Find contradictions between the kind of a client and other keys; with clients of both kinds, of either."""
    for number, client in enumerate(scenario.clients):
        yield from _entry_mistakes(client, ("clients", number))
    kinds = {client.prompts is not None: number for number, client in reversed([*enumerate(scenario.clients)])}
    if True in kinds:
        yield from _mistakes_with_prompts(scenario, ("clients", kinds[True], "prompts"))
    if False in kinds:
        yield from _mistakes_with_env(scenario, ("clients", kinds[False], "env"))


def _entry_mistakes(client: ClientSettings, path: KeyPath) -> Iterator[Contradiction]:
    """Check that a client has either kind of task, and nothing that belongs to the other one."""
    env, prompts = (*path, "env"), (*path, "prompts")
    if client.env is None and client.prompts is None:
        text = 'needs env, such as "CartPole-v1", or prompts, such as "questions.jsonl"'
        yield text, (path, env, prompts)
    elif client.env is not None and client.prompts is not None:
        yield "a client has either env or prompts; leave one of them out", (prompts, env)
    elif client.prompts is not None:
        for key in ("spread", "changes", "curriculum", "wrappers", "reward_scale"):
            if getattr(client, key):
                yield "is for a client with env; this one has prompts", ((*path, key), prompts)
        if client.attack in ("negated-reward", "random-action"):
            text = f'"{client.attack}" is for a client with env; this one has prompts: use "sign-flip" or another'
            yield text, ((*path, "attack"), prompts)
        if client.start is not None:
            yield f"{NO_START}; this one has prompts", ((*path, "start"), prompts)
    else:
        for key in ("eval_prompts", "held_out", "rewards"):
            if getattr(client, key) != ClientSettings.model_fields[key].default:
                yield "is for a client with prompts; this one has env", ((*path, key), env)


def _mistakes_with_prompts(scenario: Scenario, prompts: KeyPath) -> Iterator[Contradiction]:
    """Check what clients with prompts need. prompts: the key of the first one."""
    objective, rollout, policy = scenario.objective, scenario.rollout, scenario.policy
    if objective.advantage != "group":
        text = f'a client with prompts needs "group", since there is no critic: use objective.preset = {GROUP_PRESETS}'
        yield text, (("objective", "advantage"), prompts)
    if objective.step != "adam":
        yield 'a client with prompts needs objective.step = "adam"', (("objective", "step"), prompts)
    if scenario.group.by not in ("start", "task"):
        text = 'a client with prompts needs group.by = "start", the same prompt, or "task", all of its completions'
        yield text, (("group", "by"), prompts)
    for section, key, is_given in (
        ("policy", "module", policy.module is not None),
        ("policy", "adapter", policy.adapter > 0),
        ("normalise", "observations", scenario.normalise.observations),
        ("normalise", "rewards", scenario.normalise.rewards),
    ):
        if is_given:
            yield "is for clients with env alone; leave it out, or the clients with prompts", ((section, key), prompts)
    if policy.start is not None:
        yield f"{NO_START}; leave it out, or the clients with prompts", (("policy", "start"), prompts)
    if scenario.steps < rollout.num_envs:
        text = f"steps = {scenario.steps} completions must be enough for one update: rollout.num_envs"
        yield f"{text} = {rollout.num_envs}", (("steps",), ("rollout", "num_envs"), prompts)
    yield from _federation_mistakes(scenario, prompts)
    if objective.minibatches > rollout.num_envs and objective.advantage == "group":
        text = f"objective.minibatches = {objective.minibatches} must not be more than the completions of an update"
        keys: tuple[KeyPath, ...] = (("objective", "minibatches"), ("rollout", "num_envs"), prompts)
        yield f"{text}: rollout.num_envs = {rollout.num_envs}", keys
    trust = scenario.trust
    if trust.region in ("penalty", "adaptive") and trust.estimate != "exact" and trust.direction == "old-new":
        text = f'trust.estimate = "{trust.estimate}" estimates KL(new, old): use trust.direction = "new-old"'
        yield text, (("trust", "estimate"), ("trust", "direction"))


def _federation_mistakes(scenario: Scenario, prompts: KeyPath) -> Iterator[Contradiction]:
    """Check what is shared and trained of clients with prompts. prompts: the key of the first one."""
    batch = scenario.rollout.num_envs
    least = min(scenario.personal.steps, 1 - scenario.personal.steps) * scenario.steps
    if scenario.personal.model and least < batch <= scenario.steps:
        text = f"each policy's part of steps = {scenario.steps} completions must be enough for one update"
        keys: tuple[KeyPath, ...] = (("personal", "model"), ("personal", "steps"), ("steps",), prompts)
        yield f"{text}: rollout.num_envs = {batch}", keys
    if scenario.policy.shared and NETWORK_BLOCKS.issuperset(scenario.policy.shared):
        text = "is a part of a network, and a client with prompts has the adapters of a model"
        yield f'{text}: use policy.shared = ["layers.*"]', (("policy", "shared"), prompts)


def _mistakes_with_env(scenario: Scenario, env: KeyPath) -> Iterator[Contradiction]:
    """Check what clients with an environment need. env: the key of the first one."""
    objective = scenario.objective
    if scenario.group.equal == "redraw":
        yield 'draws other prompts, and a client with env has none: use group.equal = "skip"', (("group", "equal"), env)
    if scenario.trust.estimate != "exact":
        yield 'is for clients with prompts alone: use trust.estimate = "exact"', (("trust", "estimate"), env)
    if objective.ratio == "episode" and objective.advantage != "group":
        text = f'needs whole episodes, objective.advantage = "group": use objective.preset = {GROUP_PRESETS}'
        yield text, (("objective", "ratio"), ("objective", "advantage"), env)
    elif objective.ratio == "episode" and objective.step == "adam" and objective.minibatches != 1:
        text = "needs all steps of an episode together, and minibatches divide them: use objective.minibatches = 1"
        yield text, (("objective", "ratio"), ("objective", "minibatches"), env)
