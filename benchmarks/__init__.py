"""What is measured: each module is a command, `python -m benchmarks.MODULE --help`.

This file lets `benchmarks` be the repository's own also where packages such as torchrl and opacus install one of that
name.
"""
