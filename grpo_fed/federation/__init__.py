"""The federation: the messages of server and clients, and what each does with them.

    messages.py       instructions and answers
    rounds.py         Federation: the server's loop
    conversation.py   Conversation: sends instructions, and notes who gave no answer
    server.py         Server: merges the answers, chooses the step, moves the shared blocks
    sites.py          SiteTree: a server that merges sites, and a server for each of them
    clients.py        Clients: carry out the instructions
    kinds.py          instructions of one kind
    hostile.py        answers of hostile clients, as `[[clients]] attack` has them
    setup.py          FederationSetup: tasks and shared blocks of a scenario, resolved once
    client_reports.py parts of a client's answers, from what its learner reports
    adaptation.py     how fast a policy adapts to its client's task, on a copy
    loaded_client.py  LoadedClient: where a client starts, and what it remembers
    comparison.py     a client's choice between its own parameters and the shared ones
    compression.py    differences in half precision, with error feedback, and what a client sends of them
    drift.py          what clients add to their steps so that they drift less apart
    learners.py       ClientLearners: the learners of a client's policies, shared, personal and twin
    joining.py        newcomers in a run that goes on: its checkpoint
    newcomers.py      what they must find out
    twins.py          whether sharing pays for a client, beside a twin that learns alone
    state_store.py    StateStore: the clients' states between rounds
    participation.py  which clients take part
    pace.py           virtual time
    buffer.py         AnswerBuffer: rounds that do not wait for all clients
    assignments.py    what clients work on meanwhile
    arrivals.py       whose answers come next
    combined_answer.py  one answer of several that a client gave
    trained_round.py  TrainedRound: what clients have learned in a round
    evaluations.py    which of the clients' scores the server believes
    moments.py        RunMoments: calls the callbacks
    round_merge.py    a round's merge, reply by reply
    private_merge.py  the same with differential privacy
    secure_merge.py   the same from a sum alone, with secure aggregation
    secure_round.py   SecureRound: the server's side of its session, around a round's training
    secure_clients.py SecureClients: a client's side
    masked_vectors.py what clients add up
    withheld_metrics.py what is left of a client's metrics where they stay with it
    server_step.py    a round's step, within budgets
    steering.py       the levels of clients that the server moves by their returns
    server_state.py   the server's state between two rounds
    round_record.py   a round as a record
    stopping.py       early stopping
    transport.py      Transport, the interface that an engine provides

It knows no transport, and writes no files but the run's folder and the clients' states. Begin with rounds.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.federation.clients import Clients
    from grpo_fed.federation.messages import (
        Evaluate,
        Evaluated,
        EvaluationPlan,
        EvaluationSummary,
        Measure,
        Measured,
        Start,
        Train,
        Trained,
    )
    from grpo_fed.federation.rounds import Federation
    from grpo_fed.federation.setup import FederationSetup
    from grpo_fed.federation.state_store import StateStore
    from grpo_fed.federation.transport import Transport

__all__ = [
    "Clients",
    "Evaluate",
    "Evaluated",
    "EvaluationPlan",
    "EvaluationSummary",
    "Federation",
    "FederationSetup",
    "Measure",
    "Measured",
    "Start",
    "StateStore",
    "Train",
    "Trained",
    "Transport",
]

MODULES = {
    "Clients": "grpo_fed.federation.clients",
    "Evaluate": "grpo_fed.federation.messages",
    "Evaluated": "grpo_fed.federation.messages",
    "EvaluationPlan": "grpo_fed.federation.messages",
    "EvaluationSummary": "grpo_fed.federation.messages",
    "Federation": "grpo_fed.federation.rounds",
    "FederationSetup": "grpo_fed.federation.setup",
    "Measure": "grpo_fed.federation.messages",
    "Measured": "grpo_fed.federation.messages",
    "Start": "grpo_fed.federation.messages",
    "StateStore": "grpo_fed.federation.state_store",
    "Train": "grpo_fed.federation.messages",
    "Trained": "grpo_fed.federation.messages",
    "Transport": "grpo_fed.federation.transport",
}

__getattr__ = lazy_getattr(__name__, MODULES)
