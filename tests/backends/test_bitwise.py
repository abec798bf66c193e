"""One program of every stateful kind of layer: chunking, company and threads change no bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sartor.backends.registry import load_backend
from sartor.graph import Batch, Builder, Program, Ragged, SamplingParams
from sartor.ops.weights import Weight, dense, quantize_affine
from sartor.plan import ExecutionPlan

FLOATS = ("scale", "offset")
VOCAB, HIDDEN, BLOCK, LENGTH = 50, 64, 16, 40
TOKENS = np.random.default_rng(1).integers(0, VOCAB, LENGTH).astype(np.int32)


def _program() -> Program:
    b = Builder()
    x = b.embedding_segments(b.embedding(b.token_ids, "embed", VOCAB, HIDDEN))
    x = b.add(x, _recurrent(b, b.rms_norm(x, "norm1", eps=1e-5)), "sum1")
    x = b.add(x, _latent(b, b.rms_norm(x, "norm2", eps=1e-5)), "sum2")
    x = b.add(x, _window(b, b.rms_norm(x, "norm3", eps=1e-5)), "sum3")
    x = b.add(x, _experts(b, b.rms_norm(x, "norm4", eps=1e-5)), "sum4")
    x = b.rms_norm(b.gather_rows(x, b.output_rows), "norm", eps=1e-5)
    return b.finish(b.linear(x, "head", VOCAB))


def _recurrent(b: Builder, x: object) -> object:
    q, k = (b.l2_norm(b.linear(x, n, 32), 16, 1e-6, f"{n}_norm") for n in ("rq", "rk"))
    v = b.activation(b.short_conv(b.linear(x, "rv", 4 * 20), "conv", 4, bias=True), "silu")
    decay = b.activation(b.linear(x, "decay", 4), "sigmoid", "forget")
    beta = b.activation(b.linear(x, "beta", 4), "sigmoid", "write")
    y = b.recurrent_scan(q, k, v, decay, beta, heads=4, key_heads=2, scale=0.3, delta=True)
    return b.linear(y, "ro", HIDDEN)


def _latent(b: Builder, x: object) -> object:
    heads, rank, rope = 4, 32, 8
    q = b.linear(x, "lq", heads * (16 + rope))
    plain, turned = b.split(q, (16, rope), "lq_parts", runs=heads)
    q = b.concat([b.head_linear(plain, "absorb", heads, rank), turned], "lq_whole", runs=heads)
    y = b.latent_attention(
        q, b.linear(x, "lc", rank), b.linear(x, "lr", rope), heads=heads, scale=0.2, name="latent"
    )
    return b.linear(b.head_linear(y, "unfold", heads, 16), "lo", HIDDEN)


def _window(b: Builder, x: object) -> object:
    q, k, v = (b.linear(x, f"w{n}", 64 if n == "q" else 32) for n in "qkv")
    y = b.attention(
        q, k, v, heads=4, kv_heads=2, head_dim=16, scale=0.25, window=9, sinks=True, name="near"
    )
    return b.linear(y, "wo", HIDDEN)


def _experts(b: Builder, x: object) -> object:
    chosen, weights = b.route_experts(b.linear(x, "router", 6), top_k=2)
    gate = b.grouped_linear(x, chosen, "gate", 6, HIDDEN, 48, bias=True)
    up = b.grouped_linear(x, chosen, "up", 6, HIDDEN, 48, bias=True)
    inner = b.gated_activation(gate, up, "clamped_silu", "inner")
    return b.combine_experts(b.grouped_linear(inner, chosen, "down", 6, 48, HIDDEN), weights)


class _Weights:
    """Random, 4 bits where a matrix has groups of 16."""

    def __init__(self, program: Program) -> None:
        rng = np.random.default_rng(2)
        self._weights: dict[str, Weight] = {}
        for spec in program.weights:
            values = rng.standard_normal(spec.shape).astype(np.float32)
            if len(spec.shape) < 2 or spec.name.startswith("conv") or "bias" in spec.name:
                self._weights[spec.name] = dense(spec.name, values)
                continue
            flat = (values / spec.shape[-1] ** 0.5).reshape(-1, spec.shape[-1])
            group = 32 if spec.shape[-1] % 32 == 0 else 16
            bits = quantize_affine(spec.name, flat, 4, group, offset=True)
            # What fp16 holds exactly: packing then changes nothing.
            exact = {f: getattr(bits, f).astype(np.float16).astype(np.float32) for f in FLOATS}
            bits = dataclasses.replace(bits, **exact)
            self._weights[spec.name] = bits.reshape(*spec.shape[:-1])

    def weight(self, name: str) -> Weight:
        return self._weights[name]

    def identity(self) -> str:
        return "bitwise"


def _batch(program: Program, parts: list[tuple[np.ndarray, int, int]]) -> Batch:
    """A step over (new tokens, tokens computed before, number of the sequence)."""
    tokens = np.concatenate([part for part, _, _ in parts])
    starts = np.cumsum([0, *(len(part) for part, _, _ in parts)]).astype(np.int32)
    row = SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=0)
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(len(tokens) + 1, np.int32))
    tables = np.array([[3 * n + 2, 3 * n, 3 * n + 1] for _, _, n in parts], np.int32)
    return Batch(
        tokens=tokens,
        positions=np.concatenate(
            [np.arange(c, c + len(part), dtype=np.int32) for part, c, _ in parts]
        ),
        starts=starts,
        contexts=np.array([c for _, c, _ in parts], np.int32),
        block_tables=tuple(tables for _ in program.groups()),
        rope_lengths=np.full(len(parts), LENGTH, np.int32),
        output_rows=np.arange(len(tokens), dtype=np.int32),
        sampling=np.repeat(row, len(tokens)),
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
        taps=("head",),
    )


def _run(backend: str, steps: list[list[tuple[int, int]]], **plan: object) -> np.ndarray:
    """Logits of sequence 0; a step lists (sequence, new tokens of it)."""
    program = _program()
    chosen = load_backend(backend)
    device = chosen.devices()[0].name
    full = ExecutionPlan(backend=backend, device=device, block_size=BLOCK).replace(**plan)
    weights = chosen.pack(program, _Weights(program), full, None)
    executable = chosen.compile(program, weights, full, device, ("head",))
    executable.allocate_state([9] * len(program.groups()))
    done: dict[int, int] = {}
    rows = []
    for step in steps:
        parts = []
        for sequence, count in step:
            at = done.get(sequence, 0)
            parts.append((np.roll(TOKENS, sequence)[at : at + count], at, sequence))
            done[sequence] = at + count
        batch = _batch(program, parts)
        logits = executable.collect(executable.submit(batch)).taps["head"]
        for index, (_, _, sequence) in enumerate(parts):
            if sequence == 0:
                rows.append(np.array(logits[batch.starts[index] : batch.starts[index + 1]]))
    executable.close()
    return np.concatenate(rows)


WHOLE = [[(0, LENGTH)]]
CHUNKS = [[(0, 7)], [(0, 9)], [(0, 1)], [(0, 15)], *[[(0, 1)]] * 8]
COMPANY = [[(1, 30), (0, 20)], [(0, 1), (2, 40)], [(1, 1), (0, 19)]]


@pytest.mark.parametrize("activation", ["int8", "fp32"])
@pytest.mark.parametrize("kv", ["bf16", "fp32", "int8"])
def test_chunking_company_and_threads_change_no_bit(activation: str, kv: str) -> None:
    plan = {"activation": activation, "kv": kv}
    whole = _run("cpu", WHOLE, threads=1, **plan)
    for steps in (CHUNKS, COMPANY):
        for threads in (1, 2, 3):
            assert np.array_equal(_run("cpu", steps, threads=threads, **plan), whole)


def test_cpu_agrees_with_the_reference() -> None:
    plan = {"activation": "fp32", "kv": "fp32"}
    wanted = _run("reference", WHOLE, **plan)
    for steps in (WHOLE, CHUNKS, COMPANY):
        found = _run("cpu", steps, **plan)
        assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
        again = _run("reference", steps, **plan)
        np.testing.assert_allclose(again, wanted, atol=1e-4 * np.abs(wanted).max())
