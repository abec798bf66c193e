from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from sartor.backends.base import Backend, Executable
from sartor.backends.null.backend import NullExecutable, null_program
from sartor.backends.registry import choose, load_backend
from sartor.errors import UsageError
from sartor.graph import Batch, LowRank, Ragged, SamplingParams
from sartor.plan import ExecutionPlan

PLAN = ExecutionPlan(backend="null", block_size=16)


def executable(windows: tuple[int, ...] = (0,)) -> NullExecutable:
    made = NullExecutable(null_program(100, windows), PLAN)
    made.allocate_state([8] * len(windows))
    return made


def batch(
    tokens: list[int], blocks: list[int], *, context: int = 0, groups: int = 1, **params: float
) -> Batch:
    """One sequence that gives an output."""
    total = context + len(tokens)
    row = SamplingParams(**{"temperature": 0.0, **params}).row(  # type: ignore[arg-type]
        seed=5, choice=0, prompt_length=total
    )
    row["position"] = total
    nothing = Ragged.of([np.zeros(0, np.int32)], np.int32)
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(context, total, dtype=np.int32),
        starts=np.array([0, len(tokens)], np.int32),
        contexts=np.array([context], np.int32),
        block_tables=(np.array([blocks], np.int32),) * groups,
        rope_lengths=np.array([100], np.int32),
        output_rows=np.array([len(tokens) - 1], np.int32),
        sampling=row,
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged.of([np.zeros(0, np.float32)], np.float32),
    )


def token(made: NullExecutable, b: Batch) -> int:
    return int(made.collect(made.submit(b)).tokens[0])


WORDS = list(range(40))


def test_it_fulfils_the_contract() -> None:
    backend, device = choose("null")
    assert isinstance(backend, Backend)
    assert device.name == "null"
    assert isinstance(executable(), Executable)


def test_the_answer_depends_on_every_token_and_on_nothing_else() -> None:
    whole = token(executable(), batch(WORDS, [0, 1, 2]))
    assert token(executable(), batch(WORDS, [5, 1, 7])) == whole
    for changed in (0, 17, 39):
        other = [t + (i == changed) for i, t in enumerate(WORDS)]
        assert token(executable(), batch(other, [0, 1, 2])) != whole
    chunked = executable()
    token(chunked, batch(WORDS[:20], [3, 4]))
    assert token(chunked, batch(WORDS[20:], [3, 4, 6], context=20)) == whole


def test_wrong_blocks_change_the_answer_or_fail() -> None:
    whole = token(executable(), batch(WORDS, [0, 1, 2]))
    made = executable()
    token(made, batch(WORDS[:32], [3, 4]))
    assert token(made, batch(WORDS[32:], [4, 3, 2], context=32)) != whole
    assert token(made, batch(WORDS[32:], [3, 7, 2], context=32)) != whole
    with pytest.raises(UsageError, match="missing"):
        made.submit(batch(WORDS[32:], [3, -1, 2], context=32))
    with pytest.raises(UsageError, match="outside"):
        made.submit(batch(WORDS[32:], [3, 4, -1], context=32))


def test_a_window_sees_its_last_positions_only() -> None:
    made = executable((20,))
    whole = token(made, batch(WORDS, [0, 1, 2]))
    other = [t + (i < 20) for i, t in enumerate(WORDS)]
    assert token(made, batch(other, [0, 1, 2])) == whole
    other = [t + (i == 20) for i, t in enumerate(WORDS)]
    assert token(made, batch(other, [0, 1, 2])) != whole
    token(made, batch(WORDS[:36], [0, 1, 2]))
    assert token(made, batch(WORDS[36:], [-1, 1, 2], context=36)) == whole


def test_positions_are_checked() -> None:
    wrong = batch(WORDS, [0, 1, 2])
    wrong.sampling["position"] = 39
    with pytest.raises(UsageError, match="next position"):
        executable().submit(wrong)
    shifted = dataclasses.replace(wrong, positions=wrong.positions + np.int32(1))
    with pytest.raises(UsageError, match="positions"):
        executable().submit(shifted)


def test_sampling_draws_by_seed_and_greedy_does_not() -> None:
    def answer(seed: int, temperature: float) -> int:
        b = batch(WORDS, [0, 1, 2], temperature=temperature)
        b.sampling["seed"] = seed
        return token(executable(), b)

    assert len({answer(seed, 0.0) for seed in range(8)}) == 1
    assert len({answer(seed, 1.0) for seed in range(8)}) > 4


def test_logprobs_fall() -> None:
    made = executable()
    output = made.collect(made.submit(batch(WORDS, [0, 1, 2], logprobs=4)))
    assert output.top_tokens.values[0] == output.tokens[0]
    assert output.top_logprobs.values[0] == output.logprobs[0] <= 0
    assert (np.diff(output.top_logprobs.values) < 0).all()
    assert output.top_tokens.starts.tolist() == [0, 4]


def test_a_token_may_name_an_output_in_flight() -> None:
    made = executable()
    handle = made.submit(batch(WORDS, [0, 1, 2]))
    flying = made.submit(batch([-1], [0, 1, 2], context=40))
    first, second = (made.collect(h).tokens[0] for h in (handle, flying))
    plain = executable()
    assert token(plain, batch(WORDS, [0, 1, 2])) == first
    assert token(plain, batch([int(first)], [0, 1, 2], context=40)) == second


def test_devices_can_be_slow() -> None:
    backend = load_backend("null")
    program = null_program()
    weights = backend.pack(program, None, PLAN, None)  # type: ignore[arg-type]
    made = backend.compile(program, weights, PLAN, "null-20ms")
    made.allocate_state([8])
    started = time.perf_counter()
    made.submit(batch(WORDS, [0, 1, 2]))
    assert time.perf_counter() - started >= 0.02
    with pytest.raises(UsageError, match="choose from null, null-1ms"):
        backend.compile(program, weights, PLAN, "fast")


def test_memory_and_order_of_calls() -> None:
    made = NullExecutable(null_program(), PLAN)
    with pytest.raises(UsageError, match="allocate_state"):
        made.submit(batch(WORDS, [0, 1, 2]))
    made.allocate_state([8])
    assert made.memory().state == 8 * made.block_bytes(0)
    made.close()
    assert made.memory().state == 0


# Recurrent states, vectors, adapters ----------------------------------------------------


def recurrent() -> NullExecutable:
    made = NullExecutable(null_program(100, (), recurrent=1), PLAN)
    made.allocate_state([8])
    return made


def test_a_recurrent_state_is_read_from_one_run_and_written_to_another() -> None:
    whole = token(recurrent(), batch(WORDS, [-1, -1, 5]))
    chunked = recurrent()
    token(chunked, batch(WORDS[:20], [-1, 3]))
    token(chunked, batch(WORDS[20:25], [-1, 3], context=20))
    # A snapshot is read and stays what it is.
    token(chunked, batch(WORDS[25:32], [-1, 3], context=25))
    for block in (6, 7):
        assert token(chunked, batch(WORDS[32:], [-1, 3, block], context=32)) == whole
    assert token(chunked, batch(WORDS[32:], [-1, 4, 6], context=32)) != whole
    for blocks in ([-1, 3, -1], [-1, -1, 6], [2, 3, 6]):
        with pytest.raises(UsageError, match="read from run 1 and written to run 2"):
            chunked.submit(batch(WORDS[32:], blocks, context=32))
    for changed in (0, 17, 39):
        other = [t + (i == changed) for i, t in enumerate(WORDS)]
        assert token(recurrent(), batch(other, [-1, -1, 5])) != whole
    swapped = [*WORDS[:10], WORDS[11], WORDS[10], *WORDS[12:]]
    assert token(recurrent(), batch(swapped, [-1, -1, 5])) != whole


def test_blocks_are_as_large_as_their_kind() -> None:
    assert executable().block_bytes(0) == 16 * 8
    assert recurrent().block_bytes(0) == 8


def test_vectors_take_the_place_of_tokens() -> None:
    def answer(vector: list[float], placeholder: int = 0) -> int:
        words = [*WORDS[:7], placeholder, *WORDS[8:]]
        given = dataclasses.replace(
            batch(words, [0, 1, 2]),
            embedding_rows=np.array([7], np.int32),
            embeddings=np.array([vector], np.float32),
        )
        return token(executable(), given)

    assert answer([1, 2]) == answer([1, 2], placeholder=9) != answer([1, 3])


def test_adapters_change_the_answer_by_what_they_are() -> None:
    made = executable()
    layers = {"head.weight": LowRank(np.ones((1, 2), np.float32), np.ones((100, 1), np.float32))}
    made.load_adapter(0, layers)
    made.load_adapter(
        1,
        {
            "head.weight": dataclasses.replace(
                layers["head.weight"], up=np.zeros((100, 1), np.float32)
            )
        },
    )
    made.load_adapter(2, layers)

    def answer(adapter: int) -> int:
        return token(
            made,
            dataclasses.replace(batch(WORDS, [0, 1, 2]), adapters=np.array([adapter], np.int32)),
        )

    assert answer(-1) == token(made, batch(WORDS, [0, 1, 2]))
    assert len({answer(-1), answer(0), answer(1)}) == 3
    assert answer(2) == answer(0)
    made.drop_adapter(0)
    with pytest.raises(KeyError):
        answer(0)
