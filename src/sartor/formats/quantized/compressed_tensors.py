"""Checkpoints of compressed-tensors, as llm-compressor writes them.

Source: ``compressors/`` and ``quantization/quant_args.py`` of compressed-tensors. What a module
stores decides how it is read; each must be what one of the ``config_groups`` describes:

*pack-quantized*   ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``, codes along K from the
                   lowest bits, offset by ``2 ** (bits - 1)``; ``weight_shape`` int64 ``[2]``;
                   ``weight_zero_point`` packed likewise along N; ``weight_g_idx`` (act-order).
                   Earlier versions let no code cross from a word into the next, so that words of
                   3, 5, 6 and 7 bits have unused bits; the number of words tells
*int-quantized*    ``weight`` int8 ``[N, K]``, ``weight_zero_point`` int8 like the scales
*float-quantized*  ``weight`` float8_e4m3fn ``[N, K]``

each with ``weight_scale`` by tensor, row, group of a row, or block. ``naive-quantized`` stores the
latter two under another name.

Activations keep the precision of the plan. Dynamic rounding of them is a matter of speed and is not
repeated; static scales cut what lies outside of them, which changes results, and are refused.
So are a quantised KV cache, sparse storage and transforms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from sartor.errors import FormatError
from sartor.formats.files import TensorInfo
from sartor.formats.quantized.base import (
    FLOATS,
    Quantized,
    Settings,
    Tensors,
    Tiles,
    affine,
    group_of,
    order_of_groups,
    unpack_bits,
    unpack_whole,
)
from sartor.formats.quantized.fp8 import STORED as FP8
from sartor.formats.quantized.fp8 import fp8_weight
from sartor.ops.weights import F32, U8, Weight

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PACKED_BITS = range(2, 9)


@dataclass(frozen=True)
class _Scheme:
    """How a group of the configuration stores weights; ``block`` is rows x columns, 0 for all.

    ``settings`` is where the configuration says it.
    """

    kind: str
    bits: int
    block: tuple[int, int]
    settings: Settings

    def words(self, codes: int) -> tuple[int, int]:
        """int32 words that hold so many codes: without gaps, and with whole codes in each."""
        return -(-codes * self.bits // 32), -(-codes // (32 // self.bits))

    def tiles(self, shape: tuple[int, ...]) -> Tiles:
        return Tiles(self.block[0] or shape[-2], self.block[1] or shape[-1])


def find(settings: Settings, tensors: Tensors) -> Iterator[Quantized]:
    """Every module of the checkpoint that has a ``weight_packed`` or a ``weight_scale``."""
    settings.require("format", *_FORMATS, "mixed-precision")
    settings.table("sparsity_config").require("format", "dense")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.table(key).values:
            raise settings.refusal(key)
    groups = settings.table("config_groups")
    schemes = [_scheme(groups.table(name)) for name in groups.values]
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            yield _packed(tensors, module, schemes)
        elif part == "weight_scale" and f"{module}.weight_packed" not in tensors:
            yield _plain(tensors, module, schemes)


def _scheme(group: Settings) -> _Scheme:
    group.require("format", *_FORMATS)
    if group.table("output_activations").values:
        raise group.refusal("output_activations")
    inputs = group.table("input_activations")
    if inputs.values and inputs.values.get("dynamic") is not True:
        raise inputs.refusal("a static scale of activations (dynamic = false)")
    weights = group.table("weights")
    weights.require("type", "int", "float")
    strategy = weights.text("strategy", "tensor")
    size = weights.integer("group_size", 0)
    blocks = {"tensor": (0, 0), "channel": (1, 0), "group": (1, size)}
    if strategy == "block":
        sides = weights.integers("block_structure")
        if len(sides) != 2:
            raise FormatError(f"{weights.where}: block_structure is not two lengths")
        blocks["block"] = (sides[0], sides[1])
    if strategy not in blocks:
        raise weights.refusal(f"strategy = {strategy!r}")
    if strategy == "group" and size <= 0:
        raise FormatError(f"{weights.where}: group_size is {size}; it must be above zero")
    bits = weights.integer("num_bits", 8)
    return _Scheme(weights.text("type", "int"), bits, blocks[strategy], weights)


def _matching(
    schemes: list[_Scheme], kind: str, widths: Collection[int], stored: TensorInfo
) -> list[_Scheme]:
    """The groups that a tensor may belong to; refused where they have other widths only."""
    found = [scheme for scheme in schemes if scheme.kind == kind]
    readable = [scheme for scheme in found if scheme.bits in widths]
    if found and not readable:
        other = found[0]
        raise other.settings.refusal(f"num_bits = {other.bits} of type {kind!r}")
    found = readable
    if not found:
        raise FormatError(
            f"{stored.file}: tensor {stored.name!r} is stored as {stored.stored}, which no group "
            "of config_groups describes; the checkpoint does not match its configuration"
        )
    return found


def _packed(tensors: Tensors, module: str, schemes: list[_Scheme]) -> Quantized:
    packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
    shape_name, zero_name = f"{module}.weight_shape", f"{module}.weight_zero_point"
    g_idx = f"{module}.weight_g_idx"
    stored = tensors.codes(packed, ["I32"], [2])
    rows, words = stored.shape
    tensors.expect(shape_name, packed, ["I64", "I32"], (2,))
    shape = tuple(int(length) for length in tensors.array(shape_name))
    fitting = [
        scheme
        for scheme in _matching(schemes, "int", _PACKED_BITS, stored)
        if shape == (rows, shape[1]) and shape[1] > 0 and words in scheme.words(shape[1])
    ]
    if not fitting:
        raise FormatError(
            f"{stored.file}: tensor {packed!r} of shape {list(stored.shape)} does not hold weights "
            f"of shape {list(shape)} in the bits of any group of config_groups "
            f"({', '.join(str(scheme.bits) for scheme in schemes)})"
        )
    bits, columns = fitting[0].bits, shape[1]
    gapless = words == fitting[0].words(columns)[0]
    unpack = unpack_bits if gapless else unpack_whole
    choices = [scheme.tiles(shape) for scheme in fitting if scheme.bits == bits]
    tiles = tensors.expect_scale(scale, packed, FLOATS, shape, choices)
    groups = tiles.groups(columns)
    group_of(stored, packed, columns, groups)
    scale_shape = tensors.info(scale, packed).shape or (1,)
    zero_is_packed = tensors.stored(zero_name) == "I32"
    parts = [packed, scale, shape_name]
    if zero_name in tensors:
        down = scale_shape[0]
        if zero_is_packed:
            down = fitting[0].words(down)[not gapless]
        zero_shape = (down, *scale_shape[1:])
        tensors.expect(zero_name, packed, ["I32", "I8"], zero_shape)
        parts.append(zero_name)
    if g_idx in tensors:
        tensors.expect(g_idx, packed, ["I32", "I64"], (columns,))
        parts.append(g_idx)
    logical = tensors.logical(f"{module}.weight", (rows, columns), "pack-quantized", parts)

    def zero_points() -> F32:
        if zero_name not in tensors:
            return np.full((rows, groups), 1 << (bits - 1), np.float32)
        stored_zeros = tensors.array(zero_name)
        if zero_is_packed:
            codes = unpack(stored_zeros.reshape(len(stored_zeros), -1).T, bits)
            return tiles.spread(codes[:, : scale_shape[0]].T.astype(np.float32), shape)
        return tiles.spread(stored_zeros.astype(np.float32) + (1 << (bits - 1)), shape)

    def read() -> Weight:
        codes = unpack(tensors.array(packed), bits)[:, :columns]
        order = None
        if g_idx in tensors and np.any(tensors.array(g_idx) != -1):  # -1: never set
            order = order_of_groups(stored, g_idx, tensors.array(g_idx), groups)
            codes = codes if order is None else np.take(codes, order, axis=1)
        scales = tiles.spread(tensors.floats(scale), shape)
        zeros = zero_points().astype(np.int16)
        return affine(logical.name, bits, np.ascontiguousarray(codes), scales, zeros, order)

    return Quantized(logical, tuple(parts), read)


def _plain(tensors: Tensors, module: str, schemes: list[_Scheme]) -> Quantized:
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    tensors.info(name, scale)
    stored = tensors.codes(name, ["I8", FP8], [2])
    kind = "float" if stored.stored == FP8 else "int"
    # Narrower integers are stored in bytes as they are.
    widths = (8,) if kind == "float" else _PACKED_BITS
    choices = [scheme.tiles(stored.shape) for scheme in _matching(schemes, kind, widths, stored)]
    if kind == "float":
        return fp8_weight(tensors, stored, scale, choices, "float-quantized")
    tiles = tensors.expect_scale(scale, name, FLOATS, stored.shape, choices)
    group_of(stored, name, stored.shape[1], tiles.groups(stored.shape[1]))
    zero_name = f"{module}.weight_zero_point"
    parts = [name, scale]
    if zero_name in tensors:
        tensors.expect(zero_name, name, ["I8"], tensors.info(scale, name).shape)
        parts.append(zero_name)
    logical = tensors.logical(name, stored.shape, "int-quantized", parts)

    def read() -> Weight:
        # Flipping the sign bit adds 128, which is the zero point.
        codes: U8 = tensors.array(name).view(np.uint8) ^ np.uint8(0x80)
        scales = tiles.spread(tensors.floats(scale), stored.shape)
        zeros = np.full(scales.shape, 128, np.int16)
        if zero_name in tensors:
            stored_zeros = tensors.array(zero_name).astype(np.float32)
            zeros += tiles.spread(stored_zeros, stored.shape).astype(np.int16)
        return affine(name, 8, codes, scales, zeros)

    return Quantized(logical, tuple(parts), read)
