"""One step of a program, node by node, in numpy.

Open to other backends: a chip that has kernels for some operators subclasses :class:`Step`,
overrides :meth:`Step.handler`, and leaves the rest to numpy (``examples/``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sartor.backends.reference.sample import sample
from sartor.backends.reference.state import ReferenceState
from sartor.graph import Batch, LowRank, Program, StepOutput
from sartor.ops import experts, functions, recurrent
from sartor.ops.rope import cos_sin, rotate
from sartor.ops.weights import F32, Weight
from sartor.plan import ExecutionPlan

Array = npt.NDArray[Any]


class StepOwner(Protocol):
    """What a step asks of its executable. ``logits`` is the value that the head makes."""

    program: Program
    plan: ExecutionPlan
    logits: int
    state: ReferenceState
    adapters: dict[int, Mapping[str, LowRank]]

    def weight(self, value: int) -> Weight:
        """A matrix in canonical form."""

    def dense(self, value: int) -> F32:
        """A weight in float32."""


class Step:
    """One pass over the nodes."""

    def __init__(self, executable: StepOwner, batch: Batch) -> None:
        self.executable = executable
        self.batch = batch
        self.outputs: tuple[int, ...] = ()
        given = {
            "token_ids": batch.tokens,
            "positions": batch.positions,
            "output_rows": batch.output_rows,
            "embedding_rows": batch.embedding_rows,
            "embeddings": batch.embeddings,
        }
        inputs = executable.program.inputs
        self.results: dict[int, Array] = {inputs[name]: given[name] for name in inputs}
        if "embeddings" in inputs and not len(batch.embedding_rows):
            width = executable.program.values[inputs["embeddings"]].shape[1]
            assert isinstance(width, int)
            self.results[inputs["embeddings"]] = np.zeros((0, width), np.float32)

    def run(self) -> StepOutput:
        program = self.executable.program
        taps: dict[str, Array] = {}
        sampled: StepOutput | None = None
        for node in program.nodes:
            if node.op == "sample":
                sampled = sample(self.x(node.inputs[0]), self.batch)
                results: Array | tuple[Array, ...] = sampled.tokens
            else:
                self.outputs = node.outputs
                results = self.handler(node.op)(self, node.inputs, **node.attributes)
            if not isinstance(results, tuple):
                results = (results,)
            for value, result in zip(node.outputs, results, strict=True):
                self.results[value] = result
            if node.name in self.batch.taps:
                taps[node.name] = self.results[node.outputs[-1]]
        if sampled is None:
            return StepOutput.encoded(self.results[program.outputs["embedding"]], taps)
        return StepOutput(
            sampled.tokens, sampled.logprobs, sampled.top_tokens, sampled.top_logprobs, taps
        )

    def handler(self, op: str) -> Handler:
        """The function that runs an operator: ``(step, inputs, **attributes) -> results``."""
        return HANDLERS[op]

    def x(self, value: int) -> Array:
        """An input of an operator: what a node has made, or a weight in float32."""
        if value in self.results:
            return self.results[value]
        return self.executable.dense(value)

    def sequences(self) -> Iterator[tuple[int, slice]]:
        """Every sequence with its rows among the tokens."""
        for s in range(len(self.batch.starts) - 1):
            yield s, slice(self.batch.starts[s], self.batch.starts[s + 1])

    # Linear ---------------------------------------------------------------------------

    def arithmetic(self) -> dict[str, Any]:
        head = self.executable.logits in self.outputs
        return {
            "activation": self.executable.plan.activation,
            "threshold": 0.0 if head else functions.OUTLIER,
        }

    def linear(self, x: int, weight: int, bias: int | None, output: int) -> F32:
        inputs: F32 = self.x(x)
        self.outputs = (output,)
        out = functions.linear(
            inputs,
            self.executable.weight(weight),
            None if bias is None else self.x(bias),
            **self.arithmetic(),
        )
        for rows, layer in self.adapted(weight, output):
            out[rows] += functions.low_rank(inputs[rows], layer.down, layer.up)
        return out

    def adapted(self, weight: int, output: int) -> Iterator[tuple[Array, LowRank]]:
        """Rows of a linear layer that an adapter changes, and what it adds to them."""
        batch = self.batch
        if not len(batch.adapters):
            return
        name = self.executable.program.values[weight].name
        sequence = np.repeat(np.arange(len(batch.adapters)), np.diff(batch.starts))
        rows = self.executable.program.values[output].shape[0]
        if rows == "R":
            sequence = sequence[batch.output_rows]
        elif rows == "S":
            sequence = np.arange(len(batch.adapters))
        adapters = batch.adapters[sequence]
        for index in np.unique(adapters[adapters >= 0]).tolist():
            layer = self.executable.adapters[index].get(name)
            if layer is not None:
                yield np.flatnonzero(adapters == index), layer

    def linear_group(self, inputs: tuple[int, ...], biases: Sequence[bool]) -> tuple[F32, ...]:
        rest = list(inputs[1:])
        out = []
        for has_bias, output in zip(biases, self.outputs, strict=True):
            weight = rest.pop(0)
            bias = rest.pop(0) if has_bias else None
            out.append(self.linear(inputs[0], weight, bias, output))
        return tuple(out)

    def grouped_linear(self, inputs: tuple[int, ...]) -> F32:
        return experts.grouped_linear(
            self.x(inputs[0]),
            self.x(inputs[1]),
            self.executable.weight(inputs[2]),
            self.x(inputs[3]) if len(inputs) > 3 else None,
            **self.arithmetic(),
        )

    def head_linear(self, inputs: tuple[int, ...]) -> F32:
        weight = self.executable.weight(inputs[1])
        return experts.head_linear(self.x(inputs[0]), weight, **self.arithmetic())

    # Positions and state --------------------------------------------------------------

    def rope(self, inputs: tuple[int, ...], rope: int, head_dim: int) -> F32:
        spec = self.executable.program.ropes[rope]
        lengths = np.repeat(self.batch.rope_lengths, np.diff(self.batch.starts))
        cos, sin = cos_sin(spec, self.batch.positions, lengths)
        heads = self.x(inputs[0]).reshape(len(cos), -1, head_dim)
        return rotate(heads, cos, sin, spec.dim, spec.interleaved).reshape(len(cos), -1)

    def write(self, inputs: tuple[int, ...], state: int) -> tuple[()]:
        self.executable.state.write(self.batch, state, self.x(inputs[0]), self.x(inputs[1]))
        return ()

    def attention(self, inputs: tuple[int, ...], state: int, **attributes: Any) -> F32:
        q = self.x(inputs[0]).reshape(-1, attributes["heads"], attributes["head_dim"])
        sinks = self.x(inputs[1]) if len(inputs) > 1 else None
        out = np.zeros((len(q), attributes["heads"] * attributes["value_dim"]), np.float32)
        window = attributes["window"]
        for s, rows in self.sequences():
            first = int(self.batch.contexts[s])
            low = max(0, first - window + 1) if window else 0
            high = first + rows.stop - rows.start
            k, v = self.executable.state.read(self.batch, state, s, low, high)
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

    def self_attention(
        self,
        inputs: tuple[int, ...],
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        scale: float,
        window: int,
    ) -> F32:
        q = self.x(inputs[0]).reshape(-1, heads, head_dim)
        k = self.x(inputs[1]).reshape(-1, kv_heads, head_dim)
        v = self.x(inputs[2]).reshape(-1, kv_heads, value_dim)
        out = np.zeros((len(q), heads * value_dim), np.float32)
        for _, rows in self.sequences():
            part = functions.attend(
                q[rows], k[rows], v[rows], first=0, scale=scale, window=window, causal=False
            )
            out[rows] = part.reshape(len(part), -1)
        return out

    def latent_attention(
        self,
        inputs: tuple[int, ...],
        state: int,
        heads: int,
        rank: int,
        rope_dim: int,
        scale: float,
    ) -> F32:
        q = self.x(inputs[0]).reshape(-1, heads, rank + rope_dim)
        out = np.zeros((len(q), heads * rank), np.float32)
        for s, rows in self.sequences():
            first = int(self.batch.contexts[s])
            high = first + rows.stop - rows.start
            (keys,) = self.executable.state.read(self.batch, state, s, 0, high)
            part = functions.attend(q[rows], keys, keys[:, :, :rank], first=first, scale=scale)
            out[rows] = part.reshape(len(part), -1)
        return out

    def latent_write(self, inputs: tuple[int, ...], state: int) -> tuple[()]:
        together = np.concatenate([self.x(inputs[0]), self.x(inputs[1])], axis=1)
        self.executable.state.write(self.batch, state, together)
        return ()

    def short_conv(self, inputs: tuple[int, ...], state: int) -> F32:
        x, weight = self.x(inputs[0]), self.x(inputs[1])
        bias = self.x(inputs[2]) if len(inputs) > 2 else None
        out = np.zeros_like(x)
        memory = self.executable.state
        for s, rows in self.sequences():
            before = memory.load(self.batch, state, s)
            out[rows], after = recurrent.short_conv(x[rows], weight, bias, before)
            memory.store(self.batch, state, s, after)
        return out

    def recurrent_scan(
        self,
        inputs: tuple[int, ...],
        state: int,
        heads: int,
        key_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float,
        delta: bool,
    ) -> F32:
        q, k, v, decay, beta = (self.x(i) for i in inputs)
        q, k = (part.reshape(-1, key_heads, key_dim) for part in (q, k))
        v = v.reshape(-1, heads, value_dim)
        out = np.zeros_like(v)
        memory = self.executable.state
        for s, rows in self.sequences():
            before = memory.load(self.batch, state, s)
            out[rows], after = recurrent.recurrent_scan(
                q[rows],
                k[rows],
                v[rows],
                decay[rows],
                beta[rows],
                before,
                scale=scale,
                delta=delta,
            )
            memory.store(self.batch, state, s, after)
        return out.reshape(len(out), -1)

    def pool(self, inputs: tuple[int, ...], kind: str) -> F32:
        return functions.pool(self.x(inputs[0]), self.batch.starts, kind=kind)

    def add_rms_norm(self, inputs: tuple[int, ...], **attributes: Any) -> tuple[F32, F32]:
        total = self.x(inputs[0]) + self.x(inputs[1])
        return total, functions.rms_norm(total, self.x(inputs[2]), **attributes)


Handler = Callable[..., Any]


def _plain(function: Callable[..., Any]) -> Handler:
    return lambda step, inputs, **attributes: function(*(step.x(i) for i in inputs), **attributes)


_SPECIAL: dict[str, Handler] = {
    "embedding": lambda step, inputs, **attributes: functions.embedding(
        step.x(inputs[0]), step.executable.weight(inputs[1]), **attributes
    ),
    "linear": lambda step, inputs: step.linear(
        inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None, step.outputs[0]
    ),
    "linear_group": Step.linear_group,
    "grouped_linear": Step.grouped_linear,
    "head_linear": Step.head_linear,
    "rope": Step.rope,
    "kv_write": Step.write,
    "attention": Step.attention,
    "self_attention": Step.self_attention,
    "latent_write": Step.latent_write,
    "latent_attention": Step.latent_attention,
    "short_conv": Step.short_conv,
    "recurrent_scan": Step.recurrent_scan,
    "pool": Step.pool,
    "add_rms_norm": Step.add_rms_norm,
}
_PLAIN: dict[str, Handler] = {
    function.__name__: _plain(function)
    for function in (
        functions.rms_norm,
        functions.layer_norm,
        functions.l2_norm,
        functions.activation,
        functions.gated_activation,
        functions.add,
        functions.mul,
        functions.scale,
        functions.softcap,
        functions.split,
        functions.concat,
        functions.replace_rows,
        functions.gather_rows,
        experts.route_experts,
        experts.combine_experts,
    )
}
HANDLERS: Mapping[str, Handler] = _SPECIAL | _PLAIN
