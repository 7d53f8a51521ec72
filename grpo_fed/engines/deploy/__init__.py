"""A server and clients on several machines.

    commands.py      what `grpo-fed deploy` does
    certificates.py  an authority, certificates and keys

Begin with commands.py.
"""
