"""AWQ checkpoints (arXiv:2306.00978) in AutoAWQ's ``gemm`` version.

Source: ``awq/modules/linear/gemm.py`` and ``awq/utils/packing_utils.py`` of AutoAWQ. A module
stores

    qweight  int32 [K, N / 8]   eight outputs a word
    qzeros   int32 [G, N / 8]   likewise
    scales   float [G, N]

and means ``scales[g, n] * (code[k, n] - zero[g, n])`` with ``g = k // (K / G)``. Nibble i of a
word, lowest first, is output ``(0, 2, 4, 6, 1, 3, 5, 7)[i]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError
from sartor.formats.quantized.base import (
    FLOATS,
    Quantized,
    Settings,
    Tensors,
    affine,
    group_of,
)
from sartor.ops.weights import U8, Weight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find(settings: Settings, tensors: Tensors) -> Iterator[Quantized]:
    """Every module of the checkpoint that has a ``qweight``."""
    for key in ("version", "format"):
        if settings.text(key).lower() not in ("", "gemm"):
            raise settings.refusal(f"{key} = {settings.text(key)!r} of AWQ")
    settings.require("bits", 4)
    for name in tensors:
        if name.endswith(".qweight"):
            yield _module(settings, tensors, name.removesuffix(".qweight"))


def _module(settings: Settings, tensors: Tensors, module: str) -> Quantized:
    qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    stored = tensors.codes(qweight, ["I32"], [2])
    if qzeros not in tensors:
        settings.require("zero_point", True)
    columns, words = stored.shape
    rows = 8 * words
    groups = tensors.length(scales, qweight)
    group = group_of(stored, qweight, columns, groups)
    stated = settings.integer("group_size", group)
    if stated not in (group, -1) or (stated == -1 and groups != 1):
        raise FormatError(
            f"{stored.file}: tensor {qweight!r} has groups of {group}, {settings.where} says "
            f"{stated}; the checkpoint does not match its configuration"
        )
    tensors.expect(qzeros, qweight, ["I32"], (groups, words))
    tensors.expect(scales, qweight, FLOATS, (groups, rows))
    parts = (qweight, qzeros, scales)
    logical = tensors.logical(f"{module}.weight", (rows, columns), "awq", parts)

    def read() -> Weight:
        codes = _unpack(tensors.array(qweight))
        scale = np.ascontiguousarray(tensors.floats(scales).T)
        return affine(logical.name, 4, codes, scale, _unpack(tensors.array(qzeros)))

    return Quantized(logical, parts, read)


def _unpack(words: npt.NDArray[Any]) -> U8:
    """Codes ``[8 W, K]`` from words ``[K, W]``; a nibble is a whole run of inputs at a time."""
    lines = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((len(lines), 8, lines.shape[1]), np.uint8)
    for nibble, output in enumerate(_ORDER):
        codes[:, output] = (lines >> np.uint32(4 * nibble)) & np.uint32(15)
    return codes.reshape(-1, lines.shape[1])
