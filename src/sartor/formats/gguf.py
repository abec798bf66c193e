"""GGUF checkpoints, versions 2 and 3, little-endian; one file or a split set.

Source of the format: ``docs/gguf.md`` of ggml. Opening maps the file and reads the header only;
long arrays of the metadata (a vocabulary of 262,144 strings) are walked once to find their end
and decoded when they are first asked for. Every count and length is compared with the bytes that
remain before anything is allocated, so a damaged header costs at most one walk over the file.

Text: keys and tensor names must be valid UTF-8. Invalid UTF-8 inside a *value* is data, not
structure; it is read with U+FFFD in its place, so that whatever prints or encodes it cannot fail.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError, SartorError, UnsupportedError, UsageError
from sartor.formats.files import (
    MappedFile,
    TensorInfo,
    UnsupportedTensorError,
    bits_per_weight,
    dense_weight,
)
from sartor.formats.gguf_blocks import GGUF_TYPES, REMOVED_TYPES, GgufType, decode_blocks
from sartor.formats.gguf_strings import Starts, find_strings, read_pairs, read_strings
from sartor.ops.weights import DenseFormat, Weight, WeightFormat
from sartor.store.local import GGUF_MAGIC, listed, split_set

MAGIC = GGUF_MAGIC
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",  # bool: one byte, 0 or 1
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4
_RECORDS = [struct.Struct(f"<{n}QIQ") for n in range(_MAX_DIMENSIONS + 1)]
"""What follows the name and the number of dimensions of a tensor: lengths, type, offset."""
_MAX_KEY = 65535  # the format's own limit
_MAX_STRING = 64 << 20  # no single metadata string is near this; a damaged length is
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class _LazyArray:
    """An array of the metadata that is known to lie inside the file, decoded on demand."""

    file: MappedFile
    at: int
    type: int
    count: int
    nbytes: int
    starts: Starts | None = None

    def load(self) -> list[str] | npt.NDArray[np.generic]:
        if self.type == _STRING:
            return read_strings(self.blob(), self.count, self.starts)
        numbers = np.frombuffer(self.blob(), _SCALARS[self.type])
        return numbers.view(np.bool_) if self.type == _BOOL else numbers

    def blob(self) -> bytes:
        return self.file.data[self.at : self.at + self.nbytes]


class GgufMetadata(Mapping[str, object]):
    """The key-value pairs: str, int, float, bool, ``list[str]`` or a one-dimensional array."""

    def __init__(self, pairs: dict[str, object]) -> None:
        self._pairs = pairs

    def __getitem__(self, key: str) -> object:
        value = self._pairs[key]
        if isinstance(value, _LazyArray):
            value = self._pairs[key] = value.load()
        return value

    def pairs(self, key: str) -> list[tuple[str, str]] | None:
        """An array of strings that are two words each, one space between; None for any other."""
        value = self._pairs.get(key)
        if not isinstance(value, _LazyArray) or value.type != _STRING:
            return None
        return read_pairs(value.blob(), value.starts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, key: object) -> bool:
        return key in self._pairs


@dataclass(frozen=True)
class GgufFile:
    """One parsed file of a checkpoint; ``header_bytes`` end where the tensor data begins."""

    file: MappedFile
    version: int
    metadata: GgufMetadata
    tensors: tuple[TensorInfo, ...]
    types: Mapping[str, GgufType]
    header_bytes: int


class _HeaderReader:
    """A cursor over the header that never passes the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0
        self.subject = "header"

    def error(self, reason: str) -> FormatError:
        return FormatError(f"{self.file.path}: {self.subject}: {reason}")

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def skip(self, nbytes: int) -> int:
        """Moves over ``nbytes`` and returns where they start."""
        if nbytes > self.left:
            raise self.error(
                f"needs {nbytes} bytes where {self.left} are left; the file is truncated or "
                "damaged, fetch it again"
            )
        start = self.at
        self.at += nbytes
        return start

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack_from(self.file.data, self.skip(layout.size))[0]
        return value

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack_from(self.file.data, self.skip(layout.size))

    def count(self, things: str, smallest: int) -> int:
        """A 64-bit count of things of at least ``smallest`` bytes each."""
        value = self.number(_U64)
        if value > self.left // smallest:
            raise self.error(
                f"announces {value} {things}, more than fit in the {self.left} bytes left; "
                "the file is truncated or damaged, fetch it again"
            )
        return value

    def text(self, limit: int) -> bytes:
        length = self.number(_U64)
        if length > limit:
            raise self.error(f"a string of {length} bytes; at most {limit} are allowed")
        start = self.skip(length)
        return self.file.data[start : start + length]

    def name(self, what: str) -> str:
        raw = self.text(_MAX_KEY)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"the {what} {raw[:40]!r} is not valid UTF-8") from error
        if not name:
            raise self.error(f"an empty {what}")
        return name

    def value(self) -> object:
        kind = self.number(_U32)
        if kind == _STRING:
            return self.text(_MAX_STRING).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array()
        return self.scalar(kind)

    def scalar(self, kind: int) -> object:
        if kind not in _SCALARS:
            raise self.error(f"unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self.file.data, dtype, 1, self.skip(dtype.itemsize))[0].item()
        if kind == _BOOL:
            if value > 1:
                raise self.error(f"a bool of value {value}; 0 and 1 are allowed")
            return bool(value)
        return value

    def array(self) -> _LazyArray:
        kind = self.number(_U32)
        starts = None
        if kind == _STRING:
            count = self.count("strings", 8)
            starts, nbytes = find_strings(self.file.view(self.at, self.left), count)
            start = self.skip(nbytes)
        elif kind in _SCALARS:
            size = np.dtype(_SCALARS[kind]).itemsize
            count = self.count("numbers", size)
            start = self.skip(count * size)
            if kind == _BOOL and np.any(self.file.view(start, count) > 1):
                raise self.error("an array of bools holds values other than 0 and 1")
        elif kind == _ARRAY:
            raise self.error("an array of arrays; no known checkpoint has one")
        else:
            raise self.error(f"an array of unknown value type {kind}")
        return _LazyArray(self.file, start, kind, count, self.at - start, starts)


@dataclass(frozen=True)
class _TensorRecord:
    """A tensor as the header lists it; ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    nbytes: int
    offset: int


def read_header(file: MappedFile) -> GgufFile:
    """Parses and checks the header of one file.

    Errors: :class:`FormatError` naming the file and the key or tensor.
    """
    reader = _HeaderReader(file)
    if file.data[:4] != MAGIC:
        raise reader.error(f"starts with {file.data[:4]!r}, not {MAGIC!r}: this is no GGUF file")
    reader.skip(4)
    version = reader.number(_U32)
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version >> 16:
            raise reader.error("a big-endian GGUF file; convert it to little-endian")
        raise reader.error(f"GGUF version {version}; versions 2 and 3 are read, convert the file")
    tensor_count = reader.count("tensors", _SMALLEST_TENSOR)
    pair_count = reader.count("key-value pairs", _SMALLEST_PAIR)
    metadata = GgufMetadata(_read_pairs(reader, pair_count))
    records = _read_records(reader, tensor_count)
    reader.subject = "key 'general.alignment'"
    alignment = _integer(metadata, "general.alignment", DEFAULT_ALIGNMENT, file.path)
    if alignment < 8 or alignment & (alignment - 1):
        raise reader.error(f"{alignment} is no power of two of at least 8")
    start = -(-reader.at // alignment) * alignment
    tensors = tuple(_place(reader, record, start, alignment) for record in records)
    _refuse_overlaps(reader, tensors)
    types = {record.name: record.type for record in records}
    return GgufFile(file, version, metadata, tensors, types, min(start, file.size))


def _read_pairs(reader: _HeaderReader, count: int) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for index in range(count):
        reader.subject = f"key {index + 1} of {count}"
        key = reader.name("key")
        reader.subject = f"key {key!r}"
        if key in pairs:
            raise reader.error("appears twice")
        pairs[key] = reader.value()
    return pairs


def _read_records(reader: _HeaderReader, count: int) -> list[_TensorRecord]:
    records: dict[str, _TensorRecord] = {}
    for index in range(count):
        reader.subject = f"tensor {index + 1} of {count}"
        name = reader.name("tensor name")
        reader.subject = f"tensor {name!r}"
        if name in records:
            raise reader.error("appears twice")
        dimensions = reader.number(_U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise reader.error(f"{dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are allowed")
        *lengths, number, offset = reader.numbers(_RECORDS[dimensions])
        shape = tuple(lengths[::-1])
        kind = _tensor_type(reader, number)
        if shape[-1] % kind.block:
            raise reader.error(
                f"rows of {shape[-1]} weights are not a multiple of {kind.name}'s block of "
                f"{kind.block}"
            )
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        if not 0 < nbytes <= reader.file.size:
            raise reader.error(
                f"shape {shape} as {kind.name} takes {nbytes} bytes; the file has "
                f"{reader.file.size}, it is truncated or damaged"
            )
        records[name] = _TensorRecord(name, shape, kind, nbytes, offset)
    return list(records.values())


def _tensor_type(reader: _HeaderReader, number: int) -> GgufType:
    if number in REMOVED_TYPES:
        raise UnsupportedTensorError(
            f"{reader.file.path}: {reader.subject}: type {REMOVED_TYPES[number]} was removed from "
            "GGUF; convert the model again"
        )
    if number not in GGUF_TYPES:
        known = ", ".join(kind.name for kind in GGUF_TYPES.values() if kind.decode or kind.dense)
        raise reader.error(f"unknown tensor type {number}; supported are {known}")
    return GGUF_TYPES[number]


def _place(
    reader: _HeaderReader, record: _TensorRecord, data_start: int, alignment: int
) -> TensorInfo:
    reader.subject = f"tensor {record.name!r}"
    if record.offset % alignment:
        raise reader.error(f"offset {record.offset} is not a multiple of {alignment}")
    offset = data_start + record.offset
    if offset + record.nbytes > reader.file.size:
        raise reader.error(
            f"bytes {offset} to {offset + record.nbytes} lie outside the file of "
            f"{reader.file.size} bytes; it is truncated or damaged, fetch it again"
        )
    stored = record.type.dense or record.type.name
    return TensorInfo(record.name, record.shape, stored, record.nbytes, offset, reader.file.path)


def _refuse_overlaps(reader: _HeaderReader, tensors: tuple[TensorInfo, ...]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            reader.subject = f"tensor {after.name!r}"
            raise reader.error(f"overlaps tensor {before.name!r}")


class GgufCheckpoint:
    """A GGUF model; for a split set, ``path`` is its first file."""

    kind: Literal["gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        """Opens ``path``, and the rest of its set when it is the first of several files.

        Errors: :class:`FormatError` (damaged), :class:`UsageError` (no such file, or not the
        first of a set), each naming the file.
        """
        first = read_header(MappedFile.open(path))
        self.path = path
        self.metadata: Mapping[str, object] = first.metadata
        # Before anything that only the first file of a set has.
        rest = _rest_of_split(first)
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise FormatError(
                f"{path}: key 'general.architecture' is missing or no string; "
                "the file is damaged or holds no model"
            )
        self.architecture = architecture
        self._files = [first, *rest]
        self._tensors: dict[str, tuple[TensorInfo, GgufFile]] = {}
        for part in self._files:
            for tensor in part.tensors:
                if tensor.name in self._tensors:
                    raise FormatError(
                        f"{part.file.path}: tensor {tensor.name!r} is also in "
                        f"{self._tensors[tensor.name][0].file}"
                    )
                self._tensors[tensor.name] = (tensor, part)
        self._check_split_total()

    def _check_split_total(self) -> None:
        held = len(self._tensors)
        total = _integer(self.metadata, "split.tensors.count", held, self.path)
        if total != held:
            raise FormatError(
                f"{self.path}: key 'split.tensors.count' says {total}, the files hold {held} "
                "tensors; fetch them again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._tensors)

    def _entry(self, name: str) -> tuple[TensorInfo, GgufFile]:
        if not self._files:
            raise SartorError(f"{self.path}: the checkpoint is closed")
        if name not in self._tensors:
            raise FormatError(f"{self.path}: no tensor {name!r}; the checkpoint is incomplete")
        return self._tensors[name]

    def info(self, name: str) -> TensorInfo:
        """Shape, type and place of a tensor."""
        return self._entry(name)[0]

    def weight(self, name: str) -> Weight:
        """The tensor in canonical form.

        Floats are views of the file. Quantised tensors are ``[..., N, K]`` as stored; a stack of
        experts is ``[E, N, K]``, a single row ``[1, K]``.
        Errors: :class:`UnsupportedTensorError` for a type without a decoder.
        """
        info, part = self._entry(name)
        part.file.forget()  # tensors that were read before
        kind = part.types[name]
        if kind.dense:
            return dense_weight(info, part.file, kind.dense)
        if kind.decode is None:
            raise UnsupportedTensorError(
                f"{info.file}: tensor {name!r}: type {kind.name} is not supported; "
                "convert the model to another type, for example Q4_K or Q8_0"
            )
        shape = info.shape if len(info.shape) > 1 else (1, *info.shape)
        return decode_blocks(name, kind, part.file.view(info.offset, info.nbytes), shape)

    def format(self, name: str) -> WeightFormat:
        """The format of :meth:`weight`, from the header alone."""
        kind = self._entry(name)[1].types[name]
        return DenseFormat(kind.dense) if kind.dense else kind.format or self.weight(name).format

    def identity(self) -> str:
        """A digest of sizes, modification times and headers."""
        if not self._files:
            raise SartorError(f"{self.path}: the checkpoint is closed")
        return self._identity

    @cached_property
    def _identity(self) -> str:
        prints = [part.file.fingerprint(part.header_bytes) for part in self._files]
        return hashlib.sha256("".join(prints).encode()).hexdigest()

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight([tensor for tensor, _ in self._tensors.values()])

    def close(self) -> None:
        """Lets go of the files; weights and metadata already handed out stay valid."""
        self._files = []
        self._tensors = {}


def _integer(metadata: Mapping[str, object], key: str, default: int, path: Path) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise FormatError(f"{path}: key {key!r} holds a {type(value).__name__}, not an integer")
    return value


def _rest_of_split(first: GgufFile) -> list[GgufFile]:
    """Files 2 to N of a set written as ``name-00001-of-0000N.gguf``; none for a single file."""
    path = first.file.path
    count = _integer(first.metadata, "split.count", 1, path)
    number = _integer(first.metadata, "split.no", 0, path)
    if count in (0, 1) and number == 0:
        return []
    files = split_set(path)
    if not files:
        raise UnsupportedError(
            f"{path}: is file {number + 1} of {count} of a split model, but is not named like "
            "name-00001-of-00002.gguf; restore the names of its files and give the first"
        )
    if number != 0:
        raise UsageError(
            f"{path}: file {number + 1} of {count} of a split model; give file 1: {files[0]}"
        )
    if count != len(files):
        raise FormatError(
            f"{path}: key 'split.count' is {count}, its name says {len(files)}; "
            "restore the names of its files"
        )
    missing = [file for file in files if not file.exists()]
    if missing:
        others = f" and {listed(file.name for file in missing[1:])}" if missing[1:] else ""
        raise FormatError(
            f"{missing[0]}{others}: missing of the {count} files of this split model; fetch them"
        )
    rest = []
    for index, sibling in enumerate(files[1:], 1):
        part = read_header(MappedFile.open(sibling))
        number = _integer(part.metadata, "split.no", 0, sibling)
        if number != index:
            raise FormatError(
                f"{sibling}: key 'split.no' is {number}, not {index}; fetch the files again"
            )
        rest.append(part)
    return rest
