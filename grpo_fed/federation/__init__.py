"""The federation: what server and clients say, and what each does with it. No transport, no files but the clients' own.

messages.py       instructions and answers
rounds.py         Federation: the server's loop. Begin here
clients.py        Clients: what clients do when they are told to
setup.py          FederationSetup: tasks and shared blocks of a scenario, resolved once
learners.py       ClientLearners: a client's shared and personal learner
state_store.py    StateStore: what clients remember between rounds
participation.py  who takes part
round_merge.py    a round's merge, reply by reply
server_step.py    a round's step, within budgets
server_state.py   what the server knows between two rounds
round_record.py   a round as a record
ledger.py         what is written down
transport.py      Transport, the interface that an engine provides
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
