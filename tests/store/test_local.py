"""What a path holds: the store and the reader of checkpoints give one answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats import open_checkpoint
from sartor.store import ModelStore
from sartor.store.local import find_weights, split_set

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


def opened(path: Path) -> Path:
    """What both open; they must agree."""
    stored = ModelStore().resolve(str(path))
    assert stored is not None
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == stored.path
    assert stored.size_bytes > 0
    checkpoint.close()
    return stored.path


def refused(path: Path) -> str:
    """The one message of both."""
    with pytest.raises(SartorError) as by_store:
        ModelStore().resolve(str(path))
    with pytest.raises(SartorError) as by_reader:
        open_checkpoint(path)
    assert str(by_store.value) == str(by_reader.value)
    return str(by_store.value)


@pytest.mark.parametrize(
    "name", ["m.gguf", "M.GGUF", "m.Gguf", "sha256-0123", "model", "m.bin", "best-of-breed.gguf"]
)
def test_a_gguf_file_under_any_name(tmp_path: Path, tiny_bytes: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(tiny_bytes)
    assert opened(path) == path
    assert opened(tmp_path) == path  # and the folder that holds it
    assert ModelStore().resolve(f"{tmp_path}/") == ModelStore().resolve(str(path))


def test_links_keep_their_names(tmp_path: Path, tiny_bytes: bytes) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(tiny_bytes)
    link = tmp_path / "m.gguf"
    link.symlink_to("blobs/abc")
    assert opened(link) == link
    broken = tmp_path / "broken.gguf"
    broken.symlink_to("blobs/none")
    assert "link to blobs/none" in refused(broken)


def test_a_home_folder(tmp_path: Path, tiny_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(tiny_bytes)
    stored = ModelStore().resolve("~/m.gguf")
    assert stored is not None
    assert stored.path == tmp_path / "m.gguf"


@pytest.mark.parametrize("suffix", ["gguf", "GGUF"])
def test_split_models(tmp_path: Path, tiny_bytes: bytes, suffix: str) -> None:
    files = [tmp_path / f"m-0000{n}-of-00003.{suffix}" for n in (1, 2, 3)]
    for file in files:
        file.write_bytes(tiny_bytes)
    (tmp_path / "mmproj-F16.gguf").write_bytes(tiny_bytes)
    assert split_set(files[1]) == files
    for path in (tmp_path, files[0]):
        found = find_weights(path)
        assert (found.path, found.files) == (files[0], tuple(files))
        assert found.size_bytes == 3 * len(tiny_bytes)
    for number in (2, 3):
        said = refused(files[number - 1])
        assert f"file {number} of 3 of a split model; give file 1: {files[0]}" in said
    files[0].unlink()
    for path in (tmp_path, files[1]):
        with pytest.raises(FormatError):
            find_weights(path)
        assert f"{files[0]}: this first file of the split model is missing" in refused(path)


@pytest.mark.parametrize("name", ["m.gguf.part1of2", "m.gguf-split-a", "m.gguf.part-01"])
def test_pieces_are_put_together_first(tmp_path: Path, tiny_bytes: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(tiny_bytes[:1000])
    said = refused(tmp_path / name)
    assert "put the pieces together" in said
    assert "> m.gguf)" in said


def test_several_models_in_a_folder(tmp_path: Path, tiny_bytes: bytes) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(tiny_bytes)
    assert "name one of a-Q4_0.gguf, a-Q8_0-00001-of-00002.gguf" in refused(tmp_path)
    above = tmp_path / "above"
    for quant in ("Q4_0", "Q8_0"):
        (above / quant).mkdir(parents=True)
        (above / quant / "m.gguf").write_bytes(tiny_bytes)
    assert f"name one of {above / 'Q4_0'}, {above / 'Q8_0'}" in refused(above)


def test_safetensors_and_gguf(tmp_path: Path, tiny_bytes: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_bytes)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert find_weights(tmp_path).kind == "gguf"  # no config.json: no checkpoint folder
    (tmp_path / "config.json").write_text("{}")
    assert find_weights(tmp_path).kind == "safetensors"
    for name in ("model.safetensors", "config.json"):
        assert f"give the folder: {tmp_path}" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.PKL"])
def test_pickles_are_explained_at_the_gate(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path / name, tmp_path):
        said = refused(path)
        assert "pickle" in said
        assert "save_pretrained" in said


def test_adapters_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert f"--adapter NAME={tmp_path}" in refused(path)


def test_the_cache_of_hugging_face(tmp_path: Path, tiny_bytes: bytes) -> None:
    repository = tmp_path / "models--org--name"
    blob = repository / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(tiny_bytes)
    for commit in ("1111", "2222"):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "m.gguf").symlink_to("../../blobs/abc")
    assert opened(repository / "snapshots" / "1111").parent.name == "1111"
    for path in (repository, repository / "snapshots"):
        assert "has 2 snapshots" in refused(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("2222")
    for path in (repository, repository / "snapshots"):
        assert opened(path).parent.name == "2222"


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    assert "no .gguf file" in refused(tmp_path / "notes.md")
    assert "holds no checkpoint" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert "no config.json" in refused(tmp_path)
    with pytest.raises(UsageError, match="check the path"):
        find_weights(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_folder_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "holds no checkpoint" in refused(tmp_path)
