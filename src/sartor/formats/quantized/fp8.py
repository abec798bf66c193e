"""Checkpoints in 8-bit floats (E4M3) as DeepSeek-V3 (arXiv:2412.19437) and many since.

Source: ``integrations/finegrained_fp8.py`` of transformers. A weight ``W`` ``[..., N, K]`` is
stored as float8_e4m3fn beside ``W_scale_inv`` (or ``W_scale``; both multiply): a scale for each
tile of ``weight_block_size``, or, where none is given, one for the tensor or for each row.

Activations keep the precision of the plan: ``activation_scheme`` "dynamic" rounds them to 8 bits
while computing, which is a matter of speed. "static" stores their scales and cuts what lies
outside; it is refused, and so is whatever was trained or calibrated to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sartor.errors import FormatError
from sartor.formats.files import TensorInfo
from sartor.formats.quantized.base import FLOATS, Quantized, Settings, Tensors, Tiles, group_of
from sartor.ops.weights import Fp8Format, Weight

STORED = "F8_E4M3"


def find(settings: Settings, tensors: Tensors) -> Iterator[Quantized]:
    """Every tensor of the checkpoint that is stored in E4M3."""
    settings.require("activation_scheme", "dynamic")
    settings.require("fmt", "e4m3")
    block = settings.integers("weight_block_size")
    if block and len(block) != 2:
        raise FormatError(f"{settings.where}: weight_block_size is {list(block)}, not two lengths")
    for name in tensors:
        if tensors.stored(name) == STORED:
            info = tensors.codes(name, [STORED], [2, 3])
            scale = f"{name}_scale" if f"{name}_scale" in tensors else f"{name}_scale_inv"
            rows, columns = info.shape[-2:]
            choices = [Tiles(*block)] if block else [Tiles(rows, columns), Tiles(1, columns)]
            yield fp8_weight(tensors, info, scale, choices, "fp8")


def fp8_weight(
    tensors: Tensors, info: TensorInfo, scale: str, choices: list[Tiles], layout: str
) -> Quantized:
    """E4M3 codes with scales by the first of the tiles that their shape allows."""
    tiles = tensors.expect_scale(scale, info.name, (*FLOATS, "F8_E8M0"), info.shape, choices)
    group = group_of(info, info.name, info.shape[-1], tiles.groups(info.shape[-1]))
    parts = (info.name, scale)
    logical = tensors.logical(info.name, info.shape, layout, parts)

    def read() -> Weight:
        spread = tiles.spread(tensors.floats(scale), info.shape)
        codes = tensors.array(info.name).view(np.uint8)
        return Weight(info.name, Fp8Format(group), codes, spread)

    return Quantized(logical, parts, read)
