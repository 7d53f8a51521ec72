"""A federation on this machine.

    engine.py    LocalEngine: the federation, its grid and its clients' state
    grid.py      LocalGrid: a Flower grid without Flower's processes, and make_local_grid
    schedule.py  ChunkSchedule: which clients are trained together, and in which order

Begin with engine.py.
"""
