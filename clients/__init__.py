"""The clients of a federation as a Flower app."""
