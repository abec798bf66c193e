"""Runs an encoder on a backend and returns a vector for each sequence."""

from __future__ import annotations

import numpy as np

from sartor.backends.registry import choose
from sartor.graph import SAMPLING_ROW, Batch, Ragged
from sartor.models import Model
from sartor.plan import ExecutionPlan


def embed(model: Model, backend: str, sequences: list[list[int]]) -> np.ndarray:
    """float32 ``[S, width]``, all sequences in one step."""
    chosen, device = choose(backend)
    plan = ExecutionPlan(backend=backend, activation="fp32", kv="fp32", block_size=16)
    weights = chosen.pack(model.program, model.source, plan, None)
    executable = chosen.compile(model.program, weights, plan, device.name)
    executable.allocate_state([])
    lengths = [len(tokens) for tokens in sequences]
    batch = Batch(
        tokens=np.concatenate([np.array(tokens, np.int32) for tokens in sequences]),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        starts=np.cumsum([0, *lengths]).astype(np.int32),
        contexts=np.zeros(len(lengths), np.int32),
        block_tables=(),
        rope_lengths=np.array(lengths, np.int32),
        output_rows=np.zeros(0, np.int32),
        sampling=np.zeros(0, SAMPLING_ROW),
        history=Ragged.of([], np.int32),
        bias_tokens=Ragged.of([], np.int32),
        bias_values=Ragged.of([], np.float32),
    )
    batch.validate()
    output = executable.collect(executable.submit(batch))
    found = np.array(output.embeddings)
    executable.close()
    return found
