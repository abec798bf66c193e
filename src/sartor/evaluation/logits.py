"""The logits of every position of a text, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sartor.engine.fallback.model import LOGITS
from sartor.engine.load import LoadedModel, load
from sartor.errors import UsageError
from sartor.formats import open_checkpoint
from sartor.graph import Batch, Program, Ragged, SamplingParams
from sartor.models import UnknownArchitectureError, load_model
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress

F32 = npt.NDArray[np.float32]
ROWS = 32
"""Positions a chunk: a vocabulary of 262144 makes 32 MiB of logits."""


class LogitSource(Protocol):
    """Anything that gives next-token logits for a sequence of token ids."""

    @property
    def name(self) -> str: ...

    def chunks(self, tokens: Sequence[int]) -> Iterator[F32]:
        """Logits of all positions in order, ``[at most ROWS, vocab]`` each.

        Every chunk but the last has :data:`ROWS` rows. A chunk is valid until the next.
        """

    def close(self) -> None: ...


def head_node(program: Program) -> str:
    """The name of the node that makes the logits. UsageError for an encoder, which makes none."""
    if not program.samples:
        raise UsageError(
            "eval: this model makes vectors of texts and predicts no text; take one that does"
        )
    logits = program.outputs["logits"]
    return next(node.name for node in program.nodes if logits in node.outputs)


def open_logits(
    path: Path,
    plan: ExecutionPlan,
    name: str,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> ModelLogits:
    """Loads a model with its head tapped; errors as those of :func:`sartor.engine.load.load`."""
    checkpoint = open_checkpoint(path)
    try:
        head = head_node(load_model(checkpoint).program)
    except UnknownArchitectureError:  # there is a fallback, or load says why there is none
        head = LOGITS
    finally:
        checkpoint.close()
    return ModelLogits(load(path, plan, name, cache, (head,), progress))


class ModelLogits:
    """Runs token sequences through a loaded model's executable, past scheduler and sampler.

    ``loaded`` must have been loaded with its head node tapped; :func:`open_logits` does so.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.name = loaded.name
        self._program = loaded.executable.program
        self._head = head_node(self._program)
        self._blocks = 0

    def chunks(self, tokens: Sequence[int]) -> Iterator[F32]:
        """See :class:`LogitSource`; each call is a sequence of its own."""
        limit = self.loaded.context_length
        if len(tokens) > limit:
            raise UsageError(
                f"{len(tokens)} positions, but the context of {self.name} is {limit} tokens",
                advice=("lower {}", ("positions",)),
            )
        executable = self.loaded.executable
        blocks = -(-len(tokens) // self.loaded.plan.block_size)
        if blocks > self._blocks:
            # Full contexts, in window groups too: nothing is evicted here.
            executable.allocate_state([blocks] * len(self._program.groups()))
            self._blocks = blocks
        for start in range(0, len(tokens), ROWS):
            batch = self._batch(tokens[start : start + ROWS], start, len(tokens))
            output = executable.collect(executable.submit(batch))
            yield output.taps[self._head].astype(np.float32, copy=False)

    def close(self) -> None:
        self.loaded.executable.close()
        self._blocks = 0

    def _batch(self, tokens: Sequence[int], context: int, length: int) -> Batch:
        """One step of one sequence in which every row gives an output."""
        count = len(tokens)
        positions = np.arange(context, context + count, dtype=np.int32)
        row = SamplingParams(temperature=0).row(seed=0, choice=0, prompt_length=length)
        sampling = np.repeat(row, count)
        sampling["position"] = positions + 1
        table = np.arange(self._blocks, dtype=np.int32)[None]
        empty = np.zeros(count + 1, np.int32)
        return Batch(
            tokens=np.asarray(tokens, np.int32),
            positions=positions,
            starts=np.array([0, count], np.int32),
            contexts=np.array([context], np.int32),
            block_tables=(table,) * len(self._program.groups()),
            rope_lengths=np.array([length], np.int32),
            output_rows=np.arange(count, dtype=np.int32),
            sampling=sampling,
            history=Ragged(np.zeros(0, np.int32), empty),
            bias_tokens=Ragged(np.zeros(0, np.int32), empty),
            bias_values=Ragged(np.zeros(0, np.float32), empty),
            taps=(self._head,),
        )
