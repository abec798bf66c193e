"""What the host prepares for a step: every index that the device will need, in one transfer.

The device computes no shapes and looks nothing up: block tables become plain indices here, in
numpy, and sequences of like length are laid side by side in *segments*. A :class:`StepShape`
says all that the host knows of a step; two steps of equal shape launch the same work, which is
why graphs are kept by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sartor.errors import UsageError
from sartor.graph import SAMPLING_ROW, Batch, Program, Ragged, StateGroup
from sartor.ops.rope import inverse_frequencies

Array = npt.NDArray[Any]
_ALIGNMENT = 16  # of every array in the transfer, in bytes: any type may start there


@dataclass(frozen=True)
class SegmentShape:
    """Sequences side by side, each with up to ``queries`` new tokens, and for each state group
    the number of blocks that their tables hold (0 in a recurrent group)."""

    sequences: int
    queries: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step, and which adapters take part."""

    tokens: int
    sequences: int
    rows: int
    embeddings: int
    segments: tuple[SegmentShape, ...]
    adapters: tuple[int, ...] = ()


class Layout:
    """Turns batches of one program into arrays; knows its state groups and ropes."""

    def __init__(self, program: Program, block_size: int) -> None:
        self._groups = program.groups()
        self._block_size = block_size
        self._by_length = {i: r for i, r in enumerate(program.ropes) if r.depends_on_length}
        width = (
            program.values[program.inputs["embeddings"]].shape[1]
            if ("embeddings" in program.inputs)
            else 0
        )
        assert isinstance(width, int)
        self._embedding_width = width

    def lay_out(
        self, batch: Batch, scratch: Sequence[int], blocks: int = 0
    ) -> tuple[StepShape, dict[str, Array]]:
        """The arrays of a batch, and their shape.

        ``blocks`` above 0 makes a *static* step: one segment whose tables are that wide (or as
        wide as a window needs), whatever its sequences hold.
        """
        lengths = np.diff(batch.starts)
        tokens = len(batch.tokens)
        arrays: dict[str, Array] = {
            "tokens": batch.tokens.astype(np.int64),
            "positions": batch.positions.astype(np.int64),
            "output_rows": batch.output_rows.astype(np.int64),
            "starts": batch.starts.astype(np.int64),
        }
        if self._embedding_width:
            arrays["embedding_rows"] = batch.embedding_rows.astype(np.int64)
            arrays["embeddings"] = batch.embeddings.reshape(-1, self._embedding_width)
        for rope, spec in self._by_length.items():
            each = [inverse_frequencies(spec, int(length)) for length in batch.rope_lengths]
            arrays[f"inverse.{rope}"] = np.repeat(np.stack(each), lengths, axis=0)
        self._slots(arrays, batch, lengths, scratch, padded=blocks > 0)
        segments: list[SegmentShape] = []
        for members in [np.arange(len(lengths))] if blocks else _alike(lengths):
            own, index = lengths[members], len(segments)
            segments.append(self._segment(arrays, index, batch, members, own, scratch, blocks))
        adapters = _adapters(arrays, batch, lengths)
        return (
            StepShape(
                tokens,
                len(lengths),
                len(batch.output_rows),
                len(batch.embedding_rows),
                tuple(segments),
                adapters,
            ),
            arrays,
        )

    def _slots(
        self,
        arrays: dict[str, Array],
        batch: Batch,
        lengths: Array,
        scratch: Sequence[int],
        *,
        padded: bool,
    ) -> None:
        """Where each token's keys and values go."""
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        held = batch.contexts[sequence].astype(np.int64)
        at = held + np.arange(len(sequence)) - batch.starts[sequence]
        for group in self._groups:
            if group.kind == "paged":
                table = batch.block_tables[group.index]
                blocks = table[sequence, at // self._block_size].astype(np.int64)
                empty = blocks < 0
                if not padded and empty.any():
                    raise UsageError("batch: a block table holds no block for a new token")
                blocks[empty] = scratch[group.index]
                arrays[f"slots.{group.index}"] = blocks * self._block_size + at % self._block_size

    def _segment(
        self,
        arrays: dict[str, Array],
        index: int,
        batch: Batch,
        members: Array,
        lengths: Array,
        scratch: Sequence[int],
        blocks: int,
    ) -> SegmentShape:
        queries = int(lengths.max())
        contexts = batch.contexts[members].astype(np.int64)
        offsets = np.arange(queries)
        rows = batch.starts[members].astype(np.int64)[:, None] + offsets
        rows[offsets >= lengths[:, None]] = len(batch.tokens)
        arrays[f"members.{index}"] = members
        arrays[f"rows.{index}"] = rows
        arrays[f"lengths.{index}"] = lengths.astype(np.int64)
        arrays[f"contexts.{index}"] = contexts
        widths = []
        for group in self._groups:
            table = batch.block_tables[group.index][members]
            name, empty = f"{group.index}.{index}", scratch[group.index]
            if group.kind == "recurrent":
                widths.append(0)
                last = np.stack([contexts - 1, contexts + lengths - 1], axis=1)
                both = np.take_along_axis(table, last.clip(0) // self._block_size, 1)
                both = np.where((both < 0) | (last < 0), empty, both).astype(np.int64)
                arrays[f"read.{name}"], arrays[f"write.{name}"] = both.T.copy()
                continue
            first = self._first(group, contexts)
            stop = -(-(contexts + lengths) // self._block_size)
            width = int((stop - first).max())
            if blocks:
                width = min(blocks, self._window_blocks(group))
            widths.append(width)
            columns = first[:, None] + np.arange(width)
            there = columns < table.shape[1]
            found = np.take_along_axis(table, np.where(there, columns, 0), 1)
            arrays[f"blocks.{name}"] = np.where(there & (found >= 0), found, empty).astype(np.int64)
            arrays[f"first.{name}"] = first * self._block_size
        return SegmentShape(len(members), queries, tuple(widths))

    def _first(self, group: StateGroup, contexts: Array) -> Array:
        """The first block that the first new token of each sequence sees."""
        if not group.window:
            return np.zeros_like(contexts)
        first: Array = (contexts - group.window + 1).clip(0) // self._block_size
        return first

    def _window_blocks(self, group: StateGroup) -> int:
        """The most blocks that one token can see."""
        if not group.window:
            return 1 << 30
        return (group.window + self._block_size - 2) // self._block_size + 1


def pad(batch: Batch, sequences: int) -> Batch:
    """A batch of single tokens brought to ``sequences`` sequences and output rows.

    What is added holds no blocks, so that it works in scratch, and is greedy.
    """
    added = sequences - len(batch.contexts)
    rows = sequences - len(batch.output_rows)

    def more(array: Array, count: int, fill: int = 0) -> Array:
        shape = [(0, count)] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, shape, constant_values=fill)

    def lists(ragged: Ragged) -> Ragged:
        starts = np.pad(ragged.starts, (0, rows), mode="edge")
        return Ragged(ragged.values, starts)

    greedy = np.zeros(rows, SAMPLING_ROW)
    greedy["logprobs"], greedy["top_p"], greedy["repetition_penalty"] = -1, 1, 1
    sampling = np.concatenate([batch.sampling, greedy])
    return dataclasses.replace(
        batch,
        tokens=more(batch.tokens, added),
        positions=more(batch.positions, added),
        starts=np.arange(sequences + 1, dtype=np.int32),
        contexts=more(batch.contexts, added),
        block_tables=tuple(more(table, added, -1) for table in batch.block_tables),
        rope_lengths=more(batch.rope_lengths, added),
        output_rows=more(batch.output_rows, rows),
        sampling=sampling,
        history=lists(batch.history),
        bias_tokens=lists(batch.bias_tokens),
        bias_values=lists(batch.bias_values),
    )


def is_single(batch: Batch) -> bool:
    """Whether every sequence has one token, so that the step can be static."""
    return len(batch.tokens) == len(batch.contexts)


def bucket(count: int) -> int:
    """The power of two that a count is padded to."""
    return 1 << max(0, count - 1).bit_length()


def _alike(lengths: Array) -> list[Array]:
    """Sequences whose lengths have the same bucket, so that padding at most doubles the work."""
    exponents = np.ceil(np.log2(lengths)).astype(np.int64)
    return [np.flatnonzero(exponents == exponent) for exponent in np.unique(exponents)]


def _adapters(arrays: dict[str, Array], batch: Batch, lengths: Array) -> tuple[int, ...]:
    """Rows of every adapter that takes part, among the tokens and among the outputs."""
    present = np.unique(batch.adapters[batch.adapters >= 0]).tolist()
    if present:
        of_token = np.repeat(batch.adapters, lengths)
        for adapter in present:
            mine = of_token == adapter
            arrays[f"adapter.{adapter}.T"] = np.flatnonzero(mine)
            arrays[f"adapter.{adapter}.R"] = np.flatnonzero(mine[batch.output_rows])
    return tuple(present)


class Transfer:
    """Arrays on their way to a device: one buffer, one copy.

    On CUDA the host side is pinned memory of torch's caching allocator, which does not hand it
    out again before the copy is done: no step waits for the one before it.
    """

    def __init__(self, arrays: Mapping[str, Array], device: torch.device) -> None:
        self.spans: dict[str, tuple[int, Array]] = {}
        size = 0
        for name, array in arrays.items():
            self.spans[name] = (size, array)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.device = device
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        view = self.host.numpy()
        for start, array in self.spans.values():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            view[start : start + array.nbytes] = raw

    def start(self, into: Tensor | None = None) -> Tensor:
        """Begins the copy, into a buffer of the same size where one is given."""
        if into is None:
            return self.host.to(self.device, non_blocking=True)
        return into.copy_(self.host, non_blocking=True)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays in a buffer on the device, by name."""
        found = {}
        for name, (start, array) in self.spans.items():
            part = buffer[start : start + array.nbytes]
            found[name] = part.view(_TORCH[array.dtype.str[1:]]).view(array.shape)
        return found


_TORCH = {"i8": torch.int64, "f4": torch.float32}


def upload(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Copies arrays (int64 and float32) to a device without waiting for it."""
    transfer = Transfer(arrays, device)
    return transfer.views(transfer.start())
