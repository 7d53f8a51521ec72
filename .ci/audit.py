"""Ask for known weaknesses of the locked dependencies, and search the tree for secrets: `make audit`.

pip-audit, in an environment of its own, asks the index for advisories. Where these cannot be reached, nothing was
audited, and that is said; it is no failure. A weakness that is known is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "audit"
TOOL = "pip-audit==2.10.1"
SECONDS = 300


def main() -> int:
    """Audit, print what was found, and return the exit code."""
    secrets = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_secrets.py"], cwd=ROOT, check=False)
    print("secrets: none in tracked files" if secrets.returncode == 0 else "secrets: see above")
    lines, has_weakness = judge(ask_for_advisories())
    print("\n".join(f"dependencies: {line}" for line in lines))
    return int(has_weakness or secrets.returncode != 0)


def ask_for_advisories() -> Sequence[Mapping[str, Any]] | str:
    """Return pip-audit's entries, one for each locked dependency, or why there are none."""
    python = PLACE / "bin" / "python"
    steps = [
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(PLACE)],
        [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", TOOL],
        [str(PLACE / "bin" / "pip-audit"), "--requirement", "constraints.txt", "--no-deps", "--disable-pip"],
    ]
    steps[2] += ["--format", "json", "--progress-spinner", "off"]
    text, problem = "", ""
    for step in steps:
        try:
            done = subprocess.run(step, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        text, problem = done.stdout, (done.stderr.strip().splitlines() or ["without a word"])[-1]
        if done.returncode and step is not steps[2]:
            return f"{Path(step[0]).name}: {problem}"
    try:
        entries: Sequence[Mapping[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return problem
    return entries


def judge(entries: Sequence[Mapping[str, Any]] | str) -> tuple[list[str], bool]:
    """Say what was found, line by line, and whether any dependency has a known weakness."""
    if isinstance(entries, str):
        return [f"NOT AUDITED, the advisories cannot be reached: {entries}"], False
    audited = [entry for entry in entries if "skip_reason" not in entry]
    if not audited:
        reasons = {str(entry["skip_reason"]) for entry in entries}
        return [f"NOT AUDITED, the index here has no advisories: {min(reasons, default='nothing is locked')}"], False
    lines = [
        f"{entry['name']} {entry['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none yet'}"
        for entry in audited
        for found in entry.get("vulns", ())
    ]
    skipped = len(entries) - len(audited)
    summary = f"{len(audited)} audited, {len(lines)} known weaknesses"
    return [*lines, summary + (f"; {skipped} NOT AUDITED" if skipped else "")], bool(lines)


if __name__ == "__main__":
    sys.exit(main())
