"""The reference backend: a program interpreted operator by operator in numpy.

It defines what is right. It is slow and needs nothing but numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from sartor.backends.base import Device, MemoryUse, PackedWeights, WeightSource
from sartor.backends.loading import load_weights
from sartor.errors import UsageError
from sartor.graph import Batch, Capabilities, Program, Ragged, StepOutput
from sartor.graph.passes import logits_linear
from sartor.ops import CORE_OPERATORS, FUSED_OPERATORS, functions
from sartor.ops.rope import cos_sin, rotate
from sartor.ops.sampling import SampleRow, log_softmax, sample_row
from sartor.ops.weights import F32, Weight, from_float32, to_float32
from sartor.plan import ExecutionPlan

Array = npt.NDArray[Any]


class ReferenceWeights:
    """Canonical weights, kept as they are."""

    def __init__(self, weights: dict[str, Weight]) -> None:
        self.by_name = weights

    @property
    def nbytes(self) -> int:
        parts = [(w.data, w.scale, w.offset) for w in self.by_name.values()]
        return sum(array.nbytes for part in parts for array in part if array is not None)

    @property
    def bits_per_weight(self) -> float:
        total = sum(w.data.size for w in self.by_name.values())
        return sum(w.format.bits_per_weight * w.data.size for w in self.by_name.values()) / total


class ReferenceBackend:
    """Every operator and format, on any machine."""

    name = "reference"

    def devices(self) -> list[Device]:
        memory = psutil.virtual_memory().total
        return [Device("reference", self.name, "numpy reference", memory)]

    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            fused=frozenset(FUSED_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup"}),
            activations=frozenset({"fp32", "int8"}),
            kv_formats=frozenset({"fp32", "bf16", "fp16"}),
        )

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> ReferenceWeights:
        return ReferenceWeights(load_weights(program, source))

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> ReferenceExecutable:
        assert isinstance(weights, ReferenceWeights)
        for tap in taps:
            program.node(tap)
        return ReferenceExecutable(program, weights, plan.replace(backend=self.name, device=device))


class ReferenceExecutable:
    """Runs a program node by node."""

    def __init__(self, program: Program, weights: ReferenceWeights, plan: ExecutionPlan) -> None:
        self.program = program
        self.plan = plan
        self._weights = weights
        self._by_value = {
            value: weights.by_name[spec.name] for value, spec in program.weight_values().items()
        }
        self.logits = logits_linear(program)
        self._dense: dict[int, F32] = {}
        self._group_of = {s: g.index for g in program.groups() for s in g.states}
        self._keys: list[Array] = []
        self._values: list[Array] = []
        self._finished: dict[int, StepOutput] = {}
        self._next_handle = 0

    def block_bytes(self, group: int) -> int:
        element = 4 if self.plan.kv == "fp32" else 2
        states = self.program.groups()[group].states
        return self.plan.block_size * sum(
            self.program.states[s].bytes_per_token(element) for s in states
        )

    def allocate_state(self, blocks: Sequence[int]) -> None:
        kind = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[self.plan.kv]
        self._keys, self._values = [], []
        for index, state in enumerate(self.program.states):
            shape = (blocks[self._group_of[index]], self.plan.block_size, state.kv_heads)
            self._keys.append(np.zeros((*shape, state.head_dim), kind))
            self._values.append(np.zeros((*shape, state.value_dim), kind))

    def memory(self) -> MemoryUse:
        state = sum(a.nbytes for a in (*self._keys, *self._values))
        return MemoryUse(self._weights.nbytes, state, 0)

    def kernel_path(self, node: str) -> str:
        return f"numpy {self.program.node(node).op}"

    def close(self) -> None:
        self._keys, self._values = [], []

    def submit(self, batch: Batch) -> int:
        batch.validate()
        if self.program.states and not self._keys:
            raise UsageError("reference backend: allocate_state before the first step")
        handle = self._next_handle
        self._next_handle += 1
        self._finished[handle] = _Step(self, self._resolved(batch)).run()
        return handle

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    def _resolved(self, batch: Batch) -> Batch:
        """Tokens that name an output in flight: here the last step has always finished."""
        if not len(batch.tokens) or batch.tokens.min() >= 0:
            return batch
        last = self._finished[self._next_handle - 2].tokens
        names = np.where(batch.tokens < 0, -1 - batch.tokens, 0)
        tokens = np.where(batch.tokens < 0, last[names], batch.tokens).astype(np.int32)
        return Batch(**{**batch.__dict__, "tokens": tokens})

    def dense(self, value: int) -> F32:
        if value not in self._dense:
            self._dense[value] = self._by_value[value].dequantize()
        return self._dense[value]

    def weight(self, value: int) -> Weight:
        return self._by_value[value]

    # State ----------------------------------------------------------------------------

    def slots(
        self, batch: Batch, state: int, sequence: int, positions: Array
    ) -> tuple[Array, Array]:
        table = batch.block_tables[self._group_of[state]][sequence]
        blocks = table[positions // self.plan.block_size]
        return blocks, positions % self.plan.block_size

    def write(self, batch: Batch, state: int, k: F32, v: F32) -> None:
        spec = self.program.states[state]
        keys = from_float32(k.reshape(len(k), spec.kv_heads, spec.head_dim), self.plan.kv)
        values = from_float32(v.reshape(len(v), spec.kv_heads, spec.value_dim), self.plan.kv)
        for s in range(len(batch.starts) - 1):
            rows = np.arange(batch.starts[s], batch.starts[s + 1])
            at = batch.contexts[s] + np.arange(len(rows))
            blocks, offsets = self.slots(batch, state, s, at)
            self._keys[state][blocks, offsets] = keys[rows]
            self._values[state][blocks, offsets] = values[rows]

    def read(self, batch: Batch, state: int, sequence: int, low: int, high: int) -> tuple[F32, F32]:
        blocks, offsets = self.slots(batch, state, sequence, np.arange(low, high))
        return (
            to_float32(self._keys[state][blocks, offsets], self.plan.kv),
            to_float32(self._values[state][blocks, offsets], self.plan.kv),
        )


class _Step:
    """One pass over the nodes."""

    def __init__(self, executable: ReferenceExecutable, batch: Batch) -> None:
        self.executable = executable
        self.batch = batch
        self.outputs: tuple[int, ...] = ()
        inputs = executable.program.inputs
        self.results: dict[int, Array] = {
            inputs["token_ids"]: batch.tokens,
            inputs["positions"]: batch.positions,
            inputs["output_rows"]: batch.output_rows,
        }

    def run(self) -> StepOutput:
        program = self.executable.program
        taps: dict[str, Array] = {}
        output = StepOutput(
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            Ragged.of([], np.int32),
            Ragged.of([], np.float32),
        )
        for node in program.nodes:
            arguments = [self.results.get(value) for value in node.inputs]
            if node.op == "sample":
                assert arguments[0] is not None
                output = sample(arguments[0], self.batch)
                results: Array | tuple[Array, ...] = output.tokens
            else:
                self.outputs = node.outputs
                results = HANDLERS[node.op](self, node.inputs, **node.attributes)
            if not isinstance(results, tuple):
                results = (results,)
            for value, result in zip(node.outputs, results, strict=True):
                self.results[value] = result
            if node.name in self.batch.taps:
                taps[node.name] = self.results[node.outputs[-1]]
        return StepOutput(
            output.tokens, output.logprobs, output.top_tokens, output.top_logprobs, taps
        )

    def x(self, value: int) -> Array:
        if value in self.results:
            return self.results[value]
        return self.executable.dense(value)

    def linear(self, x: int, weight: int, bias: int | None, output: int) -> F32:
        inputs: F32 = self.x(x)
        if (
            self.executable.plan.activation == "int8"
            and self.executable.weight(weight).scale is not None
        ):
            threshold = 0.0 if output == self.executable.logits else functions.OUTLIER
            inputs = functions.round_activations(inputs, threshold)
        out: F32 = inputs @ self.executable.dense(weight).T
        return out if bias is None else out + self.x(bias)

    def rope(self, x: int, rope: int, head_dim: int) -> F32:
        spec = self.executable.program.ropes[rope]
        lengths = np.repeat(self.batch.rope_lengths, np.diff(self.batch.starts))
        cos, sin = cos_sin(spec, self.batch.positions, lengths)
        heads = self.x(x).reshape(len(cos), -1, head_dim)
        return rotate(heads, cos, sin, spec.dim, spec.interleaved).reshape(len(cos), -1)

    def attention(self, inputs: tuple[int, ...], state: int, **attributes: Any) -> F32:
        batch, heads = self.batch, attributes["heads"]
        q = self.x(inputs[0]).reshape(-1, heads, attributes["head_dim"])
        sinks = self.x(inputs[1]) if len(inputs) > 1 else None
        out = np.zeros((len(q), heads * attributes["value_dim"]), np.float32)
        window = attributes["window"]
        for s in range(len(batch.starts) - 1):
            rows = slice(batch.starts[s], batch.starts[s + 1])
            first = int(batch.contexts[s])
            low = max(0, first - window + 1) if window else 0
            k, v = self.executable.read(batch, state, s, low, first + rows.stop - rows.start)
            part = functions.attend(
                q[rows],
                k,
                v,
                first=first - low,
                scale=attributes["scale"],
                window=window,
                softcap=attributes["softcap"],
                sinks=sinks,
            )
            out[rows] = part.reshape(len(part), -1)
        return out

    def linear_group(self, inputs: tuple[int, ...], biases: Sequence[bool]) -> tuple[F32, ...]:
        rest = list(inputs[1:])
        out = []
        for has_bias, output in zip(biases, self.outputs, strict=True):
            weight = rest.pop(0)
            bias = rest.pop(0) if has_bias else None
            out.append(self.linear(inputs[0], weight, bias, output))
        return tuple(out)

    def kv_write(self, inputs: tuple[int, ...], state: int) -> tuple[()]:
        self.executable.write(self.batch, state, self.x(inputs[0]), self.x(inputs[1]))
        return ()

    def add_rms_norm(self, inputs: tuple[int, ...], **attributes: Any) -> tuple[F32, F32]:
        total = self.x(inputs[0]) + self.x(inputs[1])
        return total, functions.rms_norm(total, self.x(inputs[2]), **attributes)


Handler = Callable[..., Any]


def _plain(function: Callable[..., Array]) -> Handler:
    return lambda step, inputs, **attributes: function(*(step.x(i) for i in inputs), **attributes)


_SPECIAL: dict[str, Handler] = {
    "embedding": lambda step, inputs, **attributes: functions.embedding(
        step.x(inputs[0]), step.executable.weight(inputs[1]), **attributes
    ),
    "linear": lambda step, inputs: step.linear(
        inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None, step.outputs[0]
    ),
    "rope": lambda step, inputs, **attributes: step.rope(inputs[0], **attributes),
    "kv_write": _Step.kv_write,
    "attention": _Step.attention,
    "linear_group": _Step.linear_group,
    "add_rms_norm": _Step.add_rms_norm,
}
_PLAIN: dict[str, Handler] = {
    name: _plain(getattr(functions, name))
    for name in (
        "rms_norm",
        "layer_norm",
        "activation",
        "gated_activation",
        "add",
        "mul",
        "scale",
        "softcap",
        "gather_rows",
    )
}
HANDLERS = _SPECIAL | _PLAIN


def sample(logits: F32, batch: Batch) -> StepOutput:
    """Samples every output row of a batch and reports log probabilities."""
    tokens, chosen, top_ids, top_values = [], [], [], []
    for r, row in enumerate(batch.sampling):
        history = batch.history.values[batch.history.starts[r] : batch.history.starts[r + 1]]
        span = slice(batch.bias_tokens.starts[r], batch.bias_tokens.starts[r + 1])
        token = sample_row(
            logits[r],
            SampleRow(
                temperature=float(row["temperature"]),
                top_k=int(row["top_k"]),
                top_p=float(row["top_p"]),
                min_p=float(row["min_p"]),
                repetition_penalty=float(row["repetition_penalty"]),
                presence_penalty=float(row["presence_penalty"]),
                frequency_penalty=float(row["frequency_penalty"]),
                seed=int(row["seed"]),
                choice=int(row["choice"]),
                position=int(row["position"]),
                prompt_length=int(row["prompt_length"]),
                history=tuple(int(t) for t in history),
                bias=tuple(
                    zip(
                        (int(t) for t in batch.bias_tokens.values[span]),
                        (float(b) for b in batch.bias_values.values[span]),
                        strict=True,
                    )
                ),
            ),
        )
        tokens.append(token)
        wanted = int(row["logprobs"])
        if wanted < 0:
            chosen.append(0.0)
            top_ids.append(np.zeros(0, np.int32))
            top_values.append(np.zeros(0, np.float32))
            continue
        logprobs = log_softmax(logits[r])
        order = np.lexsort((np.arange(len(logprobs)), -logprobs))[:wanted]
        chosen.append(float(logprobs[token]))
        top_ids.append(order.astype(np.int32))
        top_values.append(logprobs[order])
    return StepOutput(
        np.asarray(tokens, np.int32),
        np.asarray(chosen, np.float32),
        Ragged.of(list(top_ids), np.int32),
        Ragged.of(list(top_values), np.float32),
    )
