"""The null backend: no arithmetic, but a state that notices every mistake in its use.

Its state holds the token ids that were written, slot by slot through the block tables, and
the token that it draws is a hash of everything a sequence can see, read back through the
tables. A wrong block, a stale one, a missing one or a wrong position changes the answer or is
an error. Devices named ``null-<n>ms`` take n milliseconds a step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.backends.base import Device, MemoryUse, PackedWeights, WeightSource
from sartor.errors import UsageError
from sartor.graph import Batch, Builder, Capabilities, Program, Ragged, StepOutput
from sartor.ops import CORE_OPERATORS
from sartor.ops.sampling import mix64
from sartor.plan import ExecutionPlan

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so its powers never become 0
_DELAYS_MS = (0, 1, 4, 20, 100)


class NullWeights:
    """No weights."""

    nbytes = 0
    bits_per_weight = 0.0


class NullBackend:
    """Runs any program without its operators."""

    name = "null"

    def devices(self) -> list[Device]:
        return [
            Device(f"null-{ms}ms" if ms else "null", self.name, f"{ms} ms a step", 1 << 40)
            for ms in _DELAYS_MS
        ]

    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup"}),
            activations=frozenset({"fp32", "int8"}),
            kv_formats=frozenset({"fp32", "bf16", "fp16"}),
            bitwise=True,
        )

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> NullWeights:
        """Reads no weights and writes no file: there is nothing to pack."""
        return NullWeights()

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> NullExecutable:
        if taps:
            raise UsageError("the null backend computes no nodes, so it has no taps")
        match = re.fullmatch(r"null(?:-(\d+)ms)?", device)
        if match is None:
            names = ", ".join(d.name for d in self.devices())
            raise UsageError(f"null backend: no device {device!r}; choose from {names}")
        plan = plan.replace(backend=self.name, device=device)
        return NullExecutable(program, plan, int(match[1] or 0) / 1000)


class NullExecutable:
    """Remembers tokens; ``delay`` is the shortest time of a step, in seconds."""

    def __init__(self, program: Program, plan: ExecutionPlan, delay: float = 0.0) -> None:
        self.program = program
        self.plan = plan
        self.delay = delay
        self._windows = [group.window for group in program.groups()]
        self._by_length = any(rope.depends_on_length for rope in program.ropes)
        self._state: list[npt.NDArray[np.uint64]] = []
        self._powers = np.ones(1, np.uint64)
        self._finished: dict[int, StepOutput] = {}
        self._next_handle = 0

    def block_bytes(self, group: int) -> int:
        return self.plan.block_size * 8

    def allocate_state(self, blocks: Sequence[int]) -> None:
        # Rubbish, not zeros: reading what was never written must change the answer.
        rubbish = np.uint64(0xBAD0BAD0BAD0BAD)
        self._state = [np.full((n, self.plan.block_size), rubbish) for n in blocks]

    def memory(self) -> MemoryUse:
        return MemoryUse(0, sum(a.nbytes for a in self._state), 0)

    def kernel_path(self, node: str) -> str:
        return f"null {self.program.node(node).op}"

    def close(self) -> None:
        self._state = []

    def submit(self, batch: Batch) -> int:
        if len(self._state) != len(self._windows):
            raise UsageError("null backend: allocate_state before the first step")
        batch.validate()
        ready = time.perf_counter() + self.delay
        tokens = self._resolved(batch)
        self._write(batch, tokens)
        output = self._read(batch)
        time.sleep(max(0.0, ready - time.perf_counter()))
        handle = self._next_handle
        self._next_handle += 1
        self._finished[handle] = output
        return handle

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    def _resolved(self, batch: Batch) -> npt.NDArray[np.int32]:
        if batch.tokens.min(initial=0) >= 0:
            return batch.tokens
        last = self._finished[self._next_handle - 1].tokens
        names = np.where(batch.tokens < 0, -1 - batch.tokens, 0)
        return np.where(batch.tokens < 0, last[names], batch.tokens).astype(np.int32)

    def _write(self, batch: Batch, tokens: npt.NDArray[np.int32]) -> None:
        sequences = np.repeat(np.arange(len(batch.contexts)), np.diff(batch.starts))
        within = np.arange(len(tokens)) - np.repeat(batch.starts[:-1], np.diff(batch.starts))
        at = batch.contexts[sequences] + within
        if not np.array_equal(at, batch.positions):
            raise UsageError("null backend: positions do not follow from contexts")
        values = (tokens + 1).astype(np.uint64)
        if self._by_length:
            values |= batch.rope_lengths[sequences].astype(np.uint64) << np.uint64(32)
        size = self.plan.block_size
        for table, state in zip(batch.block_tables, self._state, strict=True):
            blocks = table[sequences, at // size]
            if blocks.min(initial=0) < 0:
                raise UsageError("null backend: a token is written outside of its blocks")
            state[blocks, at % size] = values

    def _read(self, batch: Batch) -> StepOutput:
        rows = np.searchsorted(batch.starts, batch.output_rows, side="right") - 1
        drawn, chosen, ids, values = [], [], [], []
        vocab = self.program.vocab
        for r, (s, row) in enumerate(zip(rows, batch.sampling, strict=True)):
            position = int(batch.positions[batch.output_rows[r]])
            if row["position"] != position + 1:
                raise UsageError("null backend: a sampling row is not for the next position")
            digest = mix64(position)
            for group in range(len(self._state)):
                digest = mix64(digest ^ self._seen(batch, group, int(s), position))
            span = slice(batch.history.starts[r], batch.history.starts[r + 1])
            digest = mix64(digest ^ self._fold(batch.history.values[span].astype(np.uint64), 0))
            if row["temperature"] > 0:
                draw = int(row["choice"]) << 32 | int(row["position"])
                digest = mix64(digest ^ mix64(int(row["seed"])) ^ draw)
            drawn.append(digest % vocab)
            wanted = int(row["logprobs"])
            chosen.append(0.0 if wanted < 0 else -(digest >> 40) * 2.0**-24)
            alternatives = np.arange(max(wanted, 0))
            ids.append(((digest % vocab + alternatives) % vocab).astype(np.int32))
            values.append((chosen[-1] - alternatives).astype(np.float32))
        return StepOutput(
            np.asarray(drawn, np.int32),
            np.asarray(chosen, np.float32),
            Ragged.of(list(ids), np.int32),
            Ragged.of(list(values), np.float32),
        )

    def _seen(self, batch: Batch, group: int, sequence: int, position: int) -> int:
        """The hash of all positions that ``position`` sees in a group."""
        size, window = self.plan.block_size, self._windows[group]
        low = max(0, position - window + 1) if window else 0
        first = low // size
        blocks = batch.block_tables[group][sequence, first : position // size + 1]
        if blocks.min(initial=0) < 0:
            raise UsageError("null backend: a block that the window sees is missing")
        tokens = self._state[group][blocks].reshape(-1)
        return self._fold(tokens[low - first * size : position + 1 - first * size], low)

    def _fold(self, values: npt.NDArray[Any], first: int) -> int:
        """A polynomial hash of the values at positions ``first`` and on, modulo 2^64."""
        stop = first + len(values)
        if stop > len(self._powers):
            factors = np.full(2 * stop, _MULTIPLIER, np.uint64)
            factors[0] = 1
            self._powers = np.cumprod(factors)
        return int(np.dot(values, self._powers[first:stop])) & _MASK


def null_program(vocab: int = 256, windows: Sequence[int] = (0,)) -> Program:
    """A program for tests: one attention layer a window (0 attends to everything)."""
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embedding", vocab, 2)
    for index, window in enumerate(windows):
        with builder.scope(f"layers.{index}"):
            q, k, v = (builder.linear(x, name, 2) for name in "qkv")
            x = builder.attention(
                q, k, v, heads=1, kv_heads=1, head_dim=2, scale=1.0, window=window
            )
    x = builder.gather_rows(x, builder.output_rows)
    return builder.finish(builder.linear(x, "head", vocab))
