"""The null backend: no arithmetic, but a state that notices every mistake in its use.

Its state holds the token ids that were written, slot by slot through the block tables, and
the token that it draws is a hash of everything a sequence can see, read back through the
tables. A recurrent state is a hash of the state before it and of the token. A wrong block, a
stale one, a missing one or a wrong position changes the answer or is an error.

Devices named ``null-<n>ms`` take n milliseconds a step; on ``null-async`` and
``null-async-<n>ms`` a step is submitted at once and done when it is collected.
"""

from __future__ import annotations

import hashlib
import re
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sartor.backends.base import Device, MemoryUse, PackedWeights, WeightSource
from sartor.errors import UsageError
from sartor.graph import Batch, Builder, Capabilities, LowRank, Program, Ragged, StepOutput
from sartor.ops import CORE_OPERATORS
from sartor.ops.rope import inverse_frequencies
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
            Device(f"{name}-{ms}ms" if ms else name, self.name, f"{ms} ms a step", 1 << 40)
            for name in ("null", "null-async")
            for ms in _DELAYS_MS
        ]

    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup"}),
            activations=frozenset({"fp32", "int8"}),
            kv_formats=frozenset({"fp32", "bf16", "fp16", "int8"}),
            adapters=True,
            copies=True,
            asynchronous=device.startswith("null-async"),
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
        match = re.fullmatch(r"null(-async)?(?:-(\d+)ms)?", device)
        if match is None:
            names = ", ".join(d.name for d in self.devices())
            raise UsageError(f"null backend: no device {device!r}; choose from {names}")
        plan = plan.replace(backend=self.name, device=device)
        delay = int(match[2] or 0) / 1000
        return NullExecutable(program, plan, delay, asynchronous=match[1] is not None)


class NullExecutable:
    """Remembers tokens; ``delay`` is the shortest time of a step, in seconds.

    An ``asynchronous`` one runs a step when somebody collects it (or a later one, or changes
    what it depends on): a batch whose arrays were used again in the meantime is found out.
    """

    def __init__(
        self,
        program: Program,
        plan: ExecutionPlan,
        delay: float = 0.0,
        *,
        asynchronous: bool = False,
    ) -> None:
        self.program = program
        self.plan = plan
        self.delay = delay
        self._groups = program.groups()
        self._by_length = [rope for rope in program.ropes if rope.depends_on_length]
        self._state: list[npt.NDArray[np.uint64]] = []
        self._powers = np.ones(1, np.uint64)
        self._asynchronous = asynchronous
        self._submitted: deque[tuple[int, Batch, float]] = deque()
        self._finished: dict[int, StepOutput] = {}
        self._collected = -1
        self._drawn: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._free_at = 0.0
        self._next_handle = 0
        self._adapters: dict[int, int] = {}

    def block_bytes(self, group: int) -> int:
        return self._slots(group) * 8

    def _slots(self, group: int) -> int:
        """Numbers in one block: one a position, or one state."""
        return 1 if self._groups[group].kind == "recurrent" else self.plan.block_size

    def allocate_state(self, blocks: Sequence[int]) -> None:
        # Rubbish, not zeros: reading what was never written must change the answer.
        rubbish = np.uint64(0xBAD0BAD0BAD0BAD)
        self._state = [np.full((n, self._slots(g)), rubbish) for g, n in enumerate(blocks)]

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        """Remembers a digest: answers under another adapter are different ones."""
        self._run()
        parts = [part for name in sorted(layers) for part in (name.encode(), *_bytes(layers[name]))]
        self._adapters[index] = _digest(*parts)

    def drop_adapter(self, index: int) -> None:
        self._run()
        del self._adapters[index]

    def memory(self) -> MemoryUse:
        return MemoryUse(0, sum(a.nbytes for a in self._state), 0)

    def kernel_path(self, node: str) -> str:
        return f"null {self.program.node(node).op}"

    def close(self) -> None:
        self._state = []

    def submit(self, batch: Batch) -> int:
        if len(self._state) != len(self._groups):
            raise UsageError("null backend: allocate_state before the first step")
        batch.validate()
        handle = self._next_handle
        if batch.tokens.min(initial=0) < 0 and self._collected >= handle - 1:
            raise UsageError("null backend: a token names an output, but no step is in flight")
        self._next_handle += 1
        self._free_at = max(self._free_at, time.perf_counter()) + self.delay
        self._submitted.append((handle, batch, self._free_at))
        if not self._asynchronous:
            self._run()
        return handle

    def collect(self, handle: int) -> StepOutput:
        if handle <= self._collected:  # one that was never collected had an interrupted caller
            raise UsageError(f"null backend: step {handle} is collected too late or twice")
        self._collected = handle
        self._run(handle)
        return self._finished.pop(handle)

    def _run(self, last: int | None = None) -> None:
        """Carries out what was submitted, up to step ``last``."""
        while self._submitted and (last is None or self._submitted[0][0] <= last):
            handle, batch, ready = self._submitted.popleft()
            output = self._read(batch, self._write(batch, self._resolved(batch)))
            time.sleep(max(0.0, ready - time.perf_counter()))
            self._drawn = output.tokens
            self._finished[handle] = output

    def _resolved(self, batch: Batch) -> npt.NDArray[np.int32]:
        if batch.tokens.min(initial=0) >= 0:
            return batch.tokens
        names = np.where(batch.tokens < 0, -1 - batch.tokens, 0)
        return np.where(batch.tokens < 0, self._drawn[names], batch.tokens).astype(np.int32)

    def _write(self, batch: Batch, tokens: npt.NDArray[np.int32]) -> dict[int, list[int]]:
        """Stores the step's tokens; the states after each of them, by recurrent group."""
        sequences = np.repeat(np.arange(len(batch.contexts)), np.diff(batch.starts))
        within = np.arange(len(tokens)) - np.repeat(batch.starts[:-1], np.diff(batch.starts))
        at = batch.contexts[sequences] + within
        if not np.array_equal(at, batch.positions):
            raise UsageError("null backend: positions do not follow from contexts")
        values = (tokens + 1).astype(np.uint64)
        if self._by_length:
            ropes = [self._rope_digest(int(length)) for length in batch.rope_lengths]
            values |= np.array(ropes, np.uint64)[sequences] << np.uint64(32)
        for row, vector in zip(batch.embedding_rows.tolist(), batch.embeddings, strict=True):
            values[row] = _digest(vector.tobytes())
        if len(batch.adapters):
            digests = [self._adapters[i] if i >= 0 else 0 for i in batch.adapters.tolist()]
            values ^= np.array(digests, np.uint64)[sequences]
        for state, copies in zip(self._state, batch.copies, strict=False):
            state[copies[:, 1]] = state[copies[:, 0]]
        size = self.plan.block_size
        states: dict[int, list[int]] = {}
        for group, (table, state) in enumerate(zip(batch.block_tables, self._state, strict=True)):
            if self._groups[group].kind == "recurrent":
                states[group] = self._scan(batch, table, state[:, 0], values)
                continue
            blocks = table[sequences, at // size]
            if blocks.min(initial=0) < 0:
                raise UsageError("null backend: a token is written outside of its blocks")
            state[blocks, at % size] = values
        return states

    def _scan(
        self,
        batch: Batch,
        table: npt.NDArray[np.int32],
        state: npt.NDArray[np.uint64],
        values: npt.NDArray[np.uint64],
    ) -> list[int]:
        """Carries the state of every sequence on; the states after each token."""
        size = self.plan.block_size
        states: list[int] = []
        for s, context in enumerate(batch.contexts.tolist()):
            start, stop = int(batch.starts[s]), int(batch.starts[s + 1])
            read, written = (context - 1) // size, (context + stop - start - 1) // size
            named = set(np.flatnonzero(table[s] >= 0).tolist())
            if named != {read, written} - {-1}:
                raise UsageError(
                    f"null backend: a recurrent state is read from run {read} and written to run "
                    f"{written}, but blocks are held for {sorted(named)}"
                )
            current = int(state[table[s, read]]) if context else 0
            for value in values[start:stop].tolist():
                current = mix64(current ^ mix64(value))
                states.append(current)
            state[table[s, written]] = current
        return states

    def _read(self, batch: Batch, states: dict[int, list[int]]) -> StepOutput:
        rows = np.searchsorted(batch.starts, batch.output_rows, side="right") - 1
        drawn, chosen, ids, values = [], [], [], []
        vocab = self.program.vocab
        for r, (s, row) in enumerate(zip(rows, batch.sampling, strict=True)):
            position = int(batch.positions[batch.output_rows[r]])
            if row["position"] != position + 1:
                raise UsageError("null backend: a sampling row is not for the next position")
            digest = mix64(position)
            for group in range(len(self._state)):
                seen = (
                    states[group][batch.output_rows[r]]
                    if group in states
                    else self._seen(batch, group, int(s), position)
                )
                digest = mix64(digest ^ seen)
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

    def _rope_digest(self, length: int) -> int:
        """Different where sequences of two admitted lengths are rotated differently."""
        tables = (inverse_frequencies(rope, length).tobytes() for rope in self._by_length)
        return zlib.crc32(b"".join(tables))

    def _seen(self, batch: Batch, group: int, sequence: int, position: int) -> int:
        """The hash of all positions that ``position`` sees in a group."""
        size, window = self.plan.block_size, self._groups[group].window
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


def _digest(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little")


def _bytes(layer: LowRank) -> tuple[bytes, bytes]:
    return layer.down.tobytes(), layer.up.tobytes()


def null_program(
    vocab: int = 256, windows: Sequence[int] = (0,), recurrent: int = 0, width: int = 2
) -> Program:
    """A program for tests: one attention layer a window (0 attends to everything), and
    ``recurrent`` layers that keep a state of fixed size; prompts may come as vectors of
    ``width`` features."""
    builder = Builder()
    x = builder.embedding(builder.token_ids, "embedding", vocab, width)
    x = builder.embedding_segments(x)
    for index in range(recurrent):
        x = builder.short_conv(x, f"convolutions.{index}", 4)
    for index, window in enumerate(windows):
        with builder.scope(f"layers.{index}"):
            q, k, v = (builder.linear(x, name, width) for name in "qkv")
            x = builder.attention(
                q, k, v, heads=1, kv_heads=1, head_dim=width, scale=1.0, window=window
            )
    x = builder.gather_rows(x, builder.output_rows)
    return builder.finish(builder.linear(x, "head", vocab))
