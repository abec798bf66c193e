"""Packed weights: the file equals the memory, and a damaged file is made again."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from sartor.backends.cpu import _native, weights
from sartor.backends.cpu.packing import pack_matrix
from sartor.errors import FormatError
from sartor.graph import Builder, Program
from sartor.ops.weights import AffineFormat, Weight, dense, quantize_affine

POOL = _native.ThreadPool(2)


class Source:
    def __init__(self, revision: str = "a", width: int = 48) -> None:
        self.revision = revision
        self.width = width
        self.reads = 0

    def identity(self) -> str:
        return self.revision

    def weight(self, name: str) -> Weight:
        self.reads += 1
        rng = np.random.default_rng(1)
        if name == "norm.weight":
            return dense(name, rng.standard_normal(self.width).astype(np.float32))
        values = rng.standard_normal((50, 48)).astype(np.float32)
        return quantize_affine(name, values, 5, 16, offset=True)


def program() -> Program:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embed", 50, 48)
    x = builder.gather_rows(builder.rms_norm(x, "norm", eps=1e-6), builder.output_rows)
    return builder.finish(builder.linear(x, "head", 50))


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "sartor-packed-file":
            thread.join()


def test_the_second_start_reads_no_weight_and_equals_the_first(tmp_path: Path) -> None:
    first = weights.pack(POOL, program(), Source(), tmp_path)
    settle()
    source = Source()
    second = weights.pack(POOL, program(), source, tmp_path)
    assert source.reads == 0
    assert first.nbytes == second.nbytes
    assert first.bits_per_weight == second.bits_per_weight
    for name, matrix in first.matrices.items():
        other = second.matrices[name]
        assert (matrix.storage, matrix.n, matrix.k, matrix.bits) == (
            other.storage,
            other.n,
            other.k,
            other.bits,
        )
        assert matrix.scale_multiplier == other.scale_multiplier
        for field in ("codes", "scales", "offsets"):
            np.testing.assert_array_equal(getattr(matrix, field), getattr(other, field))
    np.testing.assert_array_equal(first.vectors["norm.weight"], second.vectors["norm.weight"])


def test_another_revision_has_another_file(tmp_path: Path) -> None:
    weights.pack(POOL, program(), Source("a"), tmp_path)
    settle()
    source = Source("b")
    weights.pack(POOL, program(), source, tmp_path)
    settle()
    assert source.reads == 3
    assert len(list(tmp_path.glob("*.packed"))) == 2


@pytest.mark.parametrize("damage", ["cut", "header", "preamble"])
def test_a_damaged_file_is_packed_again(tmp_path: Path, damage: str) -> None:
    weights.pack(POOL, program(), Source(), tmp_path)
    settle()
    (path,) = tmp_path.glob("*.packed")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[-5 if damage == "header" else 9] ^= 0x55
    path.write_bytes(data)
    source = Source()
    weights.pack(POOL, program(), source, tmp_path)
    settle()
    assert source.reads == 3
    untouched = Source()
    weights.pack(POOL, program(), untouched, tmp_path)
    assert untouched.reads == 0


def test_a_full_disk_only_costs_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise weights.SartorError("the disk is full")

    monkeypatch.setattr(weights, "PackedWriter", full)
    packed = weights.pack(POOL, program(), Source(), tmp_path)
    settle()
    assert packed.nbytes > 0
    assert "the disk is full" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_misshapen_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"norm\.weight.*\[47\].*\[48\]"):
        weights.pack(POOL, program(), Source(width=47), None)


def test_scales_beyond_fp16_are_widened_not_lost() -> None:
    rng = np.random.default_rng(2)
    weight = quantize_affine("w", rng.standard_normal((16, 32)).astype(np.float32), 4, 32)
    assert weight.scale is not None
    weight.scale[3] *= np.float32(1e-12)
    matrix = pack_matrix(POOL, weight)
    assert matrix.format_name == "fp32"
    kept = matrix.codes.view(np.float32).reshape(32, 16).T
    np.testing.assert_array_equal(kept, weight.dequantize())


def test_scales_are_kept_within_half_an_fp16_step() -> None:
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((32, 256)) * 1e-6).astype(np.float32)
    weight = quantize_affine("w", values, 4, 32, offset=True)
    matrix = pack_matrix(POOL, weight)
    assert matrix.scales is not None
    assert weight.scale is not None
    kept = matrix.scales.view(np.float16).astype(np.float32) * np.float32(matrix.scale_multiplier)
    kept = kept.reshape(2, 8, 16).transpose(0, 2, 1).reshape(32, 8)
    assert np.abs(kept / weight.scale - 1).max() <= 2.0**-11


def test_groups_without_a_kernel_are_cut_without_loss() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (16, 96)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (16, 2)).astype(np.float16).astype(np.float32)
    packed = pack_matrix(POOL, Weight("w", AffineFormat(4, 48, 8), codes, scale))
    assert packed.format_name == "affine4g16"
    pieces = Weight("w", AffineFormat(4, 16, 8), codes, np.repeat(scale, 3, axis=1))
    same = pack_matrix(POOL, pieces)
    assert packed.scales is not None
    assert same.scales is not None
    assert np.array_equal(packed.codes, same.codes)
    assert np.array_equal(packed.scales, same.scales)
