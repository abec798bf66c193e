"""The builder, programs as JSON, and the passes: a fused program means the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sartor.backends.registry import load_backend
from sartor.errors import FormatError, UsageError
from sartor.graph import Batch, Builder, Program, Ragged, SamplingParams, Value
from sartor.graph.passes import (
    fuse,
    head_weight,
    last_uses,
    logits_linear,
    operator_counts,
    untie_head,
)
from sartor.ops import FUSED_OPERATORS, RopeSpec, Weight, dense
from sartor.plan import ExecutionPlan

HIDDEN, HEADS, KV_HEADS, DIM, VOCAB = 16, 4, 2, 6, 11
ALL = frozenset(FUSED_OPERATORS)


def _layer(b: Builder, x: Value, window: int) -> Value:
    inner = b.rms_norm(x, "norm1", eps=1e-5)
    q = b.linear(inner, "q", HEADS * DIM, bias=True, axes=("heads", "hidden"))
    k = b.linear(inner, "k", KV_HEADS * DIM, axes=("kv_heads", "hidden"))
    v = b.linear(inner, "v", KV_HEADS * DIM, bias=True, axes=("kv_heads", "hidden"))
    q = b.rope(b.rms_norm(q, "q_norm", eps=1e-5, run=DIM), RopeSpec(DIM), DIM, "q_rope")
    k = b.rope(k, RopeSpec(DIM), DIM, "k_rope")
    out = b.attention(
        q,
        k,
        v,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=0.4,
        window=window,
        sinks=bool(window),
    )
    x = b.add(x, b.linear(out, "o", HIDDEN), "add1")
    inner = b.rms_norm(x, "norm2", eps=1e-5)
    gate = b.linear(inner, "gate", 24)
    up = b.linear(inner, "up", 24)
    return b.add(x, b.linear(b.gated_activation(gate, up, "silu"), "down", HIDDEN), "add2")


def _program() -> Program:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, HIDDEN)
    for index, window in enumerate((0, 3)):
        with b.scope(f"layers.{index}"):
            x = _layer(b, x, window)
    x = b.rms_norm(b.gather_rows(x, b.output_rows), "norm", eps=1e-5)
    return b.finish(b.softcap(b.linear(x, "head", VOCAB, weight="embed.weight"), 5.0))


class _Source:
    """Random weights by name."""

    def __init__(self, program: Program) -> None:
        rng = np.random.default_rng(2)
        self._weights = {
            spec.name: dense(spec.name, rng.standard_normal(spec.shape).astype(np.float32))
            for spec in program.weights
        }

    def weight(self, name: str) -> Weight:
        return self._weights[name]

    def identity(self) -> str:
        return "random"


def _run(program: Program, taps: tuple[str, ...] = ("softcap",)) -> dict[str, np.ndarray]:
    backend = load_backend("reference")
    plan = ExecutionPlan(backend="reference", activation="fp32", kv="fp32", block_size=16)
    weights = backend.pack(program, _Source(program), plan, None)
    executable = backend.compile(program, weights, plan, "reference", taps)
    executable.allocate_state([2] * len(program.groups()))
    tokens = np.arange(9, dtype=np.int32)
    rows = np.array([8, 2], np.int32)
    empty = [np.zeros(0, np.int32)] * 2
    row = SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=9)
    batch = Batch(
        tokens=tokens,
        positions=np.arange(9, dtype=np.int32),
        starts=np.array([0, 9], np.int32),
        contexts=np.zeros(1, np.int32),
        block_tables=tuple(np.array([[1]], np.int32) for _ in program.groups()),
        rope_lengths=np.array([9], np.int32),
        output_rows=rows,
        sampling=np.repeat(row, 2),
        history=Ragged.of(empty, np.int32),
        bias_tokens=Ragged.of(empty, np.int32),
        bias_values=Ragged.of(empty, np.float32),
        taps=taps,
    )
    output = executable.collect(executable.submit(batch))
    return {name: np.array(value) for name, value in output.taps.items()}


def test_fused_program_gives_equal_results() -> None:
    program = _program()
    fused = fuse(program, ALL)
    counts = operator_counts(fused)
    assert (counts["linear_group"], counts["add_rms_norm"]) == (4, 3)
    assert counts["linear"] == 2 * 2 + 1  # o and down of each layer, and the head
    assert np.array_equal(_run(program)["softcap"], _run(fused)["softcap"])


@pytest.mark.parametrize("wanted", [frozenset[str](), *({name} for name in FUSED_OPERATORS)])
def test_only_wanted_operators_are_used(wanted: frozenset[str]) -> None:
    program = _program()
    fused = fuse(program, frozenset(wanted))
    assert {node.op for node in fused.nodes} & ALL == set(wanted)
    assert np.array_equal(_run(program)["softcap"], _run(fused)["softcap"])


@pytest.mark.parametrize(
    "tap",
    ["layers.0.q", "layers.0.k", "layers.1.v", "layers.0.add1", "layers.1.norm2", "layers.0.up"],
)
def test_tapped_nodes_keep_their_own_result(tap: str) -> None:
    program = _program()
    fused = fuse(program, ALL, frozenset({tap}))
    assert fused.node(tap).op == program.node(tap).op
    assert np.array_equal(_run(program, (tap,))[tap], _run(fused, (tap,))[tap])


@pytest.mark.parametrize("wanted", [frozenset[str](), ALL])
def test_json_round_trip(wanted: frozenset[str]) -> None:
    program = fuse(_program(), wanted)
    again = Program.from_json(program.to_json())
    assert again == program
    assert np.array_equal(_run(again)["softcap"], _run(program)["softcap"])


def test_json_that_is_no_program() -> None:
    with pytest.raises(FormatError, match="not a serialised program"):
        Program.from_json(b"{}")
    fields = json.loads(_program().to_json())
    with pytest.raises(FormatError, match="version 99"):
        Program.from_json(json.dumps(fields | {"version": 99}).encode())


def test_values_are_assigned_once_and_before_use() -> None:
    for program in (_program(), fuse(_program(), ALL)):
        known = {value.id for value in program.values if value.source != "node"}
        for node in program.nodes:
            assert set(node.inputs) <= known
            assert not set(node.outputs) & known
            known |= set(node.outputs)
        uses = last_uses(program)
        assert all(uses[value] == len(program.nodes) for value in program.outputs.values())


def test_states_of_equal_windows_share_a_group() -> None:
    groups = _program().groups()
    assert [(group.window, group.states) for group in groups] == [(0, (0,)), (3, (1,))]
    state = _program().states[0]
    assert state.bytes_per_token("bf16") == KV_HEADS * 2 * DIM * 2
    assert state.bytes_per_token("int8") == KV_HEADS * 2 * (DIM + 2)  # a scale in fp16


def test_equal_ropes_are_kept_once() -> None:
    assert _program().ropes == (RopeSpec(DIM),)


def test_weights_have_names_and_axes() -> None:
    weights = {spec.name: spec for spec in _program().weights}
    assert weights["layers.1.q.weight"].shape == (HEADS * DIM, HIDDEN)
    assert weights["layers.1.q.weight"].axes == ("heads", "hidden")
    assert weights["layers.1.q.bias"].axes == ("heads",)
    assert weights["layers.1.attention.sinks"].shape == (HEADS,)
    assert "head.weight" not in weights


def test_errors_of_a_model_file() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, HIDDEN)
    with pytest.raises(UsageError, match=r"weight embed\.weight is declared twice"):
        b.embedding(b.token_ids, "embed", VOCAB, HIDDEN)
    b.scale(x, 2.0, "twice")
    with pytest.raises(UsageError, match="two nodes are named twice"):
        b.scale(x, 2.0, "twice")
    with pytest.raises(UsageError, match="do not fit"):
        b.add(x, b.linear(x, "narrow", 3))
    with pytest.raises(UsageError, match="gather the output rows"):
        b.finish(x)
    with pytest.raises(UsageError, match="pool the tokens"):
        b.finish_encoder(x, VOCAB)
    with pytest.raises(
        UsageError, match="score 'sparsemax' is unknown; known are softmax, sigmoid"
    ):
        b.route_experts(b.linear(x, "router", 4), top_k=2, score="sparsemax")
    b.short_conv(x, "conv", 4)
    with pytest.raises(UsageError, match="an encoder keeps no state"):
        b.finish_encoder(b.pool(x, "mean"), VOCAB)
    with pytest.raises(UsageError, match="kind 'sine' is unknown; known are silu"):
        b.activation(x, "sine")


def test_unknown_node_is_named() -> None:
    with pytest.raises(UsageError, match=r"no node 'layers\.9\.q'"):
        _program().node("layers.9.q")


def test_the_logits_linear_is_found_behind_a_softcap() -> None:
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", 32, 16)
    y = builder.gather_rows(builder.linear(x, "o", 16), builder.output_rows)
    program = builder.finish(builder.softcap(builder.linear(y, "head", 32), 30.0))
    assert program.node("head").outputs == (logits_linear(program),)


def test_an_untied_head_reads_a_weight_of_its_own() -> None:
    tied = _program()
    untied = untie_head(tied)
    before, after = head_weight(tied), head_weight(untied)
    assert before is not None
    assert after is not None
    assert (before.name, after.name) == ("embed.weight", "head.weight")
    assert (after.shape, after.axes) == (before.shape, before.axes)
    assert untied.size == tied.size + VOCAB * HIDDEN
    assert untied.values[after.value].id == after.value
    assert untied.node("embed") == tied.node("embed")
    assert untied.node("head").outputs == tied.node("head").outputs
    assert Program.from_json(untied.to_json()) == untied
    assert untie_head(untied) is untied


def test_states_of_every_kind_are_grouped_and_serialised() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, 8)
    x = b.short_conv(x, "conv", 4)
    gate = b.linear(x, "gate", 2)
    x = b.recurrent_scan(x, x, x, gate, gate, heads=2, key_heads=2, scale=1.0, delta=True)
    x = b.latent_attention(x, b.linear(x, "c", 6), b.linear(x, "r", 2), heads=1, scale=1.0)
    q = b.linear(x, "q", 8)
    x = b.attention(q, q, q, heads=2, kv_heads=2, head_dim=4, scale=1.0, name="full")
    x = b.attention(x, x, x, heads=2, kv_heads=2, head_dim=4, scale=1.0, window=3, name="near")
    program = b.finish(b.linear(b.gather_rows(x, b.output_rows), "head", VOCAB))
    groups = program.groups()
    assert [(g.kind, g.window, g.states) for g in groups] == [
        ("recurrent", 2, (0, 1)),
        ("paged", 0, (2, 3)),
        ("paged", 3, (4,)),
    ]
    assert [s.nbytes for s in program.states[:2]] == [3 * 8 * 4, 2 * 4 * 4 * 4]
    assert program.states[2].bytes_per_token("bf16") == 16
    # A latent stays in bf16 where keys and values are int8.
    assert program.states[2].bytes_per_token("int8") == 16
    assert Program.from_json(program.to_json()) == program


def test_an_encoder_samples_nothing() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, 8)
    x = b.add(x, b.embedding(b.positions, "place", 16, 8), "placed")
    program = b.finish_encoder(b.pool(x, "cls"), VOCAB)
    assert not program.samples
    assert program.outputs.keys() == {"embedding"}
    assert program.groups() == ()
    assert logits_linear(program) == -1
    assert head_weight(program) is None
