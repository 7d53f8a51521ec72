"""The resident node: one process on a machine that answers for all of its clients.

    host.py         the process: a thread for each client, `python -m grpo_fed.engines.resident.host`
    client.py       ResidentClient: takes a client's messages and sends its answers
    exchange_link.py  ExchangeLink: through requests that wait at the SuperLink
    fleet_link.py   FleetLink: through Flower's Fleet API
    workers.py      ClientWorkers: a client's worker, which stays warm for a run
    run_configs.py  RunConfigs: the scenarios of runs
    identity.py     a node's key
    problems.py     why there is no connection, in plain words
    devices.py      what a node says of its client's device

Begin with client.py.
"""
