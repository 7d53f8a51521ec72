"""Methods side by side, with intervals.

    compare.py   runs methods with the same seeds, and resumes a comparison that was stopped
    verdicts.py  which methods differ from the baseline, and how sure that is
    page.py      the comparison as a page, a LaTeX table and a figure
    profiles.py  performance profiles and probabilities of improvement as figures

Begin with verdicts.py.
"""
