"""How much scratch memory an executable needs, found out by asking for it."""

from __future__ import annotations

import numpy as np

from sartor.backends.base import Executable
from sartor.engine.encoder import text_batch
from sartor.engine.prefix import NONE
from sartor.graph import Batch, Ragged, SamplingParams


def scratch_bytes(executable: Executable, context_length: int) -> int:
    """Scratch bytes after the largest step that an engine makes: buffers grow to that once and
    stay. Takes as long as the step; state that was allocated is gone afterwards."""
    plan = executable.plan
    if executable.program.samples:
        batch = _largest_step(executable)
    else:
        executable.allocate_state([])
        texts = max(1, plan.max_batch_tokens // context_length)
        weights = None
        if "embeddings" in executable.program.inputs:
            shape = executable.program.values[executable.program.inputs["embeddings"]].shape
            weights = np.zeros((texts * context_length, int(shape[1])), np.float32)
        batch = text_batch([(0,) * context_length] * texts, weights)
    executable.collect(executable.submit(batch))
    scratch = executable.memory().scratch
    executable.allocate_state([0] * len(executable.program.groups()))
    return scratch


def _largest_step(executable: Executable) -> Batch:
    """All the tokens that a step may have, in one sequence, and all the outputs."""
    plan, groups = executable.plan, executable.program.groups()
    count = plan.max_batch_tokens
    outputs = min(plan.max_sequences, count)
    blocks = -(-count // plan.block_size)
    executable.allocate_state([2 if group.kind == "recurrent" else blocks for group in groups])
    paged = np.arange(blocks, dtype=np.int32)[None]
    last = np.full((1, blocks), NONE, np.int32)
    last[0, -1] = 0
    positions = np.arange(count, dtype=np.int32)
    output_rows = positions[count - outputs :]
    sampling = np.repeat(
        SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=count), outputs
    )
    sampling["position"] = output_rows + 1
    starts = np.zeros(outputs + 1, np.int32)
    no_ids, no_values = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Batch(
        tokens=np.zeros(count, np.int32),
        positions=positions,
        starts=np.array([0, count], np.int32),
        contexts=np.zeros(1, np.int32),
        block_tables=tuple(last if group.kind == "recurrent" else paged for group in groups),
        rope_lengths=np.array([count], np.int32),
        output_rows=output_rows,
        sampling=sampling,
        history=Ragged(no_ids, starts),
        bias_tokens=Ragged(no_ids, starts),
        bias_values=Ragged(no_values, starts),
    )
