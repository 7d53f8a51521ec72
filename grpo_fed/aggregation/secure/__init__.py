"""Secure aggregation: the server learns the sum of what clients send, and nothing of a single one.

Masks on integers as in Bonawitz et al. 2017 (CCS, eprint 2017/281), between neighbours as in Bell et al. 2020 (CCS,
eprint 2020/704). Each client adds to its numbers a mask of its own, and one with each neighbour that cancels in the
sum. Its neighbours have shares of what the masks are made from. They hand out those of its own mask if it has answered,
or those of its key if it has not, and never both.

    fixed_point.py   numbers as integers modulo 2^32, whose sums are exact
    shamir.py        secrets in shares, of which some number is enough
    primitives.py    key agreement, key derivation, streams and encryption, all of them from `cryptography`
    participant.py   what a client does
    recovery.py      what the server does with the sum and the shares

Begin with participant.py.
"""
