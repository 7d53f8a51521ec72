"""How this program was called, so that the commands in its messages can be copied and work."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "grpo-fed"


def called_as(anywhere: bool = False) -> str:
    """Write the program as a shell in this folder finds it: `grpo-fed`, `.venv/bin/grpo-fed`, or `python -m grpo_fed`.

    A virtual environment whose `bin` is not on the PATH has `grpo-fed` where no shell looks for it. A program that uses
    the library has no command, and is answered `grpo-fed`. anywhere: as a shell in any other folder finds it too.
    """
    program = Path(sys.argv[0])
    if program.name == "__main__.py" and program.parent.name == "grpo_fed":
        python = shutil.which("python")
        is_python = python is not None and Path(python).absolute() == Path(sys.executable).absolute()
        return shlex.join(["python" if is_python else sys.executable, "-m", "grpo_fed"])
    found = shutil.which(NAME)
    if program.name != NAME or not program.is_file() or (found is not None and program.samefile(found)):
        return NAME
    return shlex.quote(str(program.absolute() if anywhere else program))
