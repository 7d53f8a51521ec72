"""The federation's server as a Flower app."""
