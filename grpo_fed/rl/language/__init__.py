"""How clients with a language model learn.

    sampling.py  completions of K clients, sampled token by token

Begin with sampling.py.
"""
