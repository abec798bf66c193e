"""Engines on small programs, and what tests do with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest

from sartor.backends.null.backend import null_program
from sartor.backends.registry import load_backend
from sartor.engine.embedding import EmbeddingSegment
from sartor.engine.engine import Engine
from sartor.engine.request import Chunk, Request
from sartor.graph import Builder, Program, SamplingParams, Value
from sartor.models.registry import TensorPlace
from sartor.ops import RopeSpec, Weight, dense, quantize_affine
from sartor.plan import ExecutionPlan
from sartor.text.tokenizer import Tokenizer

VOCAB = 256
EOS = 255
HIDDEN = 64
BACKENDS = ["null", "reference", "cpu", "cpu-int8", "cpu-int8-kv"]
"""cpu-int8 is the CPU as it runs real checkpoints: 4-bit weights, int8 activations, bf16 state; with
-kv the state is int8 too."""
Layer = int | Literal["recurrent"]
"""A layer of a test's program: attention with a window (0 sees everything), or a recurrence."""


class _Bytes:
    def encode(self, text: str, parse_special: bool) -> list[int]:
        return list(text.encode())


def byte_tokenizer(bos: int | None = None) -> Tokenizer:
    """Token i is byte i; 255, which UTF-8 never uses, ends a text."""
    return Tokenizer(
        encoder=_Bytes(),
        bytes_of=lambda i: bytes([i]),
        vocab_size=VOCAB,
        special_ids=frozenset({EOS} if bos is None else {EOS, bos}),
        bos_id=bos,
        eos_ids=frozenset({EOS}),
        prefix=[] if bos is None else [bos],
        suffix=[],
        strips_leading_space=False,
    )


def llama_program(layers: Sequence[Layer] = (0, 0)) -> Program:
    """A tiny Llama: 4 query heads on 2 key heads, some layers recurrent (gated delta rule)."""
    builder = Builder()
    hidden, heads, kv_heads, dim = HIDDEN, 4, 2, 16
    rope = RopeSpec(dim)
    x = builder.embedding(builder.token_ids, "embed", VOCAB, hidden)
    x = builder.embedding_segments(x)
    for index, window in enumerate(layers):
        with builder.scope(f"layers.{index}"):
            h = builder.rms_norm(x, "input_norm", eps=1e-5)
            if window == "recurrent":
                x = builder.add(x, _recurrence(builder, h), "add_recurrence")
                continue
            q = builder.linear(h, "q", heads * dim)
            k = builder.linear(h, "k", kv_heads * dim)
            v = builder.linear(h, "v", kv_heads * dim)
            a = builder.attention(
                builder.rope(q, rope, dim, "q_rope"),
                builder.rope(k, rope, dim, "k_rope"),
                v,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=dim,
                scale=dim**-0.5,
                window=window,
            )
            x = builder.add(x, builder.linear(a, "o", hidden), "add_attention")
            h = builder.rms_norm(x, "ffn_norm", eps=1e-5)
            gate, up = builder.linear(h, "gate", 96), builder.linear(h, "up", 96)
            h = builder.gated_activation(gate, up, "silu")
            x = builder.add(x, builder.linear(h, "down", hidden), "add_ffn")
    x = builder.rms_norm(x, "norm", eps=1e-5)
    return builder.finish(
        builder.linear(builder.gather_rows(x, builder.output_rows), "head", VOCAB)
    )


def _recurrence(b: Builder, h: Value) -> Value:
    h = b.short_conv(h, "conv", 4)
    q, k = (b.l2_norm(b.linear(h, name, 32), 16, 1e-6, f"{name}_norm") for name in "qk")
    decay = b.activation(b.linear(h, "decay", 4), "sigmoid", "decay_gate")
    beta = b.activation(b.linear(h, "beta", 4), "sigmoid", "beta_gate")
    out = b.recurrent_scan(
        q, k, b.linear(h, "v", 64), decay, beta, heads=4, key_heads=2, scale=0.25, delta=True
    )
    return b.linear(out, "o", HIDDEN)


class RandomWeights:
    """Random weights, the same for every program that names them alike."""

    def __init__(self, program: Program, quantized: bool = False) -> None:
        self._quantized = quantized
        self._shapes = {spec.name: spec.shape for spec in program.weights}

    def weight(self, name: str) -> Weight:
        shape = self._shapes[name]
        rng = np.random.default_rng(sum(name.encode()))
        scale = 0.5 if len(shape) == 1 else 3 * shape[-1] ** -0.5
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        if self._quantized and len(shape) == 2 and not shape[1] % 32:  # no convolutions
            return quantize_affine(name, values, bits=4)
        return dense(name, values)

    def place(self, name: str) -> TensorPlace:
        return TensorPlace(name)

    hf_place = place

    def identity(self) -> str:
        return f"random {self._quantized}"


def counts(layers: Sequence[Layer], blocks: int, states: int) -> list[int]:
    """Blocks of each state group of :func:`layers_program`, on any backend."""
    groups = layers_program("null", layers).groups()
    return [states if group.kind == "recurrent" else blocks for group in groups]


def layers_program(backend: str, layers: Sequence[Layer]) -> Program:
    if backend != "null":
        return llama_program(layers)
    windows = [layer for layer in layers if layer != "recurrent"]
    return null_program(VOCAB, windows, recurrent=len(layers) - len(windows))


def make_engine(
    backend: str = "null",
    *,
    windows: Sequence[Layer] = (0,),
    blocks: int | Sequence[int] = 64,
    context: int = 512,
    tokenizer: Tokenizer | None = None,
    program: Program | None = None,
    device: str = "",
    clock: Callable[[], float] = lambda: 0.0,
    **plan_fields: object,
) -> Engine:
    """By a clock that stands still the schedule is the same however fast the machine is."""
    backend, _, quantized = backend.partition("-")
    if backend == "cpu" and importlib.util.find_spec("sartor.backends.cpu._native") is None:
        pytest.skip("the native CPU backend is not built")
    if program is None:
        program = layers_program(backend, windows)
    fields: dict[str, object] = {"block_size": 16}
    if not quantized:
        fields |= {"activation": "fp32", "kv": "fp32"}
    elif quantized == "int8-kv":
        fields["kv"] = "int8"
    fields |= plan_fields
    plan = ExecutionPlan(backend=backend).replace(**fields)
    chip = load_backend(backend)
    weights = chip.pack(program, RandomWeights(program, bool(quantized)), plan, None)
    executable = chip.compile(program, weights, plan, device or chip.devices()[0].name)
    counts = [blocks] * len(program.groups()) if isinstance(blocks, int) else blocks
    return Engine(
        executable,
        tokenizer or byte_tokenizer(),
        capabilities=chip.capabilities(executable.plan.device),
        context_length=context,
        model_key="test",
        state_blocks=counts,
        clock=clock,
    )


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, EOS, length).tolist())


def request(
    name: str,
    ids: Sequence[int],
    *,
    seed: int = 7,
    emitted: Sequence[Sequence[int]] = (),
    salt: str = "",
    priority: int = 0,
    want_text: bool = True,
    adapter: str = "",
    segments: Sequence[EmbeddingSegment] = (),
    **params: object,
) -> Request:
    fields: dict[str, object] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
    return Request(
        name,
        tuple(ids),
        SamplingParams(**fields),  # type: ignore[arg-type]
        seed,
        emitted=tuple(map(tuple, emitted)),
        salt=salt,
        priority=priority,
        want_text=want_text,
        adapter=adapter,
        segments=tuple(segments),
    )


Answers = dict[tuple[str, int], list[Chunk]]


def run(engine: Engine, *requests: Request, check: bool = True) -> Answers:
    """Runs to the end, with the integrity check after every step; chunks by (id, choice)."""
    for r in requests:
        engine.add(r)
    answers: Answers = {}
    while engine.has_work:
        for chunk in engine.step():
            answers.setdefault((chunk.request_id, chunk.choice), []).append(chunk)
        if check:
            engine.check()
    for chunks in answers.values():
        assert chunks[-1].finish_reason is not None
        assert all(c.finish_reason is None for c in chunks[:-1])
    assert not any(engine.blocks_held())
    return answers


def tokens(chunks: Sequence[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def logprobs(chunks: Sequence[Chunk]) -> list[float]:
    return [entry.logprob for chunk in chunks for entry in chunk.logprobs]
