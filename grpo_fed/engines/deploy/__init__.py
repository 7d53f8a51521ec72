"""A server and clients on several machines.

    commands.py      what `grpo-fed deploy` does
    status.py        what `grpo-fed deploy status` shows
    certificates.py  a certificate authority, the server's certificate, nodes' keys

Begin with commands.py.
"""
