"""Every quantised GGUF type against the ``gguf`` package, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_checkpoints import random_blocks, write_gguf

from sartor.formats import open_checkpoint
from sartor.formats.gguf_blocks import _CHUNK_CODES, GGUF_TYPES, GgufType, decode_blocks
from sartor.ops.weights import AffineFormat, LookupFormat

QUANTISED = {kind.name: kind for kind in GGUF_TYPES.values() if kind.decode}


def expected(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


def test_the_issue_s_types_are_decoded() -> None:
    assert set(QUANTISED) == {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "MXFP4"),
    }


@pytest.mark.parametrize("kind", GGUF_TYPES.values(), ids=lambda kind: kind.name)
def test_sizes_agree_with_the_library(kind: GgufType) -> None:
    if kind.name == "Q8_1":
        return  # the library still counts its scales as float32; ggml-common.h has fp16
    numbers = {value.name: sizes for value, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert numbers[kind.name] == (kind.block, kind.nbytes)


def test_type_numbers_agree_with_the_library() -> None:
    assert {n: kind.name for n, kind in GGUF_TYPES.items()} == {
        value.value: value.name for value in gguf.GGMLQuantizationType
    }


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_random_blocks_are_exact(name: str) -> None:
    kind = QUANTISED[name]
    raw = random_blocks(name, 37, 512)
    weight = decode_blocks("w", kind, raw, (37, 512))
    assert isinstance(weight.format, AffineFormat | LookupFormat)
    bits = weight.format.bits if isinstance(weight.format, AffineFormat) else 4
    assert weight.data.max() < 2**bits
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(weight.dequantize(), expected(raw, name))


@pytest.mark.parametrize("name", QUANTISED)
def test_chunks_join_without_a_seam(name: str) -> None:
    kind = QUANTISED[name]
    rows = _CHUNK_CODES // 512 + 3
    raw = random_blocks(name, rows, 512)
    whole = decode_blocks("w", kind, raw, (rows, 512))
    for part in (slice(0, 2), slice(rows - 5, rows)):
        alone = decode_blocks("w", kind, raw[part], (len(raw[part]), 512))
        np.testing.assert_array_equal(whole.data[part], alone.data)
        np.testing.assert_array_equal(whole.scale[part], alone.scale)


@pytest.mark.parametrize("name", QUANTISED)
def test_experts_stay_apart(tmp_path: Path, name: str) -> None:
    raw = random_blocks(name, 6, 512)
    path = write_gguf(tmp_path / "e.gguf", {"w": (raw.reshape(2, 3, -1), name)})
    weight = open_checkpoint(path).weight("w")
    assert weight.shape == (2, 3, 512)
    assert weight.scale is not None
    assert weight.scale.shape[:2] == (2, 3)
    with np.errstate(all="ignore"):
        wanted = expected(raw, name).reshape(2, 3, 512)
        np.testing.assert_array_equal(weight.dequantize(), wanted)
        np.testing.assert_array_equal(weight.rows(1).dequantize(), wanted[1])


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_real_files_are_exact(model_files: dict[str, Path], model: str) -> None:
    """The first rows of every tensor: each type, each shape, in its real place in the file."""
    checkpoint = open_checkpoint(model_files[model])
    raw_file = np.memmap(model_files[model], np.uint8, "r")
    for name in checkpoint.names():
        info = checkpoint.info(name)
        weight = checkpoint.weight(name)
        kind = next(k for k in GGUF_TYPES.values() if info.stored in (k.name, k.dense))
        row = info.shape[-1] // kind.block * kind.nbytes
        rows = min(info.size // info.shape[-1], 8)
        raw = raw_file[info.offset : info.offset + rows * row].reshape(rows, row)
        head = weight.rows(slice(0, rows)) if len(info.shape) > 1 else weight
        assert weight.shape == info.shape
        got = head.dequantize().reshape(rows, -1)
        np.testing.assert_array_equal(got, expected(raw, kind.name), err_msg=name)
