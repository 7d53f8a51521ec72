"""A federation over Flower: its simulation, or a SuperLink and nodes.

    engine.py      FlowerEngine: starts a run and reads its log
    app_folder.py  the Flower app, as a folder of its own
    superlink.py   a SuperLink, nodes, and Flower's commands
    processes.py   processes that are started and watched
    supervisor.py  ends these processes when their owner has ended
    access.py      who may ask a SuperLink for what
    discovery.py   asks nodes for tasks that the server cannot make
    node.py        NodeHandler: what a node does with a message
    forward.py     MessageForwarder: hands a message to the process that stays warm
    warm.py        WarmServer: the process beside a node that keeps workers between messages

Begin with engine.py.
"""
