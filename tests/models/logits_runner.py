"""Runs a model on a backend and returns the logits of every token."""

from __future__ import annotations

import numpy as np
from tiny_models import VOCAB

from sartor.backends.base import Executable
from sartor.backends.registry import choose
from sartor.graph import Batch, Program, Ragged, SamplingParams
from sartor.models import Model
from sartor.plan import ExecutionPlan

BLOCK = 16
TOLERANCE = 1e-4
PROMPT, WRITTEN = 23, 8
LENGTH = PROMPT + WRITTEN
TOKENS = [int(t) for t in np.random.default_rng(7).integers(2, VOCAB, LENGTH)]


def head_of(program: Program) -> str:
    """The node that gives the logits."""
    wanted = program.outputs["logits"]
    return next(node.name for node in program.nodes if wanted in node.outputs)


def compiled(
    model: Model, backend: str, program: Program | None = None, blocks: int = 8
) -> Executable:
    program = program or model.program
    chosen, device = choose(backend)
    plan = ExecutionPlan(backend=backend, activation="fp32", kv="fp32", block_size=BLOCK)
    weights = chosen.pack(program, model.source, plan, None)
    executable = chosen.compile(program, weights, plan, device.name, [head_of(program)])
    executable.allocate_state([blocks] * len(program.groups()))
    return executable


def step_batch(
    program: Program, parts: list[tuple[list[int], int]], tables: list[list[int]], rope_length: int
) -> Batch:
    """One step over sequences given as (new tokens, tokens in the state); all rows give outputs."""
    tokens = np.array([t for part, _ in parts for t in part], np.int32)
    starts = np.cumsum([0, *(len(part) for part, _ in parts)]).astype(np.int32)
    positions = np.concatenate(
        [np.arange(context, context + len(part), dtype=np.int32) for part, context in parts]
    )
    row = SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=0)
    empty = [np.zeros(0, np.int32)] * len(tokens)
    return Batch(
        tokens=tokens,
        positions=positions,
        starts=starts,
        contexts=np.array([context for _, context in parts], np.int32),
        block_tables=tuple(np.array(tables, np.int32) for _ in program.groups()),
        rope_lengths=np.full(len(parts), rope_length, np.int32),
        output_rows=np.arange(len(tokens), dtype=np.int32),
        sampling=np.repeat(row, len(tokens)),
        history=Ragged.of(empty, np.int32),
        bias_tokens=Ragged.of(empty, np.int32),
        bias_values=Ragged.of(empty, np.float32),
        taps=(head_of(program),),
    )


def run(
    model: Model,
    backend: str,
    tokens: list[int],
    chunks: list[int],
    program: Program | None = None,
) -> np.ndarray:
    """Logits ``[tokens, vocab]`` of one sequence fed in chunks; its blocks lie out of order."""
    program = program or model.program
    executable = compiled(model, backend, program)
    rows, at = [], 0
    for length in chunks:
        batch = step_batch(program, [(tokens[at : at + length], at)], [[5, 2, 7]], len(tokens))
        output = executable.collect(executable.submit(batch))
        logits = output.taps[head_of(program)]
        assert np.array_equal(output.tokens, logits.argmax(axis=1))
        rows.append(np.array(logits))
        at += length
    executable.close()
    return np.concatenate(rows)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
