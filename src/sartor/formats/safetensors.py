"""Checkpoints in Hugging Face folders: ``config.json`` and safetensors, whole or sharded.

Source of the format: the safetensors README (eight bytes of header length, a JSON header, then
data without holes). The header is parsed here rather than by the library because weights are
then views of the mapping in every dtype, bfloat16 included (numpy has none; it is given as bits).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Self, TypeGuard

from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats import small_files
from sartor.formats.files import (
    MappedFile,
    TensorInfo,
    UnsupportedTensorError,
    bits_per_weight,
    dense_weight,
    is_shape,
)
from sartor.formats.quantized import Quantized, Tensors, quantized_weights
from sartor.ops.weights import FloatName, Weight, WeightFormat
from sartor.store.local import WHOLE

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit
_FLOATS: Mapping[str, FloatName] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_BITS: Mapping[str, int] = {
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}


def parse_json(raw: bytes, where: str) -> dict[str, object]:
    """A JSON object without duplicate keys; anything else is a FormatError naming ``where``."""
    try:
        value = small_files.parse_json(raw, twice=False)
    except ValueError as error:
        raise FormatError(f"{where}: no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: holds a {type(value).__name__}, not an object")
    return value


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a small file."""
    try:
        return parse_json(small_files.read(path), str(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; fetch the whole folder") from error
    except OSError as error:
        raise SartorError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_header(file: MappedFile) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of one file in data order, and the length of its header in bytes.

    Errors: :class:`FormatError` naming the file and the tensor.
    """
    path = file.path
    if file.size < 8:
        raise FormatError(f"{path}: {file.size} bytes are no safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", file.data[:8])
    if length > min(_MAX_HEADER, file.size - 8):
        raise FormatError(
            f"{path}: a header of {length} bytes in a file of {file.size}; it is truncated or "
            "damaged, fetch it again"
        )
    start = 8 + length
    header = parse_json(file.data[8:start], f"{path}: header")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise FormatError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.offset}, the one before "
                f"it ends at {end}: overlap or hole"
            )
        end += tensor.nbytes
    if end != file.size:
        raise FormatError(
            f"{path}: the tensors end at byte {end}, the file at {file.size}; it is truncated or "
            "damaged, fetch it again"
        )
    return {tensor.name: tensor for tensor in tensors}, start


def _tensor(file: MappedFile, name: str, entry: object, start: int) -> TensorInfo:
    where = f"{file.path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise FormatError(f"{where}: its entry lacks dtype, shape or data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsupportedTensorError(f"{where}: unknown dtype {dtype!r}")
    if not _are_integers(shape) or not is_shape(shape):
        raise FormatError(f"{where}: its shape is not a list of lengths")
    if not _are_integers(span) or len(span) != 2:
        raise FormatError(f"{where}: its data_offsets are not two byte positions")
    bits = _BITS[dtype] * math.prod(shape)
    begin, end = span
    if bits % 8 or end - begin != bits // 8:
        raise FormatError(
            f"{where}: {dtype} of shape {tuple(shape)} takes {bits / 8:g} bytes, "
            f"its data_offsets {begin} to {end} hold {end - begin}"
        )
    if start + end > file.size:
        raise FormatError(
            f"{where}: ends at byte {start + end} of a file of {file.size}; it is truncated or "
            "damaged, fetch it again"
        )
    return TensorInfo(
        name, tuple(shape), _FLOATS.get(dtype, dtype), end - begin, start + begin, file.path
    )


def _are_integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class SafetensorsCheckpoint:
    """A folder with ``config.json`` and one ``*.safetensors``, or shards and their index."""

    kind: Literal["safetensors"] = "safetensors"

    def __init__(self, path: Path) -> None:
        """Opens the folder ``path``.

        Errors: :class:`FormatError` (damaged or incomplete), :class:`UnsupportedError`
        (a quantised layout that is not read), :class:`UsageError` (no such checkpoint), each naming
        the file.
        """
        self.path = path
        config = read_json(path / "config.json")
        self.metadata: Mapping[str, object] = MappingProxyType(config)
        self.architecture = _architecture(config, path / "config.json")
        self._shards, stored, headers = _open_shards(path)
        quantized = quantized_weights(
            config, f"{path / 'config.json'}", Tensors(stored, self._shards)
        )
        self._tensors = _logical_tensors(stored, quantized)
        self._quantized = {weight.info.name: weight for weight in quantized}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for shard, header in headers.items():
            digest.update(self._shards[shard].fingerprint(header).encode())
        self._identity = digest.hexdigest()

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
        """Tensor names, shard by shard in data order; a quantised weight is one of them."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor."""
        if not self._shards:
            raise SartorError(f"{self.path}: the checkpoint is closed")
        if name not in self._tensors:
            raise FormatError(f"{self.path}: no tensor {name!r}; the checkpoint is incomplete")
        return self._tensors[name]

    def weight(self, name: str) -> Weight:
        """The tensor as a view of the file (copied only where the file misaligns it), or decoded
        from the parts of a quantised layout.

        Errors: :class:`FormatError` for codes that contradict each other,
        :class:`UnsupportedTensorError` for a dtype other than fp32, fp16 and bf16.
        """
        info = self.info(name)
        self._shards[info.file].forget()  # tensors that were read before
        if name in self._quantized:
            return self._quantized[name].read()
        for dtype in _FLOATS.values():
            if info.stored == dtype:
                return dense_weight(info, self._shards[info.file], dtype)
        raise UnsupportedTensorError(
            f"{info.file}: tensor {name!r}: dtype {info.stored} is not supported; "
            "use a checkpoint in F32, F16 or BF16"
        )

    def format(self, name: str) -> WeightFormat:
        """The format of :meth:`weight`; a quantised layout is read for it, floats are not."""
        return self.weight(name).format

    def include(self, folder: str) -> None:
        """Makes the tensors of ``folder/model.safetensors`` tensors of the checkpoint, named
        ``folder.tensor``: parts of a model that lie in a folder of their own.

        Errors: :class:`FormatError` where the file is damaged or missing, :class:`UsageError`
        where there is a pickle instead.
        """
        path = self.path / folder / "model.safetensors"
        if not path.is_file():
            pickled = self.path / folder / "pytorch_model.bin"
            if pickled.exists():
                raise UsageError(
                    f"{pickled}: a Python pickle, which can run any code when it is read, so it is "
                    "not; save the model with safetensors"
                )
            raise FormatError(f"{path}: this file is missing; fetch the whole folder")
        self._shards[path] = MappedFile.open(path)
        tensors, header = read_header(self._shards[path])
        for name, info in tensors.items():
            self._tensors[f"{folder}.{name}"] = dataclasses.replace(info, name=f"{folder}.{name}")
        part = f"{self._identity} {folder} {self._shards[path].fingerprint(header)}"
        self._identity = hashlib.sha256(part.encode()).hexdigest()

    def identity(self) -> str:
        """A digest of the configuration and of each shard's size, time and header."""
        return self._identity

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(list(self._tensors.values()))

    def close(self) -> None:
        """Lets go of the files; weights already handed out stay valid."""
        self._shards = {}
        self._tensors = {}
        self._quantized = {}


def _architecture(config: Mapping[str, object], where: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{where}: 'architectures' names no model class")
    return names[0]


def _logical_tensors(
    stored: Mapping[str, TensorInfo], quantized: Iterable[Quantized]
) -> dict[str, TensorInfo]:
    """The stored tensors, with each quantised weight in the place of its first part."""
    parts = {part: weight.info for weight in quantized for part in weight.parts}
    infos = [parts.get(name, info) for name, info in stored.items()]
    return {info.name: info for info in infos}


def _open_shards(
    folder: Path,
) -> tuple[dict[Path, MappedFile], dict[str, TensorInfo], dict[Path, int]]:
    """Mapped shards, tensors by name, and header lengths."""
    index = folder / INDEX_NAME
    # As transformers does: an index counts only where there is no whole file. Those that stay
    # behind when shards are put together are stale, empty or cut short.
    wanted = _read_index(index) if index.exists() and not (folder / WHOLE).exists() else None
    paths = (
        sorted({folder / shard for shard in wanted.values()})
        if wanted is not None
        else [_single_file(folder)]
    )
    shards: dict[Path, MappedFile] = {}
    tensors: dict[str, TensorInfo] = {}
    headers: dict[Path, int] = {}
    for path in paths:
        if not os.path.exists(path):
            raise FormatError(f"{path}: this shard, named in {INDEX_NAME}, is missing; fetch it")
        shards[path] = MappedFile.open(path)
        found, headers[path] = read_header(shards[path])
        # The index decides: a tensor may lie in several shards, it is read from the one named.
        tensors |= {
            name: info
            for name, info in found.items()
            if wanted is None or wanted.get(name) == path.name
        }
    for name, shard in (wanted or {}).items():
        if name not in tensors:
            raise FormatError(
                f"{folder / shard}: tensor {name!r}, which {INDEX_NAME} places here, is missing"
            )
    return shards, tensors, headers


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: 'weight_map' is missing or empty")
    for name, shard in weight_map.items():
        # A shard lies beside its index: a path could reach any file of the machine.
        plain = isinstance(shard, str) and shard not in ("", ".", "..")
        if not plain or any(mark in shard for mark in "/\\:\0"):
            raise FormatError(f"{index}: tensor {name!r}: {shard!r} is no file name")
    return weight_map


def _single_file(folder: Path) -> Path:
    standard = folder / WHOLE
    if standard.exists():
        return standard
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"{folder}: holds no *.safetensors file")
    if len(found) > 1:
        raise FormatError(
            f"{folder}: {len(found)} safetensors files but no {INDEX_NAME}; fetch the index"
        )
    return found[0]
