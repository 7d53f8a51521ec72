"""The names of metrics."""

from __future__ import annotations

METRICS = frozenset(
    {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/seconds",
        "losses/policy_loss",
        "losses/value_loss",
        "losses/entropy",
        "losses/approx_kl",
        "losses/clipfrac",
        "losses/explained_variance",
        "losses/kl",
    }
)
"""What a client may tell of itself."""
