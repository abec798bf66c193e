"""Attention of the CPU over more than one segment: no company changes a bit, and it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from sartor.backends.base import Executable
from sartor.backends.cpu import _native
from sartor.backends.registry import load_backend
from sartor.errors import UnsupportedError
from sartor.graph import SAMPLING_ROW, Batch, Builder, Program, Ragged
from sartor.ops import tolerances
from sartor.ops.weights import Weight, dense
from sartor.plan import ExecutionPlan

VOCAB, WIDTH, LENGTH = 61, 48, 600  # 512 positions are a segment
POISON = VOCAB - 1  # a token whose keys and values are not finite


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    block_size: int = 32


CASES = (
    Case(9, 3, 64),
    Case(6, 1, 128, block_size=16),
    Case(7, 1, 80, softcap=3.0),
    Case(8, 1, 72, window=530, sinks=True),
    Case(2, 2, 96, window=40, block_size=64),
    Case(12, 2, 33, sinks=True),
    Case(2, 2, 256, window=300, block_size=128),
)
EXACT = ("fp16", "fp32")  # states whose products are of float32


def _program(case: Case) -> Program:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
    y = b.attention(
        b.linear(x, "q", case.heads * case.head_dim),
        b.linear(x, "k", case.kv_heads * case.head_dim),
        b.linear(x, "v", case.kv_heads * case.head_dim),
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        scale=0.1,
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        name="op",
    )
    return b.finish(b.linear(b.gather_rows(y, b.output_rows), "head", VOCAB))


class _Weights:
    """Few and simple values: keys, values and queries are exact in any order of summing."""

    def __init__(self, program: Program) -> None:
        rng = np.random.default_rng(3)
        self._values = {}
        for spec in program.weights:
            values = rng.standard_normal(spec.shape).astype(np.float32)
            if spec.name == "embed.weight":
                values = (np.rint(values * 16) / 16).astype(np.float32)
                values[POISON] = np.inf
            elif spec.name != "op.sinks":
                values = (np.rint(values / 3).clip(-1, 1) / 2).astype(np.float32)
            self._values[spec.name] = values

    def weight(self, name: str) -> Weight:
        return dense(name, self._values[name])

    def identity(self) -> str:
        return "attention"


def _executable(case: Case, backend: str, **plan: object) -> Executable:
    chosen = load_backend(backend)
    device = chosen.devices()[0].name
    full = ExecutionPlan(
        backend=backend, device=device, block_size=case.block_size, activation="fp32"
    ).replace(**plan)
    program = _program(case)
    weights = chosen.pack(program, _Weights(program), full, None)
    executable = chosen.compile(program, weights, full, device, ("op",))
    executable.allocate_state([3 * (-(-LENGTH // case.block_size))])
    return executable


def _step(
    executable: Executable, case: Case, parts: Sequence[tuple[np.ndarray, int, int]]
) -> list[np.ndarray]:
    """Attention of (new tokens, tokens before, number of the sequence)."""
    tokens = np.concatenate([new for new, _, _ in parts]).astype(np.int32)
    starts = np.cumsum([0, *(len(new) for new, _, _ in parts)]).astype(np.int32)
    blocks = -(-LENGTH // case.block_size)
    # Blocks of sequences lie among each other, and not in order.
    table = np.array([np.arange(blocks)[::-1] * 3 + n for _, _, n in parts], np.int32)
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int32))
    batch = Batch(
        tokens=tokens,
        positions=np.concatenate([np.arange(c, c + len(n), dtype=np.int32) for n, c, _ in parts]),
        starts=starts,
        contexts=np.array([c for _, c, _ in parts], np.int32),
        block_tables=tuple(table for _ in executable.program.groups()),
        rope_lengths=np.full(len(parts), LENGTH, np.int32),
        output_rows=np.array([len(tokens) - 1], np.int32),
        sampling=np.zeros(1, SAMPLING_ROW),
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
        taps=("op",),
    )
    rows = executable.collect(executable.submit(batch)).taps["op"]
    return [np.array(rows[a:b]) for a, b in pairwise(starts)]


def _tokens(sequence: int) -> np.ndarray:
    return np.random.default_rng(sequence).integers(0, POISON, LENGTH)


def _run(
    case: Case, backend: str, steps: Sequence[Sequence[tuple[int, int]]], **plan: object
) -> np.ndarray:
    """Rows of sequence 0; a step lists (sequence, new tokens of it)."""
    executable = _executable(case, backend, **plan)
    done: dict[int, int] = {}
    rows = []
    for step in steps:
        parts = []
        for sequence, count in step:
            at = done.get(sequence, 0)
            parts.append((_tokens(sequence)[at : at + count], at, sequence))
            done[sequence] = at + count
        for (_, _, sequence), found in zip(parts, _step(executable, case, parts), strict=True):
            if sequence == 0:
                rows.append(found)
    return np.concatenate(rows)


WHOLE = [[(0, LENGTH)]]
CHUNKS = [[(0, 37)], [(0, 1)], [(0, 470)], *[[(0, 1)]] * 6, [(0, 85)], [(0, 1)]]
COMPANY = [[(1, 70), (0, 505)], [(0, 1), (2, 20), (1, 1)], *[[(1, 1), (0, 1)]] * 11, [(0, 83)]]


@cache
def _reference(case: Case, kv: str) -> np.ndarray:
    return _run(case, "reference", WHOLE, kv=kv)


@pytest.mark.parametrize("isa", _native.usable_paths())
@pytest.mark.parametrize(
    ("case", "kv"),
    [
        *((case, kv) for case in CASES for kv in ("bf16", "int8")),
        *((CASES[n], kv) for n in (3, 5) for kv in EXACT),
    ],
    ids=str,
)
def test_chunks_company_and_threads_change_no_bit(case: Case, kv: str, isa: str) -> None:
    whole = _run(case, "cpu", WHOLE, threads=1, kv=kv, isa=isa)
    for steps, threads in ((CHUNKS, 1), (CHUNKS, 3), (COMPANY, 2), (WHOLE, 8)):
        found = _run(case, "cpu", steps, threads=threads, kv=kv, isa=isa)
        np.testing.assert_array_equal(found, whole, err_msg=f"{steps} {threads}")
    wanted = _reference(case, kv)
    tolerance = tolerances.ATTENTION_OVER[kv]
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("isa", _native.usable_paths())
@pytest.mark.parametrize("kv", ["bf16", "fp16", "fp32", "int8"])
def test_what_was_left_in_a_block_does_not_matter(kv: str, isa: str) -> None:
    case = CASES[2]
    fresh = _run(case, "cpu", [[(0, 45)]], kv=kv, isa=isa)
    executable = _executable(case, "cpu", kv=kv, isa=isa)
    (bad,) = _step(executable, case, [(np.full(96, POISON), 0, 0)])
    assert not np.isfinite(bad).any()
    first, rest = (
        _step(executable, case, [(_tokens(0)[a:b], a, 0)])[0] for a, b in ((0, 39), (39, 45))
    )
    np.testing.assert_array_equal(np.concatenate([first, rest]), fresh)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_an_int8_state_takes_a_byte_a_number_and_the_scales(block_size: int) -> None:
    case = Case(9, 3, 64, block_size=block_size)
    found = _executable(case, "cpu", kv="int8")
    assert found.block_bytes(0) == block_size * 2 * 3 * (64 + 2)
    assert found.block_bytes(0) == _executable(case, "reference", kv="int8").block_bytes(0)
    assert found.memory().state == 3 * -(-LENGTH // block_size) * found.block_bytes(0)


def test_heads_that_int8_sums_would_not_hold_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"up to 512 features .* has 528; choose bf16"):
        _executable(Case(1, 1, 528), "cpu", kv="int8")


@pytest.mark.parametrize("isa", _native.usable_paths())
@pytest.mark.parametrize("window", [0, 25])
def test_attention_both_ways_over_segments(isa: str, window: int) -> None:
    def program() -> Program:
        b = Builder()
        x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
        y = b.self_attention(
            *(b.linear(x, name, heads * 24) for name, heads in (("q", 6), ("k", 2), ("v", 2))),
            heads=6,
            kv_heads=2,
            head_dim=24,
            scale=0.1,
            window=window,
            name="op",
        )
        return b.finish_encoder(b.pool(y, "mean", "pooled"), LENGTH)

    def run(backend: str, lengths: Sequence[int], **plan: object) -> np.ndarray:
        chosen = load_backend(backend)
        device = chosen.devices()[0].name
        full = ExecutionPlan(backend=backend, device=device, activation="fp32").replace(**plan)
        weights = chosen.pack(program(), _Weights(program()), full, None)
        executable = chosen.compile(program(), weights, full, device, ("op",))
        executable.allocate_state([])
        parts = [(_tokens(n)[:length], 0, n) for n, length in enumerate(lengths)]
        return _step(executable, CASES[0], parts)[0]

    alone = run("cpu", [LENGTH], isa=isa, threads=1)
    for lengths, threads in (([LENGTH], 3), ([LENGTH, 75], 2)):
        together = run("cpu", lengths, isa=isa, threads=threads)
        np.testing.assert_array_equal(together, alone)
    wanted = run("reference", [LENGTH])
    assert np.abs(alone - wanted).max() <= tolerances.ATTENTION * np.abs(wanted).max()
