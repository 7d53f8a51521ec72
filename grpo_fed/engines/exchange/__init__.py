"""Messages in the SuperLink's memory, through requests that wait until there is one.

    exchange.py  Exchange: what waits for whom, without a network
    protocol.py  the requests: paths, and bodies of JSON with contents
    routes.py    ExchangeRoutes: the SuperLink's side, before Flower's own routes

The other sides are `flower/superlink_grid.py`, for a server's app, and `resident/exchange_link.py`, for a node. Begin
with exchange.py.
"""
