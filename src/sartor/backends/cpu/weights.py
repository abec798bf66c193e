"""The packed weights of a program: made in memory at first use, mapped from a file afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.backends.base import Located, WeightSource
from sartor.backends.cpu.packing import LAYOUT_VERSION, PackedMatrix, pack_matrix
from sartor.backends.loading import iterate_weights
from sartor.errors import FormatError, SartorError, UsageError
from sartor.formats.packed import SUFFIX, PackedFile, PackedWriter, collect_garbage
from sartor.graph import Program

CACHE_QUOTA_BYTES = 64 << 30
"""Packed files beyond this total are collected, the least recently used first."""

_LOG = logging.getLogger(__name__)
_FIELDS = [f.name for f in dataclasses.fields(PackedMatrix)]
_ARRAYS = ("codes", "scales", "offsets", "permutation")
_MATRIX_OPERATORS = ("embedding", "linear", "linear_group", "grouped_linear", "head_linear")
Vector = npt.NDArray[np.float32]


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
            return _from_file(PackedFile.open(path), parameters)
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
            name: {f: getattr(m, f) for f in _FIELDS if f not in _ARRAYS}
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


def _from_file(file: PackedFile, parameters: int) -> CpuWeights:
    names = set(file.names())
    entries = file.meta.get("matrices")
    vectors = file.meta.get("vectors")
    if not isinstance(entries, dict) or not isinstance(vectors, list):
        raise FormatError(f"{file.path}: the packed file lists no matrices")
    matrices = {}
    for name, fields in entries.items():
        arrays = {f: file.array(f"{name}#{f}") for f in _ARRAYS if f"{name}#{f}" in names}
        try:
            given = {**fields, **arrays}
            matrices[name] = PackedMatrix(**{**given, "table": tuple(given["table"])})
        except (TypeError, KeyError) as error:
            raise FormatError(f"{file.path}: matrix {name}: {error}") from None
    return CpuWeights(
        matrices,
        {str(name): np.asarray(file.array(f"{name}#vector"), np.float32) for name in vectors},
        parameters,
    )
