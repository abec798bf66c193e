"""Sequence state on a torch device: blocks of keys and values, of latents, recurrent states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sartor.backends.torch.devices import free_bytes
from sartor.errors import CapacityError
from sartor.graph import KVStateSpec, LatentStateSpec, Program, RecurrentStateSpec
from sartor.ops.kv import LIMIT
from sartor.plan import ExecutionPlan

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class _Pool:
    """What the blocks of one state hold: numbers ``[blocks, block size, heads, features]``, and
    where they are int8 codes the scales ``[blocks, block size, heads]``; or recurrent states."""

    data: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        rows = rows.view(len(rows), *self.data.shape[2:])
        if self.scales is None:
            stored = rows.to(self.data.dtype)
        else:
            stored, scales = quantize_vectors(rows)
            self.scales.view(-1, *self.scales.shape[2:]).index_copy_(0, slots, scales)
        self.data.view(-1, *self.data.shape[2:]).index_copy_(0, slots, stored)

    def copy(self, sources: Tensor, destinations: Tensor) -> None:
        for held in (self.data, self.scales):
            if held is not None:
                held.index_copy_(0, destinations, held.index_select(0, sources))

    def read(self, blocks: Tensor) -> Tensor:
        found = self.data.index_select(0, blocks).float()
        if self.scales is None:
            return found
        return found * self.scales.index_select(0, blocks).float()[..., None]


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`sartor.ops.kv.quantize_vectors`."""
    top = x.abs().amax(dim=-1)
    top = torch.where(x.isfinite().all(dim=-1), top, torch.nan)
    scales = (top / LIMIT).to(torch.float16)
    wide = scales.float()
    inverse = torch.where(wide > 0, 1.0 / wide, 0.0)
    codes = (x * inverse[..., None]).nan_to_num(0.0).round().clamp(-LIMIT, LIMIT)
    return codes.to(torch.int8), scales


class TorchState:
    """The state of every layer, once :meth:`allocate` has been called.

    Every group has one block more than was asked for, the last: *scratch*, where the padding of
    a step writes and what block tables name where they hold nothing.
    """

    def __init__(self, program: Program, plan: ExecutionPlan, device: torch.device) -> None:
        self._program = program
        self._plan = plan
        self._device = device
        self._groups = program.groups()
        self.group_of = {s: group.index for group in self._groups for s in group.states}
        self.scratch: tuple[int, ...] = ()
        """The scratch block of each group."""
        self._pools: list[tuple[_Pool, ...]] = []

    def block_bytes(self, group: int) -> int:
        total = 0
        for index in self._groups[group].states:
            spec = self._program.states[index]
            if isinstance(spec, RecurrentStateSpec):
                total += spec.nbytes
            else:
                total += spec.bytes_per_token(self._plan.kv) * self._plan.block_size
        return total

    def allocate(self, blocks: Sequence[int]) -> None:
        self.free()
        need = sum((n + 1) * self.block_bytes(g) for g, n in enumerate(blocks))
        if need <= free_bytes(self._device):
            try:
                self._pools = [
                    self._pool(index, blocks[self.group_of[index]] + 1)
                    for index in range(len(self._program.states))
                ]
                self.scratch = tuple(blocks)
                return
            except torch.OutOfMemoryError:
                self.free()
        raise CapacityError(
            f"no memory on {self._plan.device} for {need >> 20} MiB of sequence state",
            advice=("lower {}", ("state_bytes", "max_sequences", "max_context")),
        )

    def _pool(self, index: int, count: int) -> tuple[_Pool, ...]:
        spec, size = self._program.states[index], self._plan.block_size
        match spec:
            case KVStateSpec(kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                shapes = [(count, size, heads, head_dim), (count, size, heads, value_dim)]
            case LatentStateSpec(rank=rank, rope_dim=rope_dim):
                shapes = [(count, size, 1, rank + rope_dim)]
            case RecurrentStateSpec(shape=shape):
                return (_Pool(self._zeros((count, *shape), torch.float32)),)
        kv = spec.storage(self._plan.kv)
        return tuple(
            _Pool(
                self._zeros(shape, DTYPES[kv]),
                self._zeros(shape[:-1], torch.float16) if kv == "int8" else None,
            )
            for shape in shapes
        )

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    @property
    def allocated(self) -> bool:
        return bool(self._pools) or not self._program.states

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pools in self._pools for pool in pools)

    def free(self) -> None:
        self._pools, self.scratch = [], ()

    def copy(self, group: int, pairs: Tensor) -> None:
        """Copies blocks of a group: ``pairs [2, n]`` are sources and destinations."""
        sources, destinations = pairs
        for state in self._groups[group].states:
            for pool in self._pools[state]:
                pool.copy(sources, destinations)

    def write(self, state: int, slots: Tensor, *rows: Tensor) -> None:
        """Stores rows ``[T, features]`` at ``slots [T]``: block times block size plus offset."""
        for pool, given in zip(self._pools[state], rows, strict=True):
            pool.write(slots, given)

    def read(self, state: int, blocks: Tensor) -> tuple[Tensor, ...]:
        """The tokens of ``blocks [s, n]``: float32 ``[s, n * block size, heads, features]``."""
        return tuple(
            pool.read(blocks.view(-1)).view(len(blocks), -1, *pool.data.shape[2:])
            for pool in self._pools[state]
        )

    def load(self, state: int, blocks: Tensor, held: Tensor) -> Tensor:
        """Recurrent states ``[s, ...]``; zeros where a sequence holds none yet."""
        (pool,) = self._pools[state]
        found = pool.data.index_select(0, blocks)
        return torch.where(held.view(-1, *[1] * (found.ndim - 1)), found, 0.0)

    def store(self, state: int, blocks: Tensor, values: Tensor) -> None:
        (pool,) = self._pools[state]
        pool.data.index_copy_(0, blocks, values)
