"""What `make audit` makes of the answers of pip-audit."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.test_layout import ROOT

CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
WEAK = {"name": "pillow", "version": "11.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["11.1", "12.0"]}]}
SKIPPED = {"name": "numpy", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("entries", "last", "has_weakness"),
    [
        ([CLEAN], "1 audited, 0 known weaknesses", False),
        ([CLEAN, WEAK], "2 audited, 1 known weaknesses", True),
        ([CLEAN, SKIPPED], "1 audited, 0 known weaknesses; 1 NOT AUDITED", False),
        ([SKIPPED], "NOT AUDITED, the index here has no advisories: not found", False),
        ("no route", "NOT AUDITED, the advisories cannot be reached: no route", False),
    ],
)
def test_only_a_known_weakness_fails_an_audit(entries: Any, last: str, has_weakness: bool):
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    lines, found = audit.judge(entries)
    assert (lines[-1], found) == (last, has_weakness)
    assert not has_weakness or lines[0] == "pillow 11.0: PYSEC-1, mended in 11.1, 12.0"
