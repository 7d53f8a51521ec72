"""Methods side by side, with intervals.

    compare.py   runs methods with the same seeds, and resumes a comparison that was stopped
    verdicts.py  which methods differ from the baseline, and how sure that is
    page.py      the comparison as a page and as a figure

Begin with verdicts.py.
"""
