"""Files of a run are written completely or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fed.runs.files import append_line, link_or_copy, write_atomic


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


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("is_link", [True, False])
def test_a_link_to_a_file_never_replaces_another(
    tmp_path: Path, has_links: bool, is_link: bool, monkeypatch: pytest.MonkeyPatch
):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    if is_link:
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.write_text("old")
    if not has_links:

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr("os.link", refuse)
    with pytest.raises(FileExistsError):
        link_or_copy(source, target)
    assert is_link or target.read_text() == "old"
    assert not (tmp_path / "nowhere").exists()


def test_a_line_is_not_appended_through_a_link(tmp_path: Path):
    (tmp_path / "mine").write_text("old\n")
    (tmp_path / "rounds.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"rounds\.jsonl"):
        append_line(tmp_path / "rounds.jsonl", "new")
    assert (tmp_path / "mine").read_text() == "old\n"
