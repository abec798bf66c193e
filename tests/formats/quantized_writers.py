"""Quantised layouts written weight by weight, straight from their description.

Each writer draws random codes and scales of a linear layer ``[N, K]`` and gives the tensors of the
module by suffix, and the weights that they mean. Bits are placed in one big integer a line, so that
nothing is shared with the readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, np.ndarray]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True)
class Layout:
    """``write(generator, rows, columns)`` and the configuration that goes with it."""

    config: dict[str, Any]
    write: Callable[[np.random.Generator, int, int], Written]
    stored: str = ""
    ordered: bool = True
    bits: int = 4
    options: dict[str, Any] = field(default_factory=dict)


def words_of(codes: Iterator[int] | list[int] | np.ndarray, bits: int) -> list[int]:
    """int32 words that hold codes one after the other, lowest bits first."""
    line = [int(code) for code in codes]
    number = sum(code << (bits * index) for index, code in enumerate(line))
    return [signed(number >> (32 * index)) for index in range(-(-len(line) * bits // 32))]


def words_of_whole(codes: np.ndarray, bits: int) -> list[int]:
    """The same where a code that does not fit into a word begins the next one."""
    count = 32 // bits
    parts = [codes[at : at + count] for at in range(0, len(codes), count)]
    return [word for part in parts for word in words_of(part, bits)]


def signed(word: int) -> int:
    """The low 32 bits as an int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def int32(lines: list[list[int]]) -> torch.Tensor:
    return torch.tensor(lines, dtype=torch.int32)


def scales_of(
    generator: np.random.Generator, shape: tuple[int, ...], columns: int, largest: float
) -> torch.Tensor:
    """fp16 scales that make weights of a useful size; ``largest`` is that of a code."""
    values = generator.uniform(0.5, 1.5, shape) * 2.5 / (largest * columns**0.5)
    return torch.tensor(values, dtype=torch.float16)


def meaning(
    codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, group_of: list[int]
) -> np.ndarray:
    """``scale[n, g] * (code[n, k] - zero[n, g])`` one weight at a time, in double precision."""
    scale = scales.double().numpy()
    out = np.empty(codes.shape)
    for n, k in np.ndindex(*codes.shape):
        g = group_of[k]
        out[n, k] = scale[n, g] * (int(codes[n, k]) - int(zeros[n, g]))
    return out.astype(np.float32)


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    sym: bool = False,
    version: str | None = "gptq",
    act_order: bool = False,
    with_g_idx: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    **config: Any,
) -> Layout:
    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        size = columns if group == -1 else group
        groups = columns // size
        codes = generator.integers(0, 1 << bits, (rows, columns))
        scales = scales_of(generator, (rows, groups), columns, 1 << (bits - 1)).to(scale_dtype)
        zeros = generator.integers(0, 1 << bits, (rows, groups))
        if sym:
            zeros[:] = 1 << (bits - 1)
        group_of = [k // size for k in range(columns)]
        if act_order:
            group_of = [int(g) for g in generator.permutation(group_of)]
        if bits == 3 and version != "gptq_v2":
            zeros = np.maximum(zeros, 1)
            lines = [words_of(zeros[:, g] - 1, bits) for g in range(groups)]
        else:
            # Subtracted from the whole word, so that 0 borrows from the next.
            ones = 0 if version == "gptq_v2" else sum(1 << at for at in range(0, 32, bits))
            lines = [[signed(w - ones) for w in words_of(zeros[:, g], bits)] for g in range(groups)]
        tensors = {
            "qweight": int32([words_of(codes[n], bits) for n in range(rows)]).T.contiguous(),
            "qzeros": int32(lines),
            "scales": scales.T.contiguous(),
        }
        if with_g_idx:
            tensors["g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        return tensors, meaning(codes, scales, zeros, group_of)

    values = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    values |= {"sym": sym} | config
    if version is not None:
        values["checkpoint_format"] = version
    return Layout(values, write, "gptq", not act_order, bits)


def awq(group: int = 32) -> Layout:
    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        size = columns if group == -1 else group
        groups = columns // size
        codes = generator.integers(0, 16, (rows, columns))
        scales = scales_of(generator, (rows, groups), columns, 8)
        zeros = generator.integers(0, 16, (rows, groups))

        def line(values: np.ndarray) -> list[int]:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            return words_of([values[8 * w + o] for w in range(rows // 8) for o in order], 4)

        tensors = {
            "qweight": int32([line(codes[:, k]) for k in range(columns)]),
            "qzeros": int32([line(zeros[:, g]) for g in range(groups)]),
            "scales": scales.T.contiguous(),
        }
        return tensors, meaning(codes, scales, zeros, [k // size for k in range(columns)])

    values = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return Layout(values | {"version": "gemm"}, write, "awq")


def compressed_config(format: str, inputs: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def pack_quantized(
    bits: int = 4,
    group: int | None = 32,
    *,
    zero: str = "none",
    act_order: bool = False,
    g_idx: str = "none",
    gaps: bool = False,
) -> Layout:
    """``zero``: none, packed (along N), or plain (int8, as older versions wrote it); ``gaps``: words
    of whole codes, as they wrote them."""
    lines_of = words_of_whole if gaps else words_of

    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        size = group or columns
        groups = columns // size
        half = 1 << (bits - 1)
        codes = generator.integers(-half, half, (rows, columns))
        scales = scales_of(generator, (rows, groups), columns, half)
        zeros = np.zeros((rows, groups), int)
        if zero != "none":
            zeros = generator.integers(-half, half, (rows, groups))
        group_of = [k // size for k in range(columns)]
        if act_order:
            group_of = [int(g) for g in generator.permutation(group_of)]
        tensors = {
            "weight_packed": int32([lines_of(codes[n] + half, bits) for n in range(rows)]),
            "weight_scale": scales.to(torch.bfloat16),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if zero == "packed":
            lines = [lines_of(zeros[:, g] + half, bits) for g in range(groups)]
            tensors["weight_zero_point"] = int32(lines).T.contiguous()
        if zero == "plain":
            tensors["weight_zero_point"] = torch.tensor(zeros, dtype=torch.int8)
        if act_order or g_idx == "unset":
            kept = group_of if act_order else [-1] * columns
            tensors["weight_g_idx"] = torch.tensor(kept, dtype=torch.int32)
        return tensors, meaning(codes, tensors["weight_scale"], zeros, group_of)

    weights = {"num_bits": bits, "type": "int", "symmetric": zero == "none", "group_size": group}
    weights |= {"strategy": "group" if group else "channel", "dynamic": False}
    config = compressed_config("pack-quantized", None, **weights)
    return Layout(config, write, "pack-quantized", not act_order, bits)


def int_quantized(strategy: str = "channel", *, zero: bool = False) -> Layout:
    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        codes = generator.integers(-128, 128, (rows, columns))
        shape = (1,) if strategy == "tensor" else (rows, 1)
        scales = scales_of(generator, shape, columns, 128)
        zeros = generator.integers(-20, 20, shape) if zero else np.zeros(shape, int)
        tensors = {"weight": torch.tensor(codes, dtype=torch.int8), "weight_scale": scales}
        if zero:
            tensors["weight_zero_point"] = torch.tensor(zeros, dtype=torch.int8)
        every = np.broadcast_to(zeros.reshape(-1, 1), (rows, 1))
        wide = scales.reshape(-1, 1).expand(rows, 1)
        return tensors, meaning(codes, wide, every, [0] * columns)

    weights = {"num_bits": 8, "type": "int", "symmetric": not zero, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config = compressed_config("int-quantized", inputs, **weights)
    return Layout(config, write, "int-quantized", bits=8)


def e4m3(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Random E4M3 numbers, without NaN."""
    codes = generator.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 8
    return torch.tensor(codes).view(torch.float8_e4m3fn)


def tiled(codes: torch.Tensor, scale: torch.Tensor, tile: tuple[int, int]) -> np.ndarray:
    """``code[n, k] * scale[n // rows, k // columns]`` by torch's own E4M3."""
    values = codes.float().numpy()
    out = np.empty_like(values)
    for n, k in np.ndindex(*values.shape):
        out[n, k] = values[n, k] * np.float32(scale[n // tile[0], k // tile[1]].float())
    return out


def float8(
    strategy: str,
    tile: tuple[int, int] = (0, 0),
    *,
    method: str = "compressed-tensors",
    suffix: str = "weight_scale",
    scale_dtype: torch.dtype = torch.float32,
) -> Layout:
    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        down, across = tile[0] or rows, tile[1] or columns
        codes = e4m3(generator, (rows, columns))
        shape = (-(-rows // down), -(-columns // across))
        scale = scales_of(generator, shape, columns, 100).to(torch.float32).to(scale_dtype)
        stored = scale.reshape(1) if strategy == "tensor" else scale
        return {"weight": codes, suffix: stored}, tiled(codes, scale, (down, across))

    if method == "fp8":
        config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        config["weight_block_size"] = list(tile) if strategy == "block" else None
        return Layout(config, write, "fp8", bits=8)
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    weights |= {"group_size": tile[1] if strategy == "group" else None}
    weights |= {"block_structure": list(tile) if strategy == "block" else None}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config = compressed_config("float-quantized", inputs, **weights)
    return Layout(config, write, "float-quantized", bits=8)


def mxfp4_of(generator: np.random.Generator, shape: tuple[int, ...]) -> Written:
    """The blocks and scales of weights ``[..., N, K]``, and the weights."""
    codes = generator.integers(0, 16, shape)
    groups = (*shape[:-1], shape[-1] // 32)
    exponents = generator.integers(120, 124, groups)
    blocks = np.zeros((*groups, 16), np.uint8)
    out = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        *row, k = index
        code = int(codes[index])
        blocks[(*row, k // 32, k % 32 // 2)] |= code << (4 * (k % 2))
        sign = -1.0 if code & 8 else 1.0
        out[index] = sign * FP4[code & 7] * 2.0 ** (int(exponents[(*row, k // 32)]) - 127)
    scales = torch.tensor(exponents.astype(np.uint8))
    return {"blocks": torch.tensor(blocks), "scales": scales}, out


def mxfp4() -> Layout:
    def write(generator: np.random.Generator, rows: int, columns: int) -> Written:
        tensors, weights = mxfp4_of(generator, (rows, columns))
        return {f"weight_{key}": value for key, value in tensors.items()}, weights

    return Layout({"quant_method": "mxfp4"}, write, "mxfp4")


LAYOUTS: dict[str, Layout] = {
    "gptq-sym": gptq(sym=True),
    "gptq": gptq(),
    "gptq-v2": gptq(version="gptq_v2"),
    "gptq-unversioned-bf16": gptq(version=None, scale_dtype=torch.bfloat16, with_g_idx=False),
    "gptq-2-bits": gptq(2, 16),
    "gptq-3-bits": gptq(3),
    "gptq-3-bits-v2": gptq(3, version="gptq_v2", meta={"quantizer": ["gptqmodel:2.0"]}),
    "gptq-8-bits-channel": gptq(8, -1),
    "gptq-act-order": gptq(act_order=True),
    "gptq-3-bits-act-order-sym": gptq(3, 16, act_order=True, sym=True),
    "awq": awq(),
    "awq-channel": awq(-1),
    "pack": pack_quantized(),
    "pack-zero": pack_quantized(zero="packed"),
    "pack-plain-zero": pack_quantized(zero="plain", g_idx="unset"),
    "pack-8-bits-channel": pack_quantized(8, None, zero="packed"),
    "pack-2-bits": pack_quantized(2, 16, zero="packed"),
    "pack-3-bits": pack_quantized(3),
    "pack-3-bits-zero-act-order": pack_quantized(3, zero="packed", act_order=True),
    "pack-3-bits-with-gaps": pack_quantized(3, zero="packed", gaps=True),
    "pack-5-bits": pack_quantized(5, None, zero="packed"),
    "pack-6-bits-with-gaps": pack_quantized(6, gaps=True),
    "pack-7-bits": pack_quantized(7, zero="plain"),
    "pack-act-order": pack_quantized(act_order=True),
    "int8-channel": int_quantized(),
    "int8-tensor": int_quantized("tensor"),
    "int8-zero": int_quantized(zero=True),
    "float-tensor": float8("tensor"),
    "float-channel": float8("channel", (1, 0)),
    "float-group": float8("group", (1, 32)),
    "float-block": float8("block", (16, 32)),
    "fp8-block": float8("block", (32, 32), method="fp8", suffix="weight_scale_inv"),
    "fp8-large-block": float8("block", (128, 128), method="fp8", suffix="weight_scale_inv"),
    "fp8-tensor": float8("tensor", method="fp8"),
    "fp8-e8m0": float8(
        "block",
        (32, 32),
        method="fp8",
        suffix="weight_scale_inv",
        scale_dtype=torch.float8_e8m0fnu,
    ),
    "mxfp4": mxfp4(),
}
