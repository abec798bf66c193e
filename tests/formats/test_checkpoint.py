"""What ``open_checkpoint`` accepts, and how it refuses the rest."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats import open_checkpoint, verify


def test_a_gguf_file_under_any_name(tiny_gguf: Path) -> None:
    blob = tiny_gguf.rename(tiny_gguf.with_name("sha256-abc"))
    assert open_checkpoint(blob).kind == "gguf"


def test_a_folder_with_one_gguf(tiny_gguf: Path) -> None:
    assert open_checkpoint(tiny_gguf.parent).path == tiny_gguf


def test_a_folder_with_two_ggufs_asks_which(tiny_gguf: Path) -> None:
    shutil.copy(tiny_gguf, tiny_gguf.with_name("second.gguf"))
    with pytest.raises(UsageError, match=r"second\.gguf, tiny\.gguf"):
        open_checkpoint(tiny_gguf.parent)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    for given in (path, tmp_path):
        with pytest.raises(UsageError, match=r"pickle.*safetensors"):
            open_checkpoint(given)


def test_nothing_to_open(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "none", tmp_path / ("x" * 999)):
        with pytest.raises(UsageError) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)


def test_a_lone_safetensors_file_points_to_its_folder(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="give the folder"):
        open_checkpoint(tiny_folder / "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(SartorError, match="regular file"):
            open_checkpoint(path)


def test_verify(tiny_gguf: Path) -> None:
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    verify(tiny_gguf, digest.upper())
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-1])
    with pytest.raises(FormatError, match=rf"tiny\.gguf.*{digest}"):
        verify(tiny_gguf, digest)
