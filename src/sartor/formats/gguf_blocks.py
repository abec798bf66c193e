"""GGUF tensor types: block layouts and their exact mapping to the canonical weight formats.

Layouts follow ggml's ``ggml-common.h`` (``block_q4_0`` and so on). A decoder takes whole blocks,
``[n, block bytes]``, and fills codes ``[n, block weights]``, scales and offsets
``[n, block weights / group]``. Codes are unchanged. Products such as ``d * sub-scale`` (an 11-bit
significand times at most 8 bits) are exact in float32, so nothing is rounded anywhere.

Speed: numpy is slow on runs of 16 or 32 bytes, but copies one 16- or 32-byte *element* a step
fast. Fields are therefore gathered into contiguous 64-bit words (:func:`_words`), worked on
there, and scattered back as elements (:func:`_unpack`); chunks are sized to stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sartor.formats.microscaling import FP4_DOUBLED, halved_e8m0
from sartor.ops.weights import F32, U8, AffineFormat, FloatName, LookupFormat, Weight

Words = npt.NDArray[np.uint64]
Decoder = Callable[[U8, U8, F32, F32], None]

_CHUNK_CODES = 1 << 18
"""Codes decoded at a time: with its temporaries about 1 MB, the L2 cache of one core."""


@dataclass(frozen=True)
class GgufType:
    """A tensor type: ``block`` weights in ``nbytes`` bytes.

    ``dense`` is set for plain floats, ``format`` and ``decode`` for quantised types; a type with
    neither is known by name and size only.
    """

    name: str
    block: int
    nbytes: int
    dense: FloatName | None = None
    format: AffineFormat | LookupFormat | None = None
    decode: Decoder | None = None


def decode_blocks(name: str, kind: GgufType, raw: U8, shape: tuple[int, ...]) -> Weight:
    """Decodes ``raw``, the stored bytes of weights ``[..., N, K]``; K is a multiple of a block."""
    assert kind.format is not None
    assert kind.decode is not None
    has_offset = isinstance(kind.format, AffineFormat) and kind.format.offset
    blocks = raw.reshape(-1, kind.nbytes)
    groups = kind.block // kind.format.group
    codes = np.empty((len(blocks), kind.block), np.uint8)
    scale = np.empty((len(blocks), groups), np.float32)
    offset = np.empty((len(blocks) if has_offset else 0, groups), np.float32)
    step = _CHUNK_CODES // kind.block
    with np.errstate(all="ignore"):  # infinite and NaN scales are data
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            kind.decode(blocks[part], codes[part], scale[part], offset[part])
    scales = (*shape[:-1], shape[-1] // kind.format.group)
    return Weight(
        name,
        kind.format,
        codes.reshape(shape),
        scale.reshape(scales),
        offset.reshape(scales) if has_offset else None,
    )


# Pieces that the decoders share


def _words(blocks: U8, start: int, size: int) -> Words:
    """Bytes ``[start, start + size)`` of each block as contiguous 64-bit words, ``[n, size/8]``."""
    field = blocks[:, start : start + size].view(f"V{size}").copy()
    words: Words = field.view(np.uint64)
    return words


def _pick(words: Words, source: int, width: int, target: int = 0) -> Words:
    """Moves ``width`` bits of every byte from bit ``source`` to ``target``, clearing the rest."""
    shift = np.uint64(abs(source - target))
    moved = words >> shift if source >= target else words << shift
    moved &= np.uint64((((1 << width) - 1) << target) * 0x0101010101010101)
    return moved


def _unpack(packed: Words, width: int, out: U8, target: int = 0) -> None:
    """Spreads fields of ``width`` bits over bytes, one run of ``8 w`` codes a field.

    ``packed`` ``[m, w]`` holds field r of byte j in bits ``width * r``; it becomes bit ``target``
    and up of ``out[m, 8 w * r + j]``.
    """
    size = 8 * packed.shape[1]
    runs = out.reshape(len(packed), -1).view(f"V{size}")
    for run in range(runs.shape[1]):
        runs[:, run] = _pick(packed, width * run, width, target).view(f"V{size}")[:, 0]


def _merge(codes: U8, high: U8 | Words) -> None:
    """``codes |= high``, as words."""
    merged = codes.view(np.uint64)
    merged |= high.reshape(-1).view(np.uint64).reshape(merged.shape)


def _half(blocks: U8, start: int) -> F32:
    """The fp16 number at byte ``start`` of each block, widened, ``[n, 1]``."""
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _product(number: F32, integers: npt.NDArray[np.uint8 | np.int8], out: F32) -> None:
    """``out[n, g] = number[n, 1] * integers[n, g]``."""
    np.multiply(number, integers.astype(np.float32), out=out)


def _six_bit_scales(blocks: U8, start: int) -> tuple[U8, U8]:
    """The 8 scales and 8 minima (6 bits each) that Q4_K and Q5_K pack in 12 bytes, ``[n, 8]``."""
    packed = blocks[:, start : start + 12].view("V12").copy().view(np.uint32)
    low, middle, high = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.empty((len(blocks), 2), np.uint32)
    minima = np.empty((len(blocks), 2), np.uint32)
    scales[:, 0] = low & np.uint32(0x3F3F3F3F)
    minima[:, 0] = middle & np.uint32(0x3F3F3F3F)
    nibble, top = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
    scales[:, 1] = (high & nibble) | ((low >> np.uint32(2)) & top)
    minima[:, 1] = ((high >> np.uint32(4)) & nibble) | ((middle >> np.uint32(2)) & top)
    return scales.view(np.uint8), minima.view(np.uint8)


# Blocks of 32 weights: an fp16 scale; for the _1 types an fp16 minimum


def _q4_0(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """fp16 d, 16 bytes of nibbles: low nibbles are weights 0-15, high ones 16-31."""
    scale[:] = _half(blocks, 0)
    _unpack(_words(blocks, 2, 16), 4, codes)


def _q4_1(blocks: U8, codes: U8, scale: F32, offset: F32) -> None:
    """fp16 d, fp16 m, nibbles as in Q4_0."""
    scale[:] = _half(blocks, 0)
    offset[:] = _half(blocks, 2)
    _unpack(_words(blocks, 4, 16), 4, codes)


def _q5(blocks: U8, start: int, codes: U8) -> None:
    """The 5-bit codes at ``start``: 32 fifth bits, then nibbles as in Q4_0."""
    _unpack(_words(blocks, start + 4, 16), 4, codes)
    packed = blocks[:, start : start + 4].view("V4").copy().view(np.uint8)
    fifth = np.unpackbits(packed.reshape(-1), bitorder="little").view(np.uint64)
    fifth <<= np.uint64(4)
    _merge(codes, fifth)


def _q5_0(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """fp16 d, 5-bit codes."""
    scale[:] = _half(blocks, 0)
    _q5(blocks, 2, codes)


def _q5_1(blocks: U8, codes: U8, scale: F32, offset: F32) -> None:
    """fp16 d, fp16 m, 5-bit codes."""
    scale[:] = _half(blocks, 0)
    offset[:] = _half(blocks, 2)
    _q5(blocks, 4, codes)


def _q8_0(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """fp16 d, 32 signed bytes; flipping the sign bit adds 128, which is the zero point."""
    scale[:] = _half(blocks, 0)
    np.bitwise_xor(_words(blocks, 2, 32), np.uint64(0x8080808080808080), out=codes.view(np.uint64))


# Super-blocks of 256 weights (K-quants): a sub-scale for each group of 16 or 32


def _q2_k(blocks: U8, codes: U8, scale: F32, offset: F32) -> None:
    """16 bytes of 4-bit (scale, minimum), 64 bytes of 2-bit codes, fp16 d, fp16 dmin."""
    sub = blocks[:, :16]
    _product(_half(blocks, 80), sub & np.uint8(0x0F), scale)
    _product(-_half(blocks, 82), sub >> np.uint8(4), offset)
    _unpack(_words(blocks, 16, 64).reshape(-1, 4), 2, codes)


def _q3_k(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """32 bytes of third bits, 64 of 2-bit codes, 16 scales of 6 bits (zero 32), fp16 d.

    A third bit that is *clear* subtracts 4: code = low | bit << 2 with zero point 4.
    """
    packed = blocks[:, 96:108].view("V12").copy().view(np.uint32)
    nibble, pair = np.uint32(0x0F0F0F0F), np.uint32(0x03030303)
    sub = np.empty((len(blocks), 4), np.uint32)
    for quarter in range(4):
        low = packed[:, quarter % 2] >> np.uint32(4 * (quarter // 2))
        high = packed[:, 2] >> np.uint32(2 * quarter)
        sub[:, quarter] = (low & nibble) | ((high & pair) << np.uint32(4))
    _product(_half(blocks, 108), sub.view(np.int8) - np.int8(32), scale)
    _unpack(_words(blocks, 32, 64).reshape(-1, 4), 2, codes)
    third = np.empty_like(codes)
    _unpack(_words(blocks, 0, 32), 1, third, target=2)
    _merge(codes, third)


def _q4_k(blocks: U8, codes: U8, scale: F32, offset: F32) -> None:
    """fp16 d, fp16 dmin, 12 bytes of 6-bit (scale, minimum), 4 x 32 bytes of nibbles."""
    scales, minima = _six_bit_scales(blocks, 4)
    _product(_half(blocks, 0), scales, scale)
    _product(-_half(blocks, 2), minima, offset)
    _unpack(_words(blocks, 16, 128).reshape(-1, 4), 4, codes)


def _q5_k(blocks: U8, codes: U8, scale: F32, offset: F32) -> None:
    """As Q4_K, with 32 bytes of fifth bits (bit r is group r) before the nibbles."""
    scales, minima = _six_bit_scales(blocks, 4)
    _product(_half(blocks, 0), scales, scale)
    _product(-_half(blocks, 2), minima, offset)
    _unpack(_words(blocks, 48, 128).reshape(-1, 4), 4, codes)
    fifth = np.empty_like(codes)
    _unpack(_words(blocks, 16, 32), 1, fifth, target=4)
    _merge(codes, fifth)


def _q6_k(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, fp16 d."""
    _product(_half(blocks, 208), blocks[:, 192:208].view(np.int8), scale)
    _unpack(_words(blocks, 0, 128).reshape(-1, 8), 4, codes)
    high = np.empty_like(codes)
    _unpack(_words(blocks, 128, 64).reshape(-1, 4), 2, high, target=4)
    _merge(codes, high)


# Codes into a table


def _iq4_nl(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """fp16 d, nibbles as in Q4_0."""
    scale[:] = _half(blocks, 0)
    _unpack(_words(blocks, 2, 16), 4, codes)


def _iq4_xs(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """fp16 d, 8 scales of 6 bits (zero 32; high pairs, then low nibbles), 8 x 16 bytes of nibbles.

    Bits 2g of the 16-bit word at byte 2 and nibble g of the 4 bytes after it are scale g.
    """
    group = np.arange(8)
    high = blocks[:, 2:4].view("<u2") >> (2 * group).astype(np.uint16)
    low = blocks[:, 4 + group // 2] >> (4 * (group % 2)).astype(np.uint8)
    sub = (low & np.uint8(0x0F)) | ((high.astype(np.uint8) & np.uint8(3)) << np.uint8(4))
    _product(_half(blocks, 0), sub.view(np.int8) - np.int8(32), scale)
    _unpack(_words(blocks, 8, 128).reshape(-1, 2), 4, codes)


def _mxfp4(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    """An E8M0 scale, nibbles as in Q4_0."""
    scale[:] = halved_e8m0(blocks[:, :1])
    _unpack(_words(blocks, 1, 16), 4, codes)


_IQ4 = LookupFormat(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), group=32
)

_DECODED = {
    0: GgufType("F32", 1, 4, dense="fp32"),
    1: GgufType("F16", 1, 2, dense="fp16"),
    30: GgufType("BF16", 1, 2, dense="bf16"),
    2: GgufType("Q4_0", 32, 18, format=AffineFormat(4, 32, 8), decode=_q4_0),
    3: GgufType("Q4_1", 32, 20, format=AffineFormat(4, 32, offset=True), decode=_q4_1),
    6: GgufType("Q5_0", 32, 22, format=AffineFormat(5, 32, 16), decode=_q5_0),
    7: GgufType("Q5_1", 32, 24, format=AffineFormat(5, 32, offset=True), decode=_q5_1),
    8: GgufType("Q8_0", 32, 34, format=AffineFormat(8, 32, 128), decode=_q8_0),
    10: GgufType("Q2_K", 256, 84, format=AffineFormat(2, 16, offset=True), decode=_q2_k),
    11: GgufType("Q3_K", 256, 110, format=AffineFormat(3, 16, 4), decode=_q3_k),
    12: GgufType("Q4_K", 256, 144, format=AffineFormat(4, 32, offset=True), decode=_q4_k),
    13: GgufType("Q5_K", 256, 176, format=AffineFormat(5, 32, offset=True), decode=_q5_k),
    14: GgufType("Q6_K", 256, 210, format=AffineFormat(6, 16, 32), decode=_q6_k),
    20: GgufType("IQ4_NL", 32, 18, format=_IQ4, decode=_iq4_nl),
    23: GgufType("IQ4_XS", 256, 136, format=_IQ4, decode=_iq4_xs),
    39: GgufType("MXFP4", 32, 17, format=LookupFormat(FP4_DOUBLED, 32), decode=_mxfp4),
}

# Q8_1 and Q8_K are ggml's activation formats; files hold them only by mistake.
_NAMED = {
    9: ("Q8_1", 32, 36),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

GGUF_TYPES: Mapping[int, GgufType] = MappingProxyType(
    _DECODED | {number: GgufType(*facts) for number, facts in _NAMED.items()}
)

REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Types that ggml itself dropped; such files have to be converted again."""
