"""Opening a checkpoint, whatever its format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from sartor.errors import FormatError, SartorError
from sartor.formats.files import TensorInfo
from sartor.formats.gguf import GgufCheckpoint
from sartor.ops.weights import Weight, WeightFormat
from sartor.store.local import find_weights


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
    """Opens what ``sartor.store.local.find_weights`` finds at ``path``: a GGUF file, or a folder
    with config.json and safetensors, or with one GGUF model.

    Reads headers only. Errors: :class:`UsageError` when ``path`` is no checkpoint,
    :class:`FormatError` when it is a damaged one, each naming file and tensor or key.
    """
    found = find_weights(path)
    if found.kind == "gguf":
        return GgufCheckpoint(found.path)
    # It imports every quantised layout that it reads.
    from sartor.formats.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(found.path)


def verify(path: Path, sha256: str) -> None:
    """Hashes the whole file; a :class:`FormatError` when it is not the one that was published."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found != sha256.lower():
        raise FormatError(f"{path}: its sha256 is {found}, not {sha256.lower()}; fetch it again")
