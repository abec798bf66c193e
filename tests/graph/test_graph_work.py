"""What a step asks of a machine, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sartor.graph import Builder, Program, ProgramWork, StepShape
from sartor.hardware import Work

VOCAB, WIDTH = 32, 8
STEP = StepShape(lengths=(3, 1), contexts=(0, 9), outputs=2)  # a prompt of 3, and one that decodes


def counted(program: Program, **arithmetic: Any) -> ProgramWork:
    """Every weight takes 100 bytes."""
    sizes = {spec.name: 100 for spec in program.weights}
    return ProgramWork(program, sizes, "bf16", arithmetic)


def one(build: Any, step: StepShape = STEP, **arithmetic: Any) -> Work:
    """The work of the node ``op``."""
    b = Builder()
    x = build(b, b.embedding(b.token_ids, "embed", VOCAB, WIDTH))
    head = b.linear(b.gather_rows(x, b.output_rows), "head", VOCAB)
    program = b.finish(head)
    return counted(program, **arithmetic).node(program.node("op"), step)


def attention(b: Builder, x: Any, window: int = 0) -> Any:
    k, v = b.linear(x, "k", 4), b.linear(x, "v", 6)
    return b.attention(
        x, k, v, heads=4, kv_heads=2, head_dim=2, value_dim=3, scale=1.0, window=window, name="op"
    )


def test_a_whole_program_is_exact() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
    x = b.rms_norm(b.add(x, b.linear(x, "up", WIDTH, bias=True)), "norm", eps=1e-6)
    x = b.gather_rows(x, b.output_rows)
    work = counted(b.finish(b.linear(x, "head", VOCAB)), up="int8").step(STEP)
    # 4 of 32 rows of the table; matrix and bias; the norm; the head.
    assert work.bytes == 100 * 4 / 32 + 200 + 100 + 100
    assert work.operations == {"int8": 2 * 4 * 8 * 8, "fp32": 2 * 2 * 8 * 32}


def test_attention_sees_the_past_and_itself() -> None:
    work = one(attention)
    keys = (1 + 2 + 3) + 10
    assert work.operations == {"fp32": 2 * keys * 4 * (2 + 3)}
    assert work.bytes == (3 + 10) * 2 * (2 + 3) * 2


def test_a_window_bounds_what_is_seen() -> None:
    work = one(lambda b, x: attention(b, x, window=2))
    assert work.operations == {"fp32": 2 * ((1 + 2 + 2) + 2) * 4 * 5}
    # Positions 0 to 2 of the one, 8 and 9 of the other.
    assert work.bytes == (3 + 2) * 2 * 5 * 2


@pytest.mark.parametrize("window", [0, 1, 3, 7, 100])
@pytest.mark.parametrize(("context", "length"), [(0, 1), (0, 12), (2, 5), (50, 9)])
def test_windows_agree_with_counting(window: int, context: int, length: int) -> None:
    step = StepShape((length,), (context,), 1)
    work = one(lambda b, x: attention(b, x, window), step)
    seen = [
        range(max(0, p + 1 - (window or p + 1)), p + 1) for p in range(context, context + length)
    ]
    assert work.operations["fp32"] == 2 * sum(map(len, seen)) * 4 * 5
    assert work.bytes == len(set().union(*seen)) * 2 * 5 * 2


def test_what_is_written_to_the_state() -> None:
    b = Builder()
    x = attention(b, b.embedding(b.token_ids, "embed", VOCAB, WIDTH))
    program = b.finish(b.linear(b.gather_rows(x, b.output_rows), "head", VOCAB))
    work = counted(program).node(program.node("op.kv_write"), STEP)
    assert work == Work(4 * 2 * 5 * 2)


def test_latent_attention() -> None:
    work = one(
        lambda b, x: b.latent_attention(
            x, b.linear(x, "c", 6), b.linear(x, "r", 2), heads=1, scale=1.0, name="op"
        )
    )
    assert work.operations == {"fp32": 2 * 16 * (6 + 2 + 6)}
    assert work.bytes == 13 * 8 * 2


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 9])
def test_encoders_see_both_ways(window: int) -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
    x = b.self_attention(
        x, x, x, heads=2, kv_heads=2, head_dim=4, scale=1.0, window=window, name="op"
    )
    program = b.finish_encoder(b.pool(x, "mean"), VOCAB)
    work = counted(program).node(program.node("op"), StepShape((4,), (0,), 0))
    pairs = sum(not window or abs(i - j) < window for i in range(4) for j in range(4))
    assert work == Work(0, {"fp32": 2 * pairs * 2 * 8})


def test_recurrences_read_and_write_their_state() -> None:
    def scan(b: Builder, x: Any) -> Any:
        gate = b.linear(x, "gate", 2)
        return b.recurrent_scan(
            x, x, x, gate, gate, heads=2, key_heads=2, scale=1.0, delta=True, name="op"
        )

    work = one(scan)
    # Two heads of 4 x 4 floats: both sequences write, one has something to read.
    assert work == Work(3 * 2 * 16 * 4, {"fp32": 2 * 4 * 2 * 16 * 3})
    conv = one(lambda b, x: b.short_conv(x, "op", 4))
    assert conv == Work(100 + 3 * 3 * WIDTH * 4, {"fp32": 2 * 4 * WIDTH * 4})


def test_experts_are_those_that_somebody_chose() -> None:
    def chosen(b: Builder, x: Any) -> Any:
        experts, weights = b.route_experts(b.linear(x, "router", 4), top_k=2)
        return b.combine_experts(b.grouped_linear(x, experts, "op", 4, WIDTH, 5), weights, "all")

    single = one(chosen, StepShape((1,), (0,), 1), op="int8")
    assert single.bytes == pytest.approx(100 * 2 / 4)  # one token: two of four
    assert single.operations == {"int8": 2 * 2 * 5 * WIDTH}
    assert one(chosen).bytes == pytest.approx(100 * (1 - 0.5**4))
    many = one(chosen, StepShape((500,), (0,), 1))
    assert many.bytes == pytest.approx(100)
    assert many.operations == {"fp32": 500 * 2 * 2 * 5 * WIDTH}


def test_heads_of_their_own() -> None:
    work = one(lambda b, x: b.head_linear(x, "op", 2, 5))
    assert work == Work(100, {"fp32": 2 * 4 * 2 * 5 * 4})


def test_what_multiplies_nothing() -> None:
    assert one(lambda b, x: b.scale(x, 2.0, "op")) == Work()
