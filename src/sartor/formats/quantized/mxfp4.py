"""MXFP4 checkpoints as GPT-OSS is published.

Source: ``integrations/mxfp4.py`` of transformers. A weight ``W`` ``[..., N, K]`` is stored as

    W_blocks  uint8 [..., N, K / 32, 16]   two E2M1 codes a byte, the low nibble first
    W_scales  uint8 [..., N, K / 32]       E8M0 exponents
"""

from __future__ import annotations

from collections.abc import Iterator

from sartor.formats.microscaling import FP4_DOUBLED, halved_e8m0
from sartor.formats.quantized.base import Quantized, Settings, Tensors, unpack_bits
from sartor.ops.weights import LookupFormat, Weight

_FORMAT = LookupFormat(FP4_DOUBLED, 32)


def find(settings: Settings, tensors: Tensors) -> Iterator[Quantized]:
    """Every tensor of the checkpoint that has ``_blocks``."""
    for name in tensors:
        if name.endswith("_blocks"):
            yield _weight(tensors, name.removesuffix("_blocks"))


def _weight(tensors: Tensors, name: str) -> Quantized:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    stored = tensors.codes(blocks, ["U8"], [3, 4])
    *leading, count, _ = stored.shape
    tensors.expect(blocks, blocks, ["U8"], (*leading, count, 16))
    tensors.expect(scales, blocks, ["U8"], (*leading, count))
    parts = (blocks, scales)
    logical = tensors.logical(name, (*leading, 32 * count), "mxfp4", parts)

    def read() -> Weight:
        codes = unpack_bits(tensors.array(blocks), 4).reshape(logical.shape)
        return Weight(name, _FORMAT, codes, halved_e8m0(tensors.array(scales)))

    return Quantized(logical, parts, read)
