"""The engine's contract on a model of ``transformers``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sartor.backends.base import MemoryUse
from sartor.backends.reference.sample import sample
from sartor.backends.torch.devices import free_bytes
from sartor.engine.fallback.causal_lm import CausalLM
from sartor.engine.fallback.memories import Memories
from sartor.engine.fallback.model import BACKEND, LOGITS, NO_ADAPTERS
from sartor.engine.fallback.probe import Probe
from sartor.errors import UnsupportedError, UsageError
from sartor.graph import (
    Batch,
    KVStateSpec,
    LowRank,
    Node,
    Program,
    RecurrentStateSpec,
    StepOutput,
    Value,
)
from sartor.graph.batch import F32
from sartor.graph.program import StateSpec
from sartor.plan import ExecutionPlan


def opaque_program(vocab: int, found: Probe, element_bytes: int) -> Program:
    """What the engine needs to know: inputs, outputs, and what a sequence's memory takes."""
    names = ("token_ids", "positions", "output_rows")
    values = [
        *(Value(i, name, ("TTR"[i],), "int32", "input") for i, name in enumerate(names)),
        Value(3, LOGITS, ("R", vocab)),
        Value(4, "sample", ("R",), "int32"),
    ]
    states: list[StateSpec] = []
    if found.token_bytes:
        features = -(-found.token_bytes // element_bytes)
        states.append(KVStateSpec("cache", kv_heads=1, head_dim=features, value_dim=0))
    if found.fixed_bytes or not states:
        states.append(RecurrentStateSpec("fixed_cache", (-(-max(found.fixed_bytes, 4) // 4),)))
    return Program(
        values=tuple(values),
        nodes=(
            Node(LOGITS, BACKEND, (0, 1, 2), (3,)),
            Node("sample", "sample", (3,), (4,)),
        ),
        weights=(),
        states=tuple(states),
        ropes=(),
        inputs={name: i for i, name in enumerate(names)},
        outputs={LOGITS: 3, "tokens": 4},
        vocab=vocab,
    )


class FallbackExecutable:
    """Runs the sequences of a batch one after another; samples as every backend does."""

    def __init__(
        self, lm: CausalLM, program: Program, plan: ExecutionPlan, taps: Sequence[str] = ()
    ) -> None:
        """UnsupportedError for a tap other than the logits: the inside is not known here."""
        for tap in taps:
            if tap != LOGITS:
                raise UnsupportedError(
                    f"{lm.name} runs through transformers: its node {tap!r} cannot be tapped, "
                    f"only {LOGITS!r}"
                )
        self.program = program
        self.plan = plan
        self._lm: CausalLM | None = lm
        self._device = lm.device
        self._element_bytes = int(lm.model.dtype.itemsize)
        self._path = f"transformers {lm.name}, {lm.mode}, {lm.model.dtype} on {lm.device}"
        tensors = [*lm.model.parameters(), *lm.model.buffers()]
        self._weight_bytes = int(sum(tensor.nbytes for tensor in tensors))
        self._weights = int(sum(tensor.numel() for tensor in tensors))
        self.memories = Memories(program.groups(), plan.block_size)
        self._finished: dict[int, StepOutput] = {}
        self._handles = 0

    def block_bytes(self, group: int) -> int:
        spec = self.program.states[self.program.groups()[group].states[0]]
        if isinstance(spec, RecurrentStateSpec):
            return spec.nbytes
        assert isinstance(spec, KVStateSpec)  # its features are the probe's bytes
        return spec.head_dim * self._element_bytes * self.plan.block_size

    def allocate_state(self, blocks: Sequence[int]) -> None:
        """Memory is taken as sequences grow, and never more than ``blocks`` stand for."""
        self.memories.clear()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self._weight_bytes / self._weights

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        raise UnsupportedError(NO_ADAPTERS)

    def drop_adapter(self, index: int) -> None:
        raise UnsupportedError(NO_ADAPTERS)

    def submit(self, batch: Batch) -> int:
        if self._lm is None:
            raise UsageError("transformers: the model was closed; load it again")
        batch.validate()
        logits = np.concatenate(
            [
                np.zeros((0, self.program.vocab), np.float32),
                *(self._sequence(self._lm, batch, s) for s in range(len(batch.contexts))),
            ]
        )
        # They came sequence by sequence, and a batch may ask for them in any order.
        logits = logits[np.argsort(np.argsort(batch.output_rows))]
        output = dataclasses.replace(
            sample(logits, batch), taps={LOGITS: logits} if batch.taps else {}
        )
        handle = self._handles
        self._handles += 1
        self._finished[handle] = output
        return handle

    def _sequence(self, lm: CausalLM, batch: Batch, sequence: int) -> F32:
        """Logits of the output rows of one sequence, in their order in it."""
        start, stop = (int(i) for i in batch.starts[sequence : sequence + 2])
        rows = np.sort(batch.output_rows[(batch.output_rows >= start) & (batch.output_rows < stop)])
        wanted = stop - int(rows[0]) if len(rows) else 0
        memory = self.memories.claim(batch, sequence)
        logits, memory.content = lm.step(batch.tokens[start:stop].tolist(), memory.content, wanted)
        found: F32 = logits[rows - (stop - wanted), : self.program.vocab]
        return found

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    def memory(self) -> MemoryUse:
        free = None if self._device.type == "cpu" else free_bytes(self._device)
        return MemoryUse(self._weight_bytes, self.memories.nbytes, 0, free)

    def kernel_path(self, node: str) -> str:
        self.program.node(node)
        return self._path

    def close(self) -> None:
        self.memories.clear()
        self._lm = None
