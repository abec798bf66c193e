"""Sequence state in numpy: pages of keys and values, of latents, and slots of recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sartor.graph import Batch, KVStateSpec, LatentStateSpec, Program, RecurrentStateSpec
from sartor.ops.kv import dequantize_vectors, quantize_vectors
from sartor.ops.weights import F32, FloatName, from_float32, to_float32
from sartor.plan import ExecutionPlan

Array = npt.NDArray[Any]


class _Vectors:
    """Keys, values or latents ``[blocks, block size, heads, features]`` in one storage."""

    def __init__(self, shape: tuple[int, ...], kv: str) -> None:
        kinds = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}
        self._kv = kv
        self._data: Array = np.zeros(shape, kinds[kv])
        self._scales = np.zeros(shape[:-1], np.float16) if kv == "int8" else None

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def write(self, slots: tuple[Array, Array], rows: F32) -> None:
        rows = rows.reshape(len(rows), *self._data.shape[2:])
        if self._scales is None:
            self._data[slots] = from_float32(rows, cast(FloatName, self._kv))
        else:
            self._data[slots], self._scales[slots] = quantize_vectors(rows)

    def copy(self, sources: Array, destinations: Array) -> None:
        """Whole blocks."""
        for held in (self._data, self._scales):
            if held is not None:
                held[destinations] = held[sources]

    def read(self, slots: tuple[Array, Array]) -> F32:
        if self._scales is None:
            return to_float32(self._data[slots], cast(FloatName, self._kv))
        return dequantize_vectors(self._data[slots], self._scales[slots])


class ReferenceState:
    """The state of every layer of a program, once :meth:`allocate` has been called."""

    def __init__(self, program: Program, plan: ExecutionPlan) -> None:
        self._program = program
        self._plan = plan
        self._group_of = {s: g.index for g in program.groups() for s in g.states}
        self._arrays: list[tuple[Any, ...]] = []

    def block_bytes(self, group: int) -> int:
        total = 0
        for index in self._program.groups()[group].states:
            spec = self._program.states[index]
            if isinstance(spec, RecurrentStateSpec):
                total += spec.nbytes
            else:
                total += spec.bytes_per_token(self._plan.kv) * self._plan.block_size
        return total

    def allocate(self, blocks: Sequence[int]) -> None:
        self._arrays = []
        for index, spec in enumerate(self._program.states):
            count, size = blocks[self._group_of[index]], self._plan.block_size
            match spec:
                case KVStateSpec(kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                    kv = spec.storage(self._plan.kv)
                    shapes = [(count, size, heads, dim) for dim in (head_dim, value_dim)]
                    self._arrays.append(tuple(_Vectors(shape, kv) for shape in shapes))
                case LatentStateSpec(rank=rank, rope_dim=rope_dim):
                    shape = (count, size, 1, rank + rope_dim)
                    self._arrays.append((_Vectors(shape, spec.storage(self._plan.kv)),))
                case RecurrentStateSpec(shape=shape):
                    self._arrays.append((np.zeros((count, *shape), np.float32),))

    @property
    def allocated(self) -> bool:
        return bool(self._arrays) or not self._program.states

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self._arrays for array in arrays)

    def free(self) -> None:
        self._arrays = []

    def copy(self, batch: Batch) -> None:
        """Makes the copies of blocks that a batch begins with."""
        if not batch.copies:
            return
        for state, group in self._group_of.items():
            sources, destinations = batch.copies[group].T
            for held in self._arrays[state]:
                if isinstance(held, _Vectors):
                    held.copy(sources, destinations)
                else:
                    held[destinations] = held[sources]

    # Pages ----------------------------------------------------------------------------

    def _slots(
        self, batch: Batch, state: int, sequence: int, positions: Array
    ) -> tuple[Array, Array]:
        table = batch.block_tables[self._group_of[state]][sequence]
        return table[positions // self._plan.block_size], positions % self._plan.block_size

    def write(self, batch: Batch, state: int, *rows: F32) -> None:
        """Stores rows ``[T, features]``: keys and values, or latents."""
        for vectors, given in zip(self._arrays[state], rows, strict=True):
            for s, context in enumerate(batch.contexts):
                own = given[batch.starts[s] : batch.starts[s + 1]]
                slots = self._slots(batch, state, s, context + np.arange(len(own)))
                vectors.write(slots, own)

    def read(self, batch: Batch, state: int, sequence: int, low: int, high: int) -> tuple[F32, ...]:
        """Positions ``[low, high)`` of a sequence: ``[n, heads, features]`` each."""
        slots = self._slots(batch, state, sequence, np.arange(low, high))
        return tuple(vectors.read(slots) for vectors in self._arrays[state])

    # Recurrent ------------------------------------------------------------------------

    def load(self, batch: Batch, state: int, sequence: int) -> F32:
        """The state before the step's first token of a sequence."""
        (array,) = self._arrays[state]
        context = int(batch.contexts[sequence])
        if context == 0:
            return np.zeros(array.shape[1:], np.float32)
        table = batch.block_tables[self._group_of[state]][sequence]
        found: F32 = array[table[(context - 1) // self._plan.block_size]]
        return found

    def store(self, batch: Batch, state: int, sequence: int, value: F32) -> None:
        """The state after the step's last token of a sequence."""
        (array,) = self._arrays[state]
        length = batch.starts[sequence + 1] - batch.starts[sequence]
        last = (int(batch.contexts[sequence]) + int(length) - 1) // self._plan.block_size
        array[batch.block_tables[self._group_of[state]][sequence][last]] = value
