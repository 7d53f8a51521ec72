"""Methods side by side, with intervals.

    compare.py   trains methods on the same seeds
    verdicts.py  which differ, and how sure that is
    page.py      the comparison as a page

Begin with verdicts.py.
"""
