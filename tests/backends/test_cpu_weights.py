"""Packed weights: the file equals the memory, and a damaged file is made again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sartor.backends.cpu import _native, weights
from sartor.backends.cpu.backend import CpuBackend
from sartor.backends.cpu.packing import pack_matrix
from sartor.errors import FormatError
from sartor.formats import packed
from sartor.formats.packed import PackedFile
from sartor.graph import Builder, Program
from sartor.ops.weights import AffineFormat, Weight, dense, quantize_affine
from sartor.plan import ExecutionPlan

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


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a file's header and gives it the digest that belongs to it."""
    data = path.read_bytes()
    *begin, offset, length, _ = packed._PREAMBLE.unpack_from(data)
    header = json.loads(data[offset : offset + length])
    change(header)
    raw = json.dumps(header).encode()
    preamble = packed._PREAMBLE.pack(*begin, offset, len(raw), hashlib.sha256(raw).digest())
    path.write_bytes(preamble + data[len(preamble) : offset] + raw)


def packed_file(folder: Path) -> Path:
    weights.pack(POOL, program(), Source(), folder)
    settle()
    (path,) = folder.glob("*.packed")
    return path


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "more outputs": lambda h: h["meta"]["matrices"]["head.weight"].update(n=65536),
    "fewer outputs": lambda h: h["meta"]["matrices"]["head.weight"].update(n=16),
    "fewer inputs": lambda h: h["meta"]["matrices"]["head.weight"].update(k=32),
    "more padding": lambda h: h["meta"]["matrices"]["head.weight"].update(k_padded=128),
    "experts": lambda h: h["meta"]["matrices"]["head.weight"].update(experts=2),
    "bits": lambda h: h["meta"]["matrices"]["head.weight"].update(bits=4),
    "group": lambda h: h["meta"]["matrices"]["head.weight"].update(group=32),
    "group of none": lambda h: h["meta"]["matrices"]["head.weight"].update(group=0),
    "numbers that wrap around": lambda h: h["meta"]["matrices"]["head.weight"].update(n=2**62),
    "beyond 64 bits": lambda h: h["meta"]["matrices"]["head.weight"].update(k_padded=2**80),
    "storage": lambda h: h["meta"]["matrices"]["head.weight"].update(storage="int8"),
    "a missing field": lambda h: h["meta"]["matrices"]["head.weight"].pop("zero"),
    "a further field": lambda h: h["meta"]["matrices"]["head.weight"].update(codes=1),
    "a matrix twice": lambda h: h["meta"]["matrices"].update(
        other=h["meta"]["matrices"]["head.weight"]
    ),
    "no matrix": lambda h: h["meta"]["matrices"].pop("head.weight"),
    "a vector for a matrix": lambda h: h["meta"]["matrices"].update(
        {"norm.weight": h["meta"]["matrices"].pop("head.weight")}
    ),
    "no vector": lambda h: h["arrays"].pop("norm.weight#vector"),
    "a short vector": lambda h: h["arrays"]["norm.weight#vector"].update(shape=[1], nbytes=4),
    "a vector of halves": lambda h: h["arrays"]["norm.weight#vector"].update(
        dtype="float16", shape=[96]
    ),
    "a square vector": lambda h: h["arrays"]["norm.weight#vector"].update(shape=[6, 8]),
    "codes of another type": lambda h: h["arrays"]["head.weight#codes"].update(dtype="int8"),
    "no scales": lambda h: h["arrays"].pop("head.weight#scales"),
    "short scales": lambda h: h["arrays"]["head.weight#scales"].update(shape=[16], nbytes=32),
    "an unknown array": lambda h: h["arrays"].update(
        {"x#codes": {**h["arrays"]["head.weight#codes"], "shape": [0], "nbytes": 0}}
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_the_model_is_packed_again(wrong: str, tmp_path: Path) -> None:
    path = packed_file(tmp_path)
    rewrite(path, WRONG[wrong])
    source = Source()
    again = weights.pack(POOL, program(), source, tmp_path)
    settle()
    assert source.reads == 3
    assert again.matrices["head.weight"].n == 50


def test_a_changed_header_never_reaches_the_kernels(tmp_path: Path) -> None:
    """Whatever it says, it is refused, or says what it did (a scale may differ, and is a value)."""
    path = packed_file(tmp_path)
    original = path.read_bytes()
    rng = random.Random(0)
    values = [0, 1, 15, 16, 17, 64, 2**31, 2**63, -1, 1.5, "affine", "fp32", None, [], True, "x"]

    def change(header: dict[str, Any]) -> None:
        place: Any = header
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.1:
                break
            place = place[key]
        if rng.random() < 0.2 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = rng.choice(values)

    refused = 0
    for _ in range(500):
        path.write_bytes(original)
        rewrite(path, change)
        try:
            found = weights._from_file(PackedFile.open(path), program())
        except FormatError:
            refused += 1
            continue
        for matrix in found.matrices.values():
            assert (matrix.n, matrix.k, matrix.experts) == (50, 48, 1)
            matrix.native()
        assert found.vectors["norm.weight"].shape == (48,)
    assert refused > 300


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_a_file_that_others_could_have_written_is_not_used(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = packed_file(tmp_path)
    finally:
        os.umask(before)
    assert not path.stat().st_mode & 0o022
    path.chmod(0o664)
    source = Source()
    weights.pack(POOL, program(), source, tmp_path)
    settle()
    assert source.reads == 3
    if os.geteuid() == 0:
        (path,) = tmp_path.glob("*.packed")
        os.chown(path, 12345, -1)
        with pytest.raises(FormatError, match="belongs to another user"):
            PackedFile.open(path)


def test_a_program_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    """The native code's own look: what Python gives it may be wrong too."""
    packed_weights = weights.pack(POOL, program(), Source(), None)
    plan = ExecutionPlan()
    for name, message in (("head.weight", "another shape"), ("norm.weight", "another length")):
        other = weights.CpuWeights(dict(packed_weights.matrices), dict(packed_weights.vectors), 1)
        if name == "head.weight":
            other.matrices[name] = pack_matrix(POOL, dense(name, np.zeros((50, 64), np.float32)))
        else:
            other.vectors[name] = np.zeros(32, np.float32)
        with pytest.raises(ValueError, match=message):
            CpuBackend().compile(program(), other, plan, "cpu")


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
