"""No file of the repository holds a private key or a token."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_layout import ROOT

PATTERNS = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE " + rb"KEY-----",
    "a key of Amazon's": rb"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub's": rb"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{60,}",
    "a token of Hugging Face's": rb"\bhf_[A-Za-z0-9]{34}\b",
    "a token of Slack's": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a key of Google's": rb"\bAIza[0-9A-Za-z_-]{35}\b",
}


def find_secrets(content: bytes) -> list[str]:
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, content)]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no repository of git")
def test_no_tracked_file_holds_a_secret():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    assert len(files) > 100
    found = {str(path): names for path in files if path.is_file() and (names := find_secrets(path.read_bytes()))}
    assert not found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("-----BEGIN OPENSSH PRIVATE " + "KEY-----", "a private key"),
        ("AKIA" + "A" * 16, "a key of Amazon's"),
        ("ghp_" + "a" * 36, "a token of GitHub's"),
        ("hf_" + "a" * 34, "a token of Hugging Face's"),
    ],
)
def test_a_secret_is_found(tmp_path: Path, text: str, name: str):
    assert find_secrets(f"x = '{text}'".encode()) == [name]
