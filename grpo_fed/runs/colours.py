"""Colours that everybody can tell apart."""

INK, MUTED, GRID, PAPER = "#1f2329", "#666d77", "#d9dee4", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195")
"""Okabe and Ito's, without the black, that is our ink, and the yellow, that white paper swallows; a violet for it."""
