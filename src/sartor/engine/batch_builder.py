"""From a schedule to the batch that crosses the backend contract."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.engine.cache import StateCache
from sartor.engine.prefix import NONE
from sartor.engine.sequence import Sequence
from sartor.graph.batch import F32, I32, NO_ADAPTER, SAMPLING_ROW, Batch, Ragged
from sartor.graph.program import StateGroup

_NO_IDS = np.zeros(0, np.int32)
_NO_VECTORS = np.zeros((0, 0), np.float32)
_NO_VALUES = np.zeros(0, np.float32)


class BatchBuilder:
    """Fills the same buffers at every step: a batch is valid until the next one is built.

    Steps that overlap need a builder each.
    """

    def __init__(
        self,
        cache: StateCache,
        groups: List[StateGroup],
        max_batch_tokens: int,
        max_context: int,
    ) -> None:
        sequences = cache.max_sequences
        self._cache = cache
        self._recurrent = [group.kind == "recurrent" for group in groups]
        self._tokens = np.empty(max_batch_tokens, np.int32)
        self._positions = np.empty(max_batch_tokens, np.int32)
        self._starts = np.zeros(sequences + 1, np.int32)
        self._contexts = np.empty(sequences, np.int32)
        self._rope_lengths = np.empty(sequences, np.int32)
        self._adapters = np.empty(sequences, np.int32)
        self._slots = np.empty(sequences, np.intp)
        self._output_rows = np.empty(sequences, np.int32)
        self._output_slots = np.empty(sequences, np.intp)
        self._output_positions = np.empty(sequences, np.int32)
        self._sampling = np.zeros(sequences, SAMPLING_ROW)
        self._range = np.arange(max_context, dtype=np.int32)
        self._empty = np.zeros(sequences + 1, np.int32)

    def admit(self, sequence: Sequence) -> None:
        """Prepares what stays the same for as long as a sequence has its slot."""
        request = sequence.request
        self._sampling[sequence.slot] = request.params.row(
            seed=request.seed, choice=sequence.stream.choice, prompt_length=len(request.prompt)
        )[0]

    def build(self, items: List[tuple[Sequence, int]]) -> tuple[Batch, list[Sequence]]:
        """The batch, and the sequence of each of its output rows."""
        tokens, positions, starts = self._tokens, self._positions, self._starts
        outputs: list[Sequence] = []
        vectors: list[tuple[I32, F32]] = []
        forked: list[Sequence] = []
        at, width = 0, 0
        adapted = False
        for i, (sequence, count) in enumerate(items):
            computed = sequence.computed
            stop = computed + count
            tokens[at : at + count] = sequence.tokens[computed:stop]
            positions[at : at + count] = self._range[computed:stop]
            if sequence.embedded is not None:
                places, given = sequence.embedded.between(computed, stop)
                if len(places):
                    vectors.append((places + np.int32(at - computed), given))
            if sequence.copied:
                forked.append(sequence)
            at += count
            starts[i + 1] = at
            self._contexts[i] = computed
            self._rope_lengths[i] = sequence.limit
            self._slots[i] = sequence.slot
            self._adapters[i] = NO_ADAPTER if sequence.adapter is None else sequence.adapter.index
            adapted |= sequence.adapter is not None
            if sequence.end > width:
                width = sequence.end
            if stop == sequence.length:
                row = len(outputs)
                self._output_rows[row] = at - 1
                self._output_slots[row] = sequence.slot
                self._output_positions[row] = stop
                outputs.append(sequence)
        count, rows = len(items), len(outputs)
        slots = self._slots[:count]
        sampling = self._sampling[self._output_slots[:rows]]
        sampling["position"] = self._output_positions[:rows]
        batch = Batch(
            tokens=tokens[:at],
            positions=positions[:at],
            starts=starts[: count + 1],
            contexts=self._contexts[:count],
            block_tables=tuple(
                self._states(table, starts, count, width)
                if recurrent
                else table[:, :width].take(slots, 0)
                for table, recurrent in zip(self._cache.tables, self._recurrent, strict=True)
            ),
            rope_lengths=self._rope_lengths[:count],
            output_rows=self._output_rows[:rows],
            sampling=sampling,
            history=self._ragged(
                [s.tokens if s.needs_history else _NO_IDS for s in outputs], _NO_IDS
            ),
            bias_tokens=self._ragged([s.bias_tokens for s in outputs], _NO_IDS),
            bias_values=self._ragged([s.bias_values for s in outputs], _NO_VALUES),
            adapters=self._adapters[:count] if adapted else _NO_IDS,
            embedding_rows=_joined([places for places, _ in vectors], _NO_IDS),
            embeddings=_joined([rows for _, rows in vectors], _NO_VECTORS),
            copies=self._copies(forked) if forked else (),
        )
        return batch, outputs

    def _copies(self, sequences: List[Sequence]) -> tuple[I32, ...]:
        """The first step of sequences that begin within a block of another one."""
        sources = np.array([s.copied for s in sequences], np.int32)
        slots = [s.slot for s in sequences]
        runs = [s.computed // self._cache.block_size for s in sequences]
        for sequence in sequences:
            sequence.copied = ()
        return tuple(
            np.stack([sources[:, group], table[slots, runs]], axis=1)
            for group, table in enumerate(self._cache.tables)
        )

    def _states(self, table: I32, starts: I32, count: int, width: int) -> I32:
        """Of a recurrent group: the blocks that a step reads and writes, and no others."""
        rows, slots = np.arange(count), self._slots[:count]
        contexts = self._contexts[:count]
        ends = contexts + np.diff(starts[: count + 1])
        states = np.full((count, width), NONE, np.int32)
        for last in (contexts - 1, ends - 1):
            runs = last // self._cache.block_size
            begun = runs >= 0
            states[rows[begun], runs[begun]] = table[slots[begun], runs[begun]]
        return states

    def _ragged(self, lists: list[npt.NDArray[Any]], empty: npt.NDArray[Any]) -> Ragged:
        # Most steps have no penalties and no biases at all.
        if any(map(len, lists)):
            return Ragged.of(lists, empty.dtype)
        return Ragged(empty, self._empty[: len(lists) + 1])


def _joined(parts: list[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else nothing
