"""A federation over Flower: its simulation, or a SuperLink and nodes.

    engine.py        FlowerEngine: starts a run and reads its log
    log_channel.py   LogChannel: round records and the result, through the log of a run
    app_folder.py    the Flower app, as a folder of its own
    superlink.py     a SuperLink, and restarting what ends
    connections.py   the configuration of connections to SuperLinks, which `flwr` reads too
    control.py       SuperLinkControl: starts, follows and stops runs, without `flwr`
    launcher.py      forks the processes of a federation from one that has imported what they need
    superexec.py     starts server apps, as forks too
    processes.py     SupervisedProcesses: processes that end with this one
    supervisor.py    the process that starts these and ends them
    access.py        which machines and accounts may ask a SuperLink for what
    own_scenario.py  a node gets the arguments of its own client alone
    limits.py        how much a SuperLink accepts before it knows from whom
    accounts.py      which account of this machine a connection belongs to
    discovery.py     asks nodes for tasks that the server cannot make
    admission.py     lets clients join that the scenario does not name
    superlink_grid.py  SuperLinkGrid: the grid of a server's app on a SuperLink
    node.py          NodeHandler: what a node does with a message
    withheld_errors.py  what a client's exception tells the server

Begin with engine.py.
"""
