"""A server and clients on several machines.

    commands.py      what `grpo-fed deploy` does
    status.py        what `grpo-fed deploy status` shows
    keys.py          which keys the SuperLink accepts; a client's own key, and new ones for old
    certificates.py  a certificate authority, the server's certificate, nodes' keys

Begin with commands.py.
"""
