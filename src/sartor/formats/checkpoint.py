"""Opening a checkpoint, whatever its format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats.files import TensorInfo
from sartor.formats.gguf import MAGIC, GgufCheckpoint
from sartor.ops.weights import Weight, WeightFormat

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint(Protocol):
    """A model on disk: metadata, and tensors in canonical form."""

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> Literal["gguf", "safetensors"]: ...

    @property
    def architecture(self) -> str:
        """``general.architecture`` of a GGUF file, ``architectures[0]`` of a config.json."""
        ...

    @property
    def metadata(self) -> Mapping[str, object]:
        """The key-value pairs of a GGUF file, or the content of config.json."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        ...

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def weight(self, name: str) -> Weight: ...

    def format(self, name: str) -> WeightFormat:
        """How :meth:`weight` gives a tensor; reads no more of it than that takes."""
        ...

    def identity(self) -> str:
        """Changes when the files do; reads sizes, times and headers, not the weights."""
        ...

    def close(self) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a ``.gguf`` file, or a folder with config.json and safetensors, or with one GGUF.

    Reads headers only. Errors: :class:`UsageError` when ``path`` is no checkpoint,
    :class:`FormatError` when it is a damaged one, each naming file and tensor or key.
    """
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder; check the path")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: not a regular file")
    if path.suffix.lower() == ".gguf" or _first_bytes(path) == MAGIC:
        return GgufCheckpoint(path)
    if path.suffix.lower() in _PICKLES:
        raise UsageError(_pickle_message(path))
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: give the folder, which also holds config.json: {path.parent}")
    raise UsageError(f"{path}: neither a GGUF file nor a checkpoint folder")


def _open_folder(folder: Path) -> Checkpoint:
    has_config = (folder / "config.json").exists()
    has_safetensors = any(folder.glob("*.safetensors")) or any(
        folder.glob("*.safetensors.index.json")
    )
    if has_config and has_safetensors:
        # It imports every quantised layout that it reads.
        from sartor.formats.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(folder)
    # Of a split set only the first file counts; it finds the others.
    ggufs = sorted(
        file
        for file in folder.glob("*.gguf")
        if "-of-" not in file.name or "-00001-of-" in file.name
    )
    if len(ggufs) == 1:
        return GgufCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise UsageError(f"{folder}: holds {len(ggufs)} GGUF files; name one of {names}")
    if has_safetensors:
        raise UsageError(f"{folder}: has safetensors but no config.json; fetch the whole folder")
    pickles = sorted(file for file in folder.glob("*") if file.suffix.lower() in _PICKLES)
    if pickles:
        raise UsageError(_pickle_message(pickles[0]))
    raise UsageError(f"{folder}: holds no checkpoint (config.json with safetensors, or a .gguf)")


def _pickle_message(path: Path) -> str:
    return (
        f"{path}: a Python pickle, which can run any code when it is read, so it is not; "
        "use the safetensors or GGUF version of the model, or convert it"
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error


def verify(path: Path, sha256: str) -> None:
    """Hashes the whole file; a :class:`FormatError` when it is not the one that was published."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found != sha256.lower():
        raise FormatError(f"{path}: its sha256 is {found}, not {sha256.lower()}; fetch it again")
