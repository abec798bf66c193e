"""What the readers of quantised layouts share: stored tensors, settings, and canonical weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError, UnsupportedError
from sartor.formats.files import MappedFile, TensorInfo, UnsupportedTensorError
from sartor.formats.microscaling import e8m0
from sartor.ops.weights import F32, U8, AffineFormat, FloatName, Weight, to_float32

FLOATS: Mapping[str, FloatName] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""How scales may be stored."""
_NUMPY: Mapping[str, str] = {
    "fp32": "<f4",
    "fp16": "<f2",
    "bf16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "<i1",
    "U8": "<u1",
    "F8_E4M3": "<u1",
    "F8_E8M0": "<u1",
}


@dataclass(frozen=True)
class Quantized:
    """One weight of the model that a checkpoint stores in several ``parts``."""

    info: TensorInfo
    parts: tuple[str, ...]
    read: Callable[[], Weight]


class Tensors:
    """The tensors of a checkpoint as they are stored, by name."""

    def __init__(self, infos: Mapping[str, TensorInfo], files: Mapping[Path, MappedFile]) -> None:
        self._infos = infos
        self._files = files

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def stored(self, name: str) -> str:
        """How a tensor is stored; empty where there is none."""
        return self._infos[name].stored if name in self._infos else ""

    def info(self, name: str, beside: str) -> TensorInfo:
        """A tensor that must be there because ``beside`` is."""
        if name not in self._infos:
            raise FormatError(
                f"{self._infos[beside].file}: tensor {name!r} is missing beside {beside!r}; "
                "the checkpoint is incomplete, fetch it again"
            )
        return self._infos[name]

    def codes(self, name: str, stored: Iterable[str], ranks: Sequence[int]) -> TensorInfo:
        """The tensor that holds a module's codes: one of these dtypes and ranks, not empty."""
        info = self._infos[name]
        self._check_dtype(info, stored)
        if len(info.shape) not in ranks or 0 in info.shape:
            raise FormatError(
                f"{info.file}: tensor {name!r}: shape {list(info.shape)}; "
                f"{' or '.join(map(str, ranks))} axes, none of them empty, are needed"
            )
        return info

    def length(self, name: str, beside: str, axis: int = 0) -> int:
        """The length of one axis of a tensor that must be there; 0 for a single number."""
        shape = self.info(name, beside).shape
        return shape[axis] if shape else 0

    def expect(
        self, name: str, beside: str, stored: Iterable[str], *shapes: tuple[int, ...]
    ) -> TensorInfo:
        """A tensor beside a module's codes, checked for dtype and for one of these shapes."""
        info = self.info(name, beside)
        self._check_dtype(info, stored)
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise FormatError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}, {wanted} is needed "
                f"beside {beside!r} of shape {list(self._infos[beside].shape)}"
            )
        return info

    def _check_dtype(self, info: TensorInfo, stored: Iterable[str]) -> None:
        if info.stored not in stored:
            raise UnsupportedTensorError(
                f"{info.file}: tensor {info.name!r}: dtype {info.stored}; this layout needs "
                f"{' or '.join(stored)}"
            )

    def expect_scale(
        self,
        name: str,
        beside: str,
        stored: Iterable[str],
        shape: tuple[int, ...],
        choices: Sequence[Tiles],
    ) -> Tiles:
        """The first tiles of ``choices`` by which ``name`` can scale weights of ``shape``."""
        forms = {tiles: tiles.shapes(shape) for tiles in choices}
        every = dict.fromkeys(form for found in forms.values() for form in found)
        info = self.expect(name, beside, stored, *every)
        return next(tiles for tiles, found in forms.items() if info.shape in found)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The stored numbers, a view of the file; bf16 and 8-bit floats as bits."""
        info = self._infos[name]
        raw = self._files[info.file].view(info.offset, info.nbytes)
        return np.require(raw.view(_NUMPY[info.stored]), requirements="A").reshape(info.shape)

    def floats(self, name: str) -> F32:
        """Stored scales, widened exactly."""
        stored, data = self._infos[name].stored, self.array(name)
        return e8m0(data) if stored == "F8_E8M0" else to_float32(data, FLOATS[stored])

    def logical(
        self, name: str, shape: tuple[int, ...], layout: str, parts: Sequence[str]
    ) -> TensorInfo:
        """The description of the weight that ``parts`` hold; it lies where the first one does."""
        infos = [self._infos[part] for part in parts]
        nbytes = sum(info.nbytes for info in infos)
        return TensorInfo(name, shape, layout, nbytes, infos[0].offset, infos[0].file)


@dataclass(frozen=True)
class Settings:
    """A ``quantization_config``, or an object inside it; a null and an absent key are the same."""

    values: Mapping[str, object]
    where: str

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"{self.where}: {key} is {value!r}, which is of the wrong type")
        return value

    def integer(self, key: str, default: int) -> int:
        value: int = self._typed(key, int, default)
        return value

    def text(self, key: str, default: str = "") -> str:
        value: str = self._typed(key, str, default)
        return value

    def table(self, key: str) -> Settings:
        """A nested object; empty where absent."""
        return Settings(self._typed(key, dict, {}), f"{self.where}: {key}")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of numbers above zero; empty where absent."""
        values = self._typed(key, list, [])
        if not all(type(value) is int and value > 0 for value in values):
            raise FormatError(f"{self.where}: {key} is {values!r}, not a list of lengths")
        return tuple(values)

    def require(self, key: str, *implemented: object) -> None:
        """Refuses a value, where there is one, that is none of those implemented."""
        value = self.values.get(key)
        # 1 == True: types are compared, too.
        known = any(value == one and type(value) is type(one) for one in implemented)
        if value is not None and not known:
            raise self.refusal(f"{key} = {value!r}")

    def refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.where}: {what} is not implemented; use the original checkpoint, another "
            "quantised one (GPTQ, AWQ, compressed-tensors, FP8, MXFP4), or a GGUF file"
        )


def group_of(info: TensorInfo, name: str, columns: int, groups: int) -> int:
    """Weights a group; groups must divide a row and be multiples of 16, as canonical ones are."""
    if not groups or columns % groups or columns // groups % 16:
        raise UnsupportedTensorError(
            f"{info.file}: tensor {name!r}: rows of {columns} weights in {groups} groups; equal "
            "groups of a multiple of 16 weights are supported; use a GGUF file"
        )
    return columns // groups


@dataclass(frozen=True)
class Tiles:
    """Weights ``[..., N, K]`` that share a scale by tiles of ``rows`` x ``columns``."""

    rows: int
    columns: int

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes that the scales of such weights may have; single axes are often left out."""
        *leading, rows, columns = shape
        down, across = -(-rows // self.rows), -(-columns // self.columns)
        found = [(*leading, down, across)]
        if across == 1:
            found.append((*leading, down))
        if down == across == 1 and not leading:
            found += [(1,), ()]
        return found

    def groups(self, columns: int) -> int:
        """Equal groups in a row; more than tiles where the last tile of a row is cut."""
        return columns // math.gcd(columns, min(self.columns, columns))

    def spread(self, scale: F32, shape: tuple[int, ...]) -> F32:
        """``[..., N, groups]`` from scales of one of the shapes above."""
        *leading, rows, columns = shape
        down, groups = -(-rows // self.rows), self.groups(columns)
        tiled = scale.reshape(*leading, down, -1)
        first = np.arange(groups) * (columns // groups) // min(self.columns, columns)
        row = np.arange(rows) // min(self.rows, rows)
        out: F32 = tiled[..., row[:, None], first[None, :]]
        return out


def unpack_bits(words: npt.NDArray[np.int32 | np.uint32 | np.uint8], bits: int) -> U8:
    """Codes ``[..., n]`` from whole words or bytes that hold them lowest bits first.

    Codes of 3, 5, 6 and 7 bits cross from a word into the next. The others divide a byte:
    spreading the bits of each byte over as many bytes as it has codes, by shift and mask, is one
    pass of whole-array arithmetic instead of one strided pass a code.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    if 8 % bits:
        single = np.unpackbits(stream, axis=-1, bitorder="little")
        whole = single.shape[-1] // bits * bits
        single = single[..., :whole].reshape(*stream.shape[:-1], -1, bits)
        codes = np.zeros(single.shape[:-1], np.uint8)
        for bit in range(bits):
            codes |= single[..., bit] << np.uint8(bit)
        return codes
    if bits == 4:
        wide = stream.astype(np.uint16)
        wide |= wide << np.uint16(4)
        wide &= np.uint16(0x0F0F)
        return wide.view(np.uint8)
    assert bits == 2
    quads = stream.astype(np.uint32)
    quads |= quads << np.uint32(12)
    quads &= np.uint32(0x000F000F)
    quads |= quads << np.uint32(6)
    quads &= np.uint32(0x03030303)
    return quads.view(np.uint8)


def unpack_whole(words: npt.NDArray[np.int32], bits: int) -> U8:
    """Codes ``[..., n]`` from words each of which holds as many whole codes as it can."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts
    codes &= np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def affine(
    name: str,
    bits: int,
    codes: U8,
    scale: F32,
    zeros: npt.NDArray[np.integer[Any]],
    permutation: npt.NDArray[np.int32] | None = None,
) -> Weight:
    """``scale * (code - zero)`` with zero points by group ``[N, K / group]``.

    One zero point for all becomes the format's own; others become offsets, ``-scale * zero``:
    exact for scales of 16 bits.
    """
    group = codes.shape[-1] // scale.shape[-1]
    first = int(zeros.flat[0])
    if 0 <= first < 2**bits and bool(np.all(zeros == first)):
        layout = AffineFormat(bits, group, first)
        return Weight(name, layout, codes, scale, permutation=permutation)
    with np.errstate(all="ignore"):  # infinite and NaN scales are data
        offset = -scale * zeros.astype(np.float32)
    return Weight(name, AffineFormat(bits, group, offset=True), codes, scale, offset, permutation)


def order_of_groups(
    info: TensorInfo, name: str, owner: npt.NDArray[Any], groups: int
) -> npt.NDArray[np.int32] | None:
    """The permutation that gathers each group's columns (act-order); None where they already lie
    together. ``owner`` ``[K]`` is the group of each column.

    Errors: :class:`FormatError` where groups differ in length or number.
    """
    columns = len(owner)
    if np.array_equal(owner, np.arange(columns) // (columns // groups)):
        return None
    in_range = owner.min() >= 0 and owner.max() < groups
    if not in_range or np.any(np.bincount(owner, minlength=groups) != columns // groups):
        raise FormatError(
            f"{info.file}: tensor {name!r}: does not divide {columns} columns into {groups} equal "
            "groups; the file is damaged, fetch it again"
        )
    return np.argsort(owner, kind="stable").astype(np.int32)
