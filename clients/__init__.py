"""The federation's clients as a Flower app."""
