"""GPTQ checkpoints (arXiv:2210.17323) as AutoGPTQ and GPTQModel write them.

Source: ``modeling/_utils.py`` and ``qlinear_cuda_old.py`` of AutoGPTQ, ``nn_modules/qlinear`` and
``utils/model.py`` of GPTQModel. A module stores

    qweight  int32 [K * bits / 32, N]   codes packed along K, lowest bits first
    qzeros   int32 [G, N * bits / 32]   zero points packed along N; ``gptq`` stores them minus one
    scales   float [G, N]
    g_idx    int32 [K]                  the group of each input (act-order); may be absent

and means ``scales[g, n] * (code[k, n] - zero[g, n])`` with g the group of k. Width and group size
are read from the shapes, because a ``dynamic`` table may change them from module to module.

"Minus one" is one subtraction from the whole word: a zero point of 0 borrows from the next. With 3
bits AutoGPTQ subtracts from each zero point, while GPTQModel subtracts a pattern that does not meet
them; that variant is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError
from sartor.formats.files import TensorInfo, UnsupportedTensorError
from sartor.formats.quantized.base import (
    FLOATS,
    Quantized,
    Settings,
    Tensors,
    affine,
    group_of,
    order_of_groups,
    unpack_bits,
)
from sartor.ops.weights import U8, Weight

_BITS = (2, 3, 4, 8)


def find(settings: Settings, tensors: Tensors) -> Iterator[Quantized]:
    """Every module of the checkpoint that has a ``qweight``."""
    key = "checkpoint_format" if settings.text("checkpoint_format") else "format"
    settings.require(key, "gptq", "gptq_v2")
    minus_one = settings.text(key, "gptq") == "gptq"
    bits = settings.integer("bits", 4)
    if bits not in _BITS and not settings.table("dynamic").values:
        raise settings.refusal(f"bits = {bits}")
    for name in tensors:
        if name.endswith(".qweight"):
            yield _module(settings, tensors, name.removesuffix(".qweight"), minus_one)


def _module(settings: Settings, tensors: Tensors, module: str, minus_one: bool) -> Quantized:
    qweight, qzeros = f"{module}.qweight", f"{module}.qzeros"
    scales, g_idx = f"{module}.scales", f"{module}.g_idx"
    stored = tensors.codes(qweight, ["I32"], [2])
    words, rows = stored.shape
    groups = tensors.length(scales, qweight)
    tensors.expect(scales, qweight, FLOATS, (groups, rows))
    zero_words = tensors.length(qzeros, qweight, axis=-1)
    tensors.expect(qzeros, qweight, ["I32"], (groups, zero_words))
    bits = _width(stored, rows, zero_words)
    columns = 32 * words // bits
    if 32 * words % bits:
        raise FormatError(
            f"{stored.file}: tensor {qweight!r}: {words} words hold no whole number of "
            f"{bits}-bit codes; the file is damaged, fetch it again"
        )
    group = group_of(stored, qweight, columns, groups)
    _check_settings(settings, stored, bits, group, columns)
    quantizer = settings.table("meta").values.get("quantizer")
    if bits == 3 and minus_one and "gptqmodel" in str(quantizer):
        raise settings.refusal(f"3 bits in GPTQModel's first format (quantizer = {quantizer!r})")
    parts = [qweight, qzeros, scales]
    if g_idx in tensors:
        tensors.expect(g_idx, qweight, ["I32", "I64"], (columns,))
        parts.append(g_idx)
    logical = tensors.logical(f"{module}.weight", (rows, columns), "gptq", parts)

    def read() -> Weight:
        codes = unpack_bits(tensors.array(qweight).T, bits)
        zeros = _zero_points(tensors.array(qzeros), bits, minus_one)
        scale = np.ascontiguousarray(tensors.floats(scales).T)
        order = None
        if g_idx in tensors:
            order = order_of_groups(stored, g_idx, tensors.array(g_idx), groups)
            codes = codes if order is None else np.take(codes, order, axis=1)
        return affine(logical.name, bits, codes, scale, zeros.T, order)

    return Quantized(logical, (*parts, *_empty_bias(tensors, module)), read)


def _zero_points(words: npt.NDArray[Any], bits: int, minus_one: bool) -> U8:
    """Zero points ``[G, N]``."""
    if not minus_one:
        return unpack_bits(words, bits)
    if bits == 3:
        return (unpack_bits(words, bits) + np.uint8(1)) & np.uint8(7)
    a_one_in_each = np.uint32(0xFFFFFFFF // (2**bits - 1))
    return unpack_bits(words.view(np.uint32) + a_one_in_each, bits)


def _width(stored: TensorInfo, rows: int, zero_words: int) -> int:
    """Bits a code: what makes N zero points fill their words."""
    for bits in _BITS:
        if zero_words * 32 == rows * bits:
            return bits
    raise UnsupportedTensorError(
        f"{stored.file}: tensor {stored.name!r}: {rows} zero points in {zero_words} words; codes "
        f"of {', '.join(map(str, _BITS))} bits that fill their words are supported"
    )


def _check_settings(
    settings: Settings, stored: TensorInfo, bits: int, group: int, columns: int
) -> None:
    """Where no module has settings of its own, all must be what the configuration says."""
    if settings.table("dynamic").values:
        return
    wanted_bits = settings.integer("bits", bits)
    wanted_group = settings.integer("group_size", group)
    if wanted_group == -1:
        wanted_group = columns
    if (wanted_bits, wanted_group) != (bits, group):
        raise FormatError(
            f"{stored.file}: tensor {stored.name!r} holds {bits} bits in groups of {group}, "
            f"{settings.where} says {wanted_bits} in groups of {wanted_group}"
        )


def _empty_bias(tensors: Tensors, module: str) -> list[str]:
    """Early versions of AutoGPTQ wrote a bias of zeros for modules that have none."""
    bias = f"{module}.bias"
    if bias not in tensors:
        return []
    tensors.codes(bias, FLOATS, [1])
    return [] if np.any(tensors.array(bias)) else [bias]
