"""What a scenario will do with a language model, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_fed.reports.formatting import format_count
from grpo_fed.scenario.scenario import Scenario


def explain_language(scenario: Scenario) -> Iterator[str]:
    """Explain the model, its adapters, and what a round is for clients with prompts; nothing without such clients."""
    if not any(entry.prompts for entry in scenario.clients):
        return
    language, objective, group = scenario.language, scenario.objective, scenario.group
    factors = "B, with A drawn once and the same for all" if language.learn == "B" else "A and B"
    maps = "all linear maps" if language.maps == ["*"] else ", ".join(language.maps)
    yield (
        f"The language model {language.model} is frozen, in {language.dtype}; each client learns adapters of rank"
        f" {language.rank} on {maps} ({factors})."
    )
    batch = scenario.rollout.num_envs
    batches = -(-scenario.steps // batch)
    updates = batches * objective.epochs * objective.minibatches
    prompts = f"{batch // group.size} prompts with {group.size}" if group.by == "start" else f"{batch} prompts with 1"
    yield (
        f"{format_count(scenario.rounds, 'round')}. In each round a client writes {batches:,}"
        f" batch{'' if batches == 1 else 'es'} of {prompts} completions, of at"
        f" most {language.length} tokens, and makes {format_count(updates, 'update')}."
    )
    equal = {
        "keep": "counts in the averages",
        "skip": "is left out",
        "redraw": f"is replaced by another, {format_count(group.redraws, 'draw')} at most",
    }[group.equal]
    yield f"A group whose completions are rewarded equally teaches nothing, and {equal}."
    if objective.ratio == "episode":
        yield "The probability ratio is that of a whole completion, its geometric mean over tokens (GSPO)."
    if scenario.trust.region in ("penalty", "adaptive"):
        how = {
            "exact": "over the whole vocabulary",
            "sampled": "on the tokens that were sampled (k3)",
            "weighted": "on the tokens that were sampled (k3, times the probability ratio)",
        }[scenario.trust.estimate]
        yield f"The KL is computed {how}."
