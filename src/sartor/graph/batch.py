"""The values that cross the contract at every step: what to run, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sartor.errors import UsageError

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
BATCH_VERSION = 3
NO_ADAPTER = -1


def _no_rows() -> I32:
    return np.zeros(0, np.int32)


def _no_vectors() -> F32:
    return np.zeros((0, 0), np.float32)


SAMPLING_ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int32),
        ("choice", np.uint32),
        ("seed", np.uint64),
        ("position", np.int32),
        ("prompt_length", np.int32),
        ("logprobs", np.int32),
        ("reserved", np.int32),
    ]
)
"""One row of sampling parameters, laid out alike for every backend (56 bytes).

``position`` is the index of the token to be drawn, counted from the start of the sequence;
``logprobs`` is -1 for none, else how many alternatives to report beside the chosen token.
"""


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths end to end: list i is ``values[starts[i]:starts[i + 1]]``."""

    values: npt.NDArray[np.generic]
    starts: I32

    def fits(self) -> bool:
        """Whether the lists lie end to end within the values."""
        starts = self.starts.tolist()
        if not len(self.values):
            return not any(starts)
        rising = all(after >= before for before, after in pairwise(starts))
        return rising and starts[0] == 0 and starts[-1] <= len(self.values)

    @staticmethod
    def of(lists: list[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> Ragged:
        lengths = [len(item) for item in lists]
        starts = np.zeros(len(lists) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        values = np.concatenate(lists) if lists else np.zeros(0, dtype)
        return Ragged(values.astype(dtype, copy=False), starts)


@dataclass(frozen=True)
class Batch:
    """One step: new tokens of S sequences, T in all, of which R rows give an output.

    tokens        ``[T]`` ids; ``-1 - i`` names output row i of the batch still in flight
    positions     ``[T]`` position of each token in its sequence
    starts        ``[S + 1]`` where each sequence's tokens begin
    contexts      ``[S]`` tokens of each sequence that the state holds already
    block_tables  per state group ``[S, blocks]``: the block of each run of ``block_size``
                  positions, -1 where none is held (outside a window; in a recurrent group,
                  :class:`~sartor.graph.program.StateGroup`, all but two)
    rope_lengths  ``[S]`` length admitted for the sequence, for ropes that depend on it
    output_rows   ``[R]`` token rows whose logits are computed and sampled
    sampling      ``[R]`` of :data:`SAMPLING_ROW`
    history       tokens so far of each output row; empty lists where no penalty needs them
    bias_tokens, bias_values   logit bias of each output row
    taps          names of nodes, fixed at compile time, whose results come back too
    embedding_rows, embeddings   ``[M]`` token rows that come as vectors ``[M, width]`` (float32);
                  their ids are placeholders
    adapters      ``[S]`` the adapter of each sequence, :data:`NO_ADAPTER` for none; empty where
                  no sequence has one
    copies        per state group ``[n, 2]``, source and destination block: what the state holds
                  in the first when the step begins, it holds in the second too before the step
                  reads or writes anything. No block is a destination twice, or a source as well.
                  Empty where nothing is copied; only for backends whose
                  :class:`~sartor.graph.Capabilities` name ``copies``
    """

    tokens: I32
    positions: I32
    starts: I32
    contexts: I32
    block_tables: tuple[I32, ...]
    rope_lengths: I32
    output_rows: I32
    sampling: npt.NDArray[np.void]
    history: Ragged
    bias_tokens: Ragged
    bias_values: Ragged
    taps: tuple[str, ...] = ()
    embedding_rows: I32 = field(default_factory=_no_rows)
    embeddings: F32 = field(default_factory=_no_vectors)
    adapters: I32 = field(default_factory=_no_rows)
    copies: tuple[I32, ...] = ()
    version: int = BATCH_VERSION

    def validate(self) -> None:
        """Raises UsageError where the parts do not fit together.

        Backends call it at every step, so what has an entry a sequence or a row is made a list: for
        a few elements any operation of numpy takes longer than the whole loop.
        """
        sequences = len(self.starts) - 1
        rows = len(self.output_rows)
        starts = self.starts.tolist()
        if starts[0] != 0 or starts[-1] != len(self.tokens):
            raise UsageError("batch: starts do not cover the tokens")
        if any(after <= before for before, after in pairwise(starts)):
            raise UsageError("batch: a sequence without tokens")
        for name, array, length in (
            ("positions", self.positions, len(self.tokens)),
            ("contexts", self.contexts, sequences),
            ("rope_lengths", self.rope_lengths, sequences),
            ("sampling", self.sampling, rows),
            ("history", self.history.starts, rows + 1),
            ("bias_tokens", self.bias_tokens.starts, rows + 1),
            ("bias_values", self.bias_values.starts, rows + 1),
        ):
            if len(array) != length:
                raise UsageError(f"batch: {name} has {len(array)} entries instead of {length}")
        if min(self.contexts.tolist(), default=0) < 0:
            raise UsageError("batch: a sequence with fewer than no tokens computed")
        for name, ragged in (
            ("history", self.history),
            ("bias_tokens", self.bias_tokens),
            ("bias_values", self.bias_values),
        ):
            if not ragged.fits():
                raise UsageError(f"batch: the lists of {name} do not lie end to end")
        output_rows = self.output_rows.tolist()
        if rows and not 0 <= min(output_rows) <= max(output_rows) < len(self.tokens):
            raise UsageError("batch: an output row outside the tokens")
        if len(self.embedding_rows) != len(self.embeddings):
            raise UsageError("batch: each embedding needs its row")
        rows_given = self.embedding_rows
        if len(rows_given) and not 0 <= rows_given.min() <= rows_given.max() < len(self.tokens):
            raise UsageError("batch: an embedding outside the tokens")
        if len(self.adapters) not in (0, sequences):
            raise UsageError(f"batch: {len(self.adapters)} adapters for {sequences} sequences")
        for table in self.block_tables:
            if table.ndim != 2 or len(table) != sequences:
                raise UsageError(f"batch: a block table of shape {table.shape}")
        if self.copies:
            self._validate_copies()

    def _validate_copies(self) -> None:
        if len(self.copies) != len(self.block_tables):
            raise UsageError(
                f"batch: copies for {len(self.copies)} of {len(self.block_tables)} state groups"
            )
        for copies in self.copies:
            if copies.ndim != 2 or copies.shape[1] != 2:
                raise UsageError(f"batch: copies of shape {copies.shape} instead of [n, 2]")
            sources, destinations = set(copies[:, 0].tolist()), set(copies[:, 1].tolist())
            if copies.min(initial=0) < 0:
                raise UsageError("batch: a copy of no block")
            if len(destinations) < len(copies) or sources & destinations:
                raise UsageError("batch: copies into one block, or of one that is written")


@dataclass(frozen=True)
class StepOutput:
    """What a step gave. ``top_tokens`` and ``top_logprobs`` are ragged, in falling order.

    ``embeddings`` float32 ``[S, width]`` are what an encoder makes of its sequences.
    """

    tokens: I32
    logprobs: F32
    top_tokens: Ragged
    top_logprobs: Ragged
    taps: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    embeddings: F32 = field(default_factory=_no_vectors)

    @staticmethod
    def encoded(
        embeddings: F32, taps: Mapping[str, npt.NDArray[np.generic]] | None = None
    ) -> StepOutput:
        """The output of a step that samples nothing."""
        nothing = Ragged(_no_rows(), np.zeros(1, np.int32))
        no_values = Ragged(np.zeros(0, np.float32), nothing.starts)
        return StepOutput(
            _no_rows(), np.zeros(0, np.float32), nothing, no_values, taps or {}, embeddings
        )
