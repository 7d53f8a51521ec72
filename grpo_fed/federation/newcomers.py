"""What a client must find out that joins others which have learned already."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fed.federation.loaded_client import LoadedClient
from grpo_fed.rl.learner import ClientPolicies
from grpo_fed.scenario.scenario import Scenario


def play_unlearned(
    scenario: Scenario, policies: ClientPolicies, clients: Sequence[LoadedClient], round: int
) -> dict[str, float]:
    """Play with policies that have learned nothing, for clients whose first round is a later one of the run.

    Such a client begins with what others have learned, so its own returns never show what that is worth to it. Return
    the mean returns by client, where the merge rule lets clients compare: what is above them counts as learned.
    """
    merge, new = scenario.merge, [client for client in clients if client.stored is None and round > 1]
    if merge.rule != "persistence" or not new or (merge.confirm == "evidence" and not merge.rejoin):
        return {}
    names, states = [client.name for client in new], [None] * len(new)
    first = policies.parameters(names, states)
    evaluations = policies.evaluate(names, first, states, round, deterministic=False, compared=merge.episodes)
    return {evaluation.client: evaluation.score for evaluation in evaluations}
