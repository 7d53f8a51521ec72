"""Commands that measure speed and learning; `report` writes RESULTS.md from what they have found."""
