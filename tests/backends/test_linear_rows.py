"""A linear layer's row has the same bits alone and among any number of others, on every path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sartor.backends.cpu import _native
from sartor.backends.registry import load_backend
from sartor.graph import Batch, Builder, Program, Ragged, SamplingParams
from sartor.ops.functions import linear
from sartor.ops.weights import (
    AffineFormat,
    LookupFormat,
    Weight,
    dense,
    quantize_affine,
)
from sartor.plan import ExecutionPlan

INPUTS, OUTPUTS, ROWS = 672, 150, 70  # nearly three panels, a column block in part
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 23, 31, 33, 64, 67, 70)
RNG = np.random.default_rng(3)
VALUES = RNG.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def _exact(weight: Weight) -> Weight:
    """Scales and offsets that fp16 holds: packing changes nothing."""

    def half(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else x.astype(np.float16).astype(np.float32)

    return Weight(weight.name, weight.format, weight.data, half(weight.scale), half(weight.offset))


def _affine(bits: int, group: int, offset: bool) -> Weight:
    return _exact(quantize_affine("w", VALUES, bits, group, offset=offset))


def _zero_and_offset() -> Weight:
    plain = _affine(5, 32, True)
    form = AffineFormat(5, 32, zero=7, offset=True)
    scale, offset = (np.round(x * 64) / 64 for x in (plain.scale, plain.offset))
    return Weight("w", form, plain.data, scale, offset)  # their sums are exact too


def _lookup() -> Weight:
    codes = RNG.integers(0, 16, VALUES.shape).astype(np.uint8)
    scale = RNG.uniform(0.5, 1.0, (OUTPUTS, INPUTS // 32)).astype(np.float16).astype(np.float32)
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return Weight("w", LookupFormat(table, 32), codes, scale)


FORMATS: dict[str, Callable[[], Weight]] = {
    **{f"{b}g32": lambda b=b: _affine(b, 32, False) for b in range(2, 9)},
    **{f"{b}g32o": lambda b=b: _affine(b, 32, True) for b in (2, 4, 8)},
    **{f"{b}g16": lambda b=b: _affine(b, 16, False) for b in (3, 6)},
    "2g16o": lambda: _affine(2, 16, True),
    "4g96": lambda: _affine(4, 96, False),
    "4 a channel": lambda: _affine(4, INPUTS, False),
    "zero and offset": _zero_and_offset,
    "lookup": _lookup,
}


class _Source:
    def __init__(self, embed: Weight, weight: Weight) -> None:
        self._weights = {"embed.weight": embed, "linear.weight": weight}

    def weight(self, name: str) -> Weight:
        return self._weights[name]

    def identity(self) -> str:
        return "rows"


def _program() -> Program:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", ROWS, INPUTS)
    return b.finish(b.gather_rows(b.linear(x, "linear", OUTPUTS), b.output_rows))


def _batch(count: int) -> Batch:
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int32))
    return Batch(
        tokens=np.arange(ROWS - count, ROWS, dtype=np.int32),
        positions=np.arange(count, dtype=np.int32),
        starts=np.array([0, count], np.int32),
        contexts=np.zeros(1, np.int32),
        block_tables=(),
        rope_lengths=np.full(1, count, np.int32),
        output_rows=np.zeros(1, np.int32),
        sampling=SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=0)[None],
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
        taps=("linear",),
    )


@pytest.mark.parametrize("isa", _native.usable_paths())
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str, isa: str) -> None:
    program, weight = _program(), FORMATS[name]()
    rows = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    rows[::3, 40:45] *= 40  # outliers, which keep 16 bits, in some rows only
    rows[5, 64:320] = 0
    backend = load_backend("cpu")
    plan = ExecutionPlan(backend="cpu", device="cpu", isa=isa, threads=2)
    packed = backend.pack(program, _Source(dense("embed", rows), weight), plan, None)
    executable = backend.compile(program, packed, plan, "cpu", ("linear",))
    executable.allocate_state([])
    results = {c: executable.collect(executable.submit(_batch(c))).taps["linear"] for c in COUNTS}
    executable.close()
    whole = results[ROWS]
    wanted = linear(rows, weight, activation="int8")
    np.testing.assert_allclose(whole, wanted, atol=2e-4 * np.abs(wanted).max())
    for count, result in results.items():
        assert np.array_equal(result, whole[ROWS - count :]), f"{count} rows"
