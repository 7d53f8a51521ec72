"""Worker processes, and how jobs are run in them.

    pool.py         WorkerPool and InProcessExecutor: jobs, and their results
    fork_server.py  forks workers from a process that has imported everything
    handler.py      RequestHandler: what a worker does with a request
    frames.py       records over a socket, without pickle
    orphans.py      ends what environments have started
    output.py       WorkerOutput: what workers print, within a limit

Begin with pool.py.
"""
