"""How much memory a process has had."""

import re
from pathlib import Path


def peak_mb() -> float:
    """The most that this process ever had resident; getrusage's number would begin with that of its parent."""
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024 / 1e6
