"""The packed weights of a program: made in memory at first use, mapped from a file afterwards."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sartor.backends.base import Located, WeightSource
from sartor.backends.cpu.packing import LAYOUT_VERSION, PackedMatrix, pack_matrix
from sartor.backends.loading import iterate_weights
from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats.packed import (
    SUFFIX,
    AnyArray,
    PackedFile,
    PackedWriter,
    collect_garbage,
)
from sartor.graph import Program
from sartor.graph.program import WeightSpec

CACHE_QUOTA_BYTES = 64 << 30
"""Packed files beyond this total are collected, the least recently used first."""

_LOG = logging.getLogger(__name__)
_ARRAYS: dict[str, type] = {
    "codes": np.uint8,
    "scales": np.uint16,
    "offsets": np.uint16,
    "permutation": np.int32,
}
_MATRIX_OPERATORS = ("embedding", "linear", "linear_group", "grouped_linear", "head_linear")
Vector = npt.NDArray[np.float32]


class _MatrixFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A matrix in the file's header: the fields of a PackedMatrix that are no arrays."""

    storage: str
    n: int
    k: int
    k_padded: int
    bits: int
    group: int
    zero: int
    scale_multiplier: float
    offset_multiplier: float
    table: tuple[int, ...]
    experts: int


class CpuWeights:
    """Matrices as the kernels stream them, and vectors (norms, biases, sinks) in float32."""

    def __init__(
        self,
        matrices: Mapping[str, PackedMatrix],
        vectors: Mapping[str, Vector],
        parameters: int,
    ) -> None:
        self.matrices = matrices
        self.vectors = vectors
        self._parameters = parameters

    @cached_property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.matrices.values()) + sum(
            v.nbytes for v in self.vectors.values()
        )

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self._parameters


def matrix_names(program: Program) -> frozenset[str]:
    """Weights that are multiplied or looked up by row; the rest are vectors."""
    used = {v for node in program.nodes if node.op in _MATRIX_OPERATORS for v in node.inputs[1:]}
    biases = {
        value
        for node in program.nodes
        for value in node.inputs[3 if node.op == "grouped_linear" else 2 :]
        if node.op in ("linear", "grouped_linear")
    }
    return frozenset(
        spec.name for spec in program.weights if len(spec.shape) > 1 and spec.value in used - biases
    )


def pack(pool: Any, program: Program, source: WeightSource, cache: Path | None) -> CpuWeights:
    """The weights from their packed file, or packed now and written to it in the background."""
    parameters = program.size
    if cache is None:
        return _pack_now(pool, program, source, parameters)
    path = cache / packed_name(program, source)
    if path.exists():
        try:
            return _from_file(PackedFile.open(path), program)
        except (FormatError, UsageError) as error:  # damaged, or collected this moment
            _LOG.warning("%s; packing again", error)
    weights = _pack_now(pool, program, source, parameters)
    # Not a daemon: a short command ends when the file is whole, and never loses it.
    args = (path, weights, origin_of(source))
    threading.Thread(target=_write, args=args, name="sartor-packed-file").start()
    return weights


def origin_of(source: WeightSource) -> dict[str, object]:
    """What a packed file says of where its weights came from."""
    place = {"path": str(source.path.absolute())} if isinstance(source, Located) else {}
    return {"identity": source.identity(), **place}


def packed_name(program: Program, source: WeightSource) -> str:
    """The name of the packed file for a program with these weights."""
    digest = hashlib.sha256()
    digest.update(f"cpu layout {LAYOUT_VERSION}\n{source.identity()}\n".encode())
    digest.update("\n".join(sorted(matrix_names(program))).encode())
    for spec in program.weights:
        digest.update(f"{spec.name} {spec.shape}\n".encode())
    return f"{digest.hexdigest()[:40]}{SUFFIX}"


def _pack_now(pool: Any, program: Program, source: WeightSource, parameters: int) -> CpuWeights:
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, Vector] = {}
    names = matrix_names(program)
    for name, weight in iterate_weights(program, source):
        if name in names:
            matrices[name] = pack_matrix(pool, weight)
        else:
            vectors[name] = np.ascontiguousarray(weight.dequantize(), np.float32).reshape(-1)
    return CpuWeights(matrices, vectors, parameters)


def _write(path: Path, weights: CpuWeights, origin: dict[str, object]) -> None:
    meta: dict[str, object] = {
        "layout": LAYOUT_VERSION,
        "source": origin,
        "matrices": {
            name: {f: getattr(m, f) for f in _MatrixFields.__struct_fields__}
            for name, m in weights.matrices.items()
        },
        "vectors": list(weights.vectors),
    }
    try:
        with PackedWriter(path, meta) as writer:
            for name, matrix in weights.matrices.items():
                for field in _ARRAYS:
                    array = getattr(matrix, field)
                    if array is not None:
                        writer.add(f"{name}#{field}", array)
            for name, vector in weights.vectors.items():
                writer.add(f"{name}#vector", vector)
            writer.finish()
        collect_garbage(path.parent, CACHE_QUOTA_BYTES, keep=(path,))
    except SartorError as error:
        # The model runs from memory; only the next start is slower.
        _LOG.warning("no packed file is kept: %s", error)


def _from_file(file: PackedFile, program: Program) -> CpuWeights:
    """What the file holds, if that is exactly what the program reads; FormatError otherwise.

    A header may be consistent in itself and still belong to other weights: what the kernels are
    given is held to the program, here by name and shape and again where they take it.
    """
    entries = file.meta.get("matrices")
    vectors = file.meta.get("vectors")
    if not isinstance(entries, dict) or not isinstance(vectors, list):
        raise FormatError(f"{file.path}: the packed file lists no matrices")
    names = set(file.names())
    expected = matrix_names(program)
    matrices: dict[str, PackedMatrix] = {}
    floats: dict[str, Vector] = {}
    arrays = 0
    for spec in program.weights:
        if (spec.name in expected) != (spec.name in entries):
            raise FormatError(f"{file.path}: it does not hold the weight {spec.name} as a matrix")
        if spec.name not in expected:
            floats[spec.name] = _vector(file, spec)
            arrays += 1
            continue
        parts = {f: file.array(f"{spec.name}#{f}") for f in _ARRAYS if f"{spec.name}#{f}" in names}
        arrays += len(parts)
        matrices[spec.name] = _matrix(file, spec, entries[spec.name], parts)
    if len(entries) != len(matrices) or len(vectors) != len(floats) or arrays != len(names):
        raise FormatError(f"{file.path}: it holds weights that the model does not have")
    return CpuWeights(matrices, floats, program.size)


def _vector(file: PackedFile, spec: WeightSpec) -> Vector:
    vector = file.array(f"{spec.name}#vector")
    if vector.dtype != np.float32 or vector.shape != (math.prod(spec.shape),):
        raise FormatError(
            f"{file.path}: {spec.name} is {vector.dtype} {list(vector.shape)}, the model needs "
            f"{math.prod(spec.shape)} numbers in float32"
        )
    return vector.view(np.float32)


def _matrix(
    file: PackedFile, spec: WeightSpec, fields: object, arrays: Mapping[str, AnyArray]
) -> PackedMatrix:
    *leading, n, k = spec.shape
    try:
        given = msgspec.convert(fields, _MatrixFields)
        matrix = PackedMatrix(**{**msgspec.structs.asdict(given), **arrays})
        for field, dtype in _ARRAYS.items():
            array = getattr(matrix, field)
            if array is not None and (array.dtype != dtype or array.ndim != 1):
                raise ValueError(f"{field} is {array.dtype} {list(array.shape)}")
        if (matrix.experts, matrix.n, matrix.k) != (math.prod(leading), n, k):
            found = [matrix.experts, matrix.n, matrix.k]
            raise ValueError(f"it is {found}, the model needs {list(spec.shape)}")
        matrix.native()  # the native code looks at lengths, groups and bits
    except (TypeError, ValueError, OverflowError, msgspec.ValidationError) as error:
        reason = str(error).partition("\n")[0]  # nanobind lists what would have been possible
        raise FormatError(f"{file.path}: matrix {spec.name}: {reason}") from None
    return matrix
