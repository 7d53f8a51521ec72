"""Differential privacy of what a client learns: each group of its difference is cut to a bound, and noise is added.

    accountant.py  what merges cost: Renyi differential privacy of a Gaussian mechanism on a sampled part
    clipping.py    differences cut to a bound for each group, and bounds that follow a quantile of their lengths
    mechanism.py   how much noise a scenario adds to what, what it costs, and its price before a run
    noise.py       Gaussian noise, from a run's own streams or from the operating system

Begin with mechanism.py.
"""
