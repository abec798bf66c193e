"""A keys file that somebody else could change, or that changes in ways that are easily missed."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sartor.serving.keys import ApiKey, KeyFile, add_key, read_keys, revoke_key

posix = pytest.mark.skipif(sys.platform == "win32", reason="no such modes and links")


def entry(name: str, **fields: Any) -> Any:
    return lambda sha256: ApiKey(name=name, sha256=sha256, **fields)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@posix
@pytest.mark.parametrize(
    ("mode", "warned"), [(0o700, 0), (0o755, 0), (0o775, 1), (0o777, 1), (0o1777, 0)]
)
def test_a_folder_that_others_may_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    add_key(folder / "keys.toml", entry("alice"))
    folder.chmod(mode)
    KeyFile(folder / "keys.toml")
    assert len(warnings(caplog)) == warned
    for text in warnings(caplog):
        assert str(folder) in text
        assert "chmod go-w" in text


@posix
@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o644, 0), (0o620, 1), (0o602, 1)])
def test_a_file_that_a_group_or_all_may_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, entry("alice"))
    path.chmod(mode)
    KeyFile(path)
    assert len(warnings(caplog)) == warned


@posix
def test_a_link_to_another_file_counts_at_once(tmp_path: Path) -> None:
    one, two, link = tmp_path / "one.toml", tmp_path / "two.toml", tmp_path / "keys.toml"
    alice, bob = add_key(one, entry("alice")), add_key(two, entry("bob"))
    for path in (one, two):  # of one size and time
        os.utime(path, ns=(0, 0))
    link.symlink_to(one)
    keys = KeyFile(link)
    assert keys.find(alice) is not None
    (tmp_path / "new").symlink_to(two)
    os.replace(tmp_path / "new", link)
    assert keys.find(alice) is None
    assert keys.find(bob) is not None


@posix
def test_a_folder_behind_the_path_that_changes(tmp_path: Path) -> None:
    """As a mounted secret of Kubernetes does: a link to a folder is replaced."""
    tokens = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tokens.append(add_key(tmp_path / name / "keys.toml", entry(name)))
    (tmp_path / "now").symlink_to(tmp_path / "one")
    keys = KeyFile(tmp_path / "now" / "keys.toml")
    assert keys.find(tokens[0]) is not None
    (tmp_path / "next").symlink_to(tmp_path / "two")
    os.replace(tmp_path / "next", tmp_path / "now")
    assert keys.find(tokens[0]) is None
    assert keys.find(tokens[1]) is not None


@posix
def test_the_command_keeps_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    add_key(real, entry("alice"))
    link.symlink_to(real)
    keys = KeyFile(real)
    bob = add_key(link, entry("bob"))
    assert link.is_symlink()
    assert keys.find(bob) is not None
    revoke_key(link, "bob")
    assert link.is_symlink()
    assert keys.find(bob) is None
    assert [key.name for key in read_keys(real)] == ["alice"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


def test_equal_size_and_times_one_after_the_other(tmp_path: Path) -> None:
    """Two edits within what a clock tells apart: the second one counts too."""
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice"))
    keys = KeyFile(path)
    text = path.read_text(encoding="utf-8")
    old = hashlib.sha256(token.encode()).hexdigest()
    for _ in range(20):
        path.write_text(text.replace(old, "0" * 64), encoding="utf-8")
        os.utime(path, ns=(1, 1))
        assert keys.find(token) is None
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(1, 1))
        assert keys.find(token) is not None


def test_a_file_that_goes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice"))
    keys = KeyFile(path)
    path.rename(tmp_path / "away")
    for _ in range(3):
        assert keys.find(token) is not None  # a moment without a file locks nobody out
    assert len(warnings(caplog)) == 1
    other = add_key(path, entry("bob"))
    assert keys.find(token) is None
    assert keys.find(other) is not None


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """Written in pieces, as an editor does over a slow link: no piece alone counts."""
    path = tmp_path / "keys.toml"
    token = add_key(path, entry("alice", requests_per_minute=5, models=("m",)))
    keys = KeyFile(path)
    whole = path.read_bytes()
    end = time.monotonic() + 5
    for cut in range(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        found = keys.find(token)
        assert found is not None
        assert (found.requests_per_minute, found.models) == (5, ("m",))
    path.write_bytes(whole)
    assert keys.find(token) is not None
    assert time.monotonic() < end
