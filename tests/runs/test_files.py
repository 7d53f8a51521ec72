"""Files of a run are written completely or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fed.runs.files import append_line, write_atomic


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path):
    write_atomic(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a.json", "new \udc80")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]


def test_nothing_of_a_line_is_written_to_a_full_disk(tmp_path: Path):
    path = tmp_path / "rounds.jsonl"
    append_line(path, "12345")
    code = f"""
import resource
from pathlib import Path
from grpo_fed.runs.files import append_line, write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
for write in (append_line, write_atomic):
    try:
        write(Path({str(path)!r}), "a line that is too long")
    except OSError as error:
        assert error.filename == {str(path)!r}
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["No space left on device", "File too large"]
    assert path.read_text() == "12345\n"
    assert list(tmp_path.iterdir()) == [path]
