"""Many runs of one scenario with other values: a grid of them, or values that Optuna chooses.

    values.py    what a sweep varies: lists of values, ranges, and spaces to choose from
    points.py    the runs of a sweep: their values, folders and scores
    worker.py    a process that trains one run after another
    pool.py      several such processes
    grid.py      all combinations, each with all seeds
    search.py    values that Optuna chooses, with pruning by rounds
    page.py      the table, and sweep.json and sweep.md

Begin with grid.py.
"""
