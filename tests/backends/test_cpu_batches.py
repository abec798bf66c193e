"""Batches and programs that the CPU backend must survive: refused by name, never run wrongly."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from test_bitwise import BLOCK, HIDDEN, LENGTH, TOKENS, VOCAB, _batch, _program, _Weights

from sartor.backends.base import Executable
from sartor.backends.registry import load_backend
from sartor.errors import CapacityError, UsageError
from sartor.graph import Batch, Builder, Program, Ragged
from sartor.graph.batch import SAMPLING_ROW
from sartor.plan import ExecutionPlan


def compiled(program: Program, taps: tuple[str, ...] = (), **plan: Any) -> Executable:
    backend = load_backend("cpu")
    full = ExecutionPlan(backend="cpu", device="cpu", block_size=BLOCK).replace(**plan)
    weights = backend.pack(program, _Weights(program), full, None)
    return backend.compile(program, weights, full, "cpu", taps)


@pytest.fixture(scope="module")
def executable() -> Executable:
    made = compiled(_program(), ("head",))
    made.allocate_state([9] * len(made.program.groups()))
    return made


def _ragged(starts: list[int], rows: int) -> Ragged:
    return Ragged(
        np.zeros(2, np.int32), np.array(starts + [starts[-1]] * (rows + 1), np.int32)[: rows + 1]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"starts": [0, 100]}, "starts do not cover"),
        ({"starts": [0, 0, 20]}, "without tokens|entries instead"),
        ({"contexts": [-5]}, "fewer than no tokens"),
        ({"contexts": [2**31 - 10]}, "shorter than its sequence"),
        ({"block_tables": [[0, -1, 2]]}, "without a(?: |.)block|without its block"),
        ({"block_tables": [[0, 9, 2]]}, "not allocated|without its block"),
        ({"block_tables": [[0]]}, "shorter than its sequence"),
        ({"tokens": [VOCAB] * 20}, "outside the vocabulary"),
        ({"output_rows": [20] * 20}, "outside the tokens"),
        ({"copies": [[0, 9]]}, "copy of a block that was not allocated"),
        ({"adapters": [3]}, "an adapter that is not loaded"),
        ({"embedding_rows": [20]}, "each embedding|outside the tokens"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    executable: Executable, changes: dict[str, Any], words: str
) -> None:
    good = _batch(executable.program, [(TOKENS[:20], 0, 0)])
    arrays = {name: np.array(value, np.int32) for name, value in changes.items()}
    of_groups = {
        name: (array,) * len(executable.program.groups()) if array.ndim == 2 else array
        for name, array in arrays.items()
    }
    bad = dataclasses.replace(good, **of_groups)
    with pytest.raises((UsageError, ValueError, IndexError), match=words):
        executable.submit(bad)
    assert len(executable.collect(executable.submit(good)).tokens) == 20


def test_embeddings_of_another_width_are_refused(executable: Executable) -> None:
    good = _batch(executable.program, [(TOKENS[:20], 0, 0)])
    rows = np.array([3], np.int32)
    wide = np.zeros((1, HIDDEN + 1), np.float32)
    with pytest.raises(ValueError, match="the model's width"):
        executable.submit(dataclasses.replace(good, embedding_rows=rows, embeddings=wide))


@pytest.mark.parametrize("starts", [[0, 100], [1], [0, 2, 1]])
def test_lists_that_do_not_lie_end_to_end_are_refused(
    executable: Executable, starts: list[int]
) -> None:
    good = _batch(executable.program, [(TOKENS[:20], 0, 0)])
    with pytest.raises(UsageError, match="do not lie end to end"):
        executable.submit(dataclasses.replace(good, history=_ragged(starts, 20)))


def test_without_state_nothing_runs() -> None:
    made = compiled(_program())
    batch = _batch(made.program, [(TOKENS[:4], 0, 0)])
    with pytest.raises(UsageError, match="allocate_state"):
        made.submit(batch)
    with pytest.raises(CapacityError):
        made.allocate_state([1 << 50] * len(made.program.groups()))
    with pytest.raises(UsageError, match="allocate_state"):
        made.submit(batch)


@pytest.mark.parametrize("tap", ["sample", "near.kv_write", "latent.latent_write"])
def test_what_has_no_floats_cannot_be_tapped(tap: str) -> None:
    with pytest.raises(UsageError, match="no result in floating point"):
        compiled(_program(), (tap,))


def test_two_threads_may_run_two_executables_of_one_pool() -> None:
    program = _program()
    batch = _batch(program, [(TOKENS[:LENGTH], 0, 0)])
    made = [compiled(program, ("head",), threads=2) for _ in range(2)]
    for one in made:
        one.allocate_state([9] * len(program.groups()))
    tapped = dataclasses.replace(batch, taps=("head",))
    wanted = made[0].collect(made[0].submit(tapped)).taps["head"].copy()
    wrong: list[int] = []

    def turn(one: Executable) -> None:
        for _ in range(40):
            found = one.collect(one.submit(tapped)).taps["head"]
            if not np.array_equal(found, wanted):
                wrong.append(1)

    threads = [threading.Thread(target=turn, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_encoders_vector_outlives_what_follows_it() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, HIDDEN)
    pooled = b.pool(x, "mean")
    b.scale(b.l2_norm(pooled, HIDDEN, 1e-6, "unit"), 2.0, "double")
    program = b.finish_encoder(pooled, VOCAB)
    made = compiled(program)
    made.allocate_state([])
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int32))
    batch = Batch(
        tokens=TOKENS[:6],
        positions=np.array([0, 1, 0, 1, 2, 3], np.int32),
        starts=np.array([0, 2, 6], np.int32),
        contexts=np.zeros(2, np.int32),
        block_tables=(),
        rope_lengths=np.array([2, 4], np.int32),
        output_rows=np.zeros(0, np.int32),
        sampling=np.zeros(0, SAMPLING_ROW),
        history=nothing,
        bias_tokens=nothing,
        bias_values=Ragged(np.zeros(0, np.float32), nothing.starts),
    )
    table = _Weights(program).weight("embed.weight").dequantize()
    found = made.collect(made.submit(batch)).embeddings
    wanted = [table[TOKENS[:2]].mean(axis=0), table[TOKENS[2:6]].mean(axis=0)]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
