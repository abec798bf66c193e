"""What every format stands on: a memory-mapped file and the description of a tensor in it."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from sartor.errors import FormatError, SartorError, UnsupportedError, UsageError
from sartor.ops.weights import U8, DenseFormat, FloatName, Weight


class UnsupportedTensorError(FormatError, UnsupportedError):
    """A tensor type that is not decoded: either a newer format, or a damaged type field."""


_MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 56


def is_shape(lengths: Sequence[int]) -> bool:
    """Whether a file may claim this shape.

    It bounds the arithmetic on what files claim, and numpy refuses an empty shape, too, when its
    other dimensions overflow.
    """
    if len(lengths) > _MAX_DIMENSIONS:
        return False
    if lengths and not 0 <= min(lengths) <= max(lengths) < _MAX_SIZE:
        return False
    return math.prod([length or 1 for length in lengths]) < _MAX_SIZE


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and how it is stored.

    ``shape`` is in numpy order: output rows N first, input K last. ``stored`` is ``fp32``,
    ``fp16``, ``bf16``, or the format's own name (``Q4_K``, ``I64``, ``gptq``). ``offset`` is bytes
    from the start of ``file``. A weight that is stored in several parts counts the bytes of all and
    lies where the first of them does.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    offset: int
    file: Path

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MappedFile:
    """A read-only mapping of a whole file.

    The mapping lives as long as anything refers to it: views stay valid after their checkpoint
    is closed, and it is unmapped when the last of them goes. Sizes are those at opening. A file
    that another process truncates while it is mapped raises SIGBUS on access: nothing in user
    space can prevent that, so writers must replace a checkpoint (rename), not rewrite it.
    """

    path: Path
    data: mmap.mmap
    size: int
    mtime_ns: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps ``path``; an empty, absent or unreadable file is an error that names it."""
        if os.path.exists(path) and not os.path.isfile(path):
            # Opening a pipe would wait for its writer.
            raise FormatError(f"{path}: not a regular file")
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size == 0:
                    raise FormatError(f"{path}: the file is empty; fetch it again")
                data = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file; check the path") from error
        except OSError as error:
            raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            # mmap found fewer bytes than fstat reported: the file shrank between the two calls.
            raise FormatError(f"{path}: the file changed while it was opened; try again") from error
        return cls(path, data, status.st_size, status.st_mtime_ns)

    def view(self, offset: int, nbytes: int) -> U8:
        """Bytes ``[offset, offset + nbytes)`` without a copy; read-only."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise FormatError(
                f"{self.path}: bytes {offset} to {offset + nbytes} lie outside the file of "
                f"{self.size} bytes; fetch it again"
            )
        return np.frombuffer(self.data, np.uint8, nbytes, offset)

    def forget(self) -> None:
        """Lets go of the pages that were read: views bring back what they need from the system's
        cache. Else a process that packs a model would be charged for all of its source too."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self, header_bytes: int) -> str:
        """Changes when size, time or the first ``header_bytes`` bytes do."""
        digest = hashlib.sha256(f"{self.size} {self.mtime_ns} ".encode())
        digest.update(memoryview(self.data)[:header_bytes])
        return digest.hexdigest()


def dense_weight(info: TensorInfo, file: MappedFile, dtype: FloatName) -> Weight:
    """A view of the mapping as a dense weight; copied only where the file misaligns it."""
    stored = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2"}[dtype]
    data = file.view(info.offset, info.nbytes).view(stored).reshape(info.shape)
    return Weight(info.name, DenseFormat(dtype), np.require(data, requirements="A"))


def bits_per_weight(tensors: list[TensorInfo]) -> float:
    """Stored bits over parameters; 0 for a checkpoint without tensors."""
    weights = sum(tensor.size for tensor in tensors)
    return 8 * sum(tensor.nbytes for tensor in tensors) / weights if weights else 0.0
