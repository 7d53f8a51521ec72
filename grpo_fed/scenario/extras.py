"""Tells how to install the packages that only some users need, the extras of pyproject.toml.

They are named one by one, as no package index has `grpo-fed` itself: it is installed from a checkout or a wheel.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "grpo-fed"


def write_install_command(extra: str) -> str:
    """Write the command that installs an extra's packages, in the versions that this version of ours was tried with.

    Without metadata, in a source tree that was not installed, it says where the packages are named.
    """
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        requirements = []
    packages = [
        package.strip()
        for package, _, marker in (each.partition(";") for each in requirements)
        if re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker)
    ]
    if not packages:
        return f'install the packages of the extra "{extra}" in pyproject.toml'
    return "pip install " + " ".join(f"'{package}'" for package in packages)
