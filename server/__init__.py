"""The server of a federation as a Flower app."""
