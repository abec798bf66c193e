"""Builds a program: what model files write.

Every method adds one operator and returns its result. Shapes are checked at once, so an
error points at the line of the model file that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sartor.errors import UsageError
from sartor.graph.program import (
    KVStateSpec,
    Node,
    Program,
    StateSpec,
    Value,
    ValueType,
    WeightSpec,
)
from sartor.ops.operators import Shape, operator
from sartor.ops.rope import RopeSpec


class Builder:
    """Collects values and nodes of one program."""

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._weights: dict[str, WeightSpec] = {}
        self._states: list[StateSpec] = []
        self._ropes: list[RopeSpec] = []
        self._scopes: list[str] = []
        self._names: set[str] = set()
        self.token_ids = self._value("token_ids", ("T",), "int32", "input")
        self.positions = self._value("positions", ("T",), "int32", "input")
        self.output_rows = self._value("output_rows", ("R",), "int32", "input")

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of nodes, weights and states made inside."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def path(self, name: str) -> str:
        return ".".join([*self._scopes, name])

    # Operators ------------------------------------------------------------------------

    def embedding(self, ids: Value, name: str, rows: int, width: int, scale: float = 1.0) -> Value:
        table = self._weight(f"{name}.weight", (rows, width), ("vocab", "hidden"))
        return self._node(name, "embedding", [ids, table], scale=scale)

    def linear(
        self,
        x: Value,
        name: str,
        width: int,
        *,
        bias: bool = False,
        axes: tuple[str, str] = ("", ""),
        weight: str | None = None,
    ) -> Value:
        """``x @ W.T (+ b)`` to ``width`` features; ``axes`` name W's axes (output, input).

        ``weight`` reads another weight by its absolute name (tied heads).
        """
        source = x.shape[1]
        assert isinstance(source, int)
        if weight is None:
            inputs = [x, self._weight(f"{name}.weight", (width, source), axes)]
        else:
            inputs = [x, self._values[self._weights[weight].value]]
        if bias:
            inputs.append(self._weight(f"{name}.bias", (width,), axes[:1]))
        return self._node(name, "linear", inputs)

    def rms_norm(
        self, x: Value, name: str, *, eps: float, run: int = 0, weight_offset: float = 0.0
    ) -> Value:
        """RMS norm of a row, or of each run of ``run`` features (q/k norm)."""
        width = run or x.shape[1]
        assert isinstance(width, int)
        weight = self._weight(f"{name}.weight", (width,), ("",))
        return self._node(name, "rms_norm", [x, weight], eps=eps, weight_offset=weight_offset)

    def layer_norm(self, x: Value, name: str, *, eps: float, bias: bool = True) -> Value:
        width = x.shape[1]
        assert isinstance(width, int)
        inputs = [x, self._weight(f"{name}.weight", (width,), ("",))]
        if bias:
            inputs.append(self._weight(f"{name}.bias", (width,), ("",)))
        return self._node(name, "layer_norm", inputs, eps=eps)

    def rope(self, x: Value, spec: RopeSpec, head_dim: int, name: str) -> Value:
        if spec not in self._ropes:
            self._ropes.append(spec)
        index = self._ropes.index(spec)
        return self._node(name, "rope", [x], rope=index, head_dim=head_dim)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        value_dim: int = 0,
        window: int = 0,
        softcap: float = 0.0,
        sinks: bool = False,
        name: str = "attention",
    ) -> Value:
        """Writes k and v into a new KV state and attends q over it (causal)."""
        value_dim = value_dim or head_dim
        state = len(self._states)
        self._states.append(
            KVStateSpec(self.path(name), kv_heads, head_dim, value_dim, window=window)
        )
        self._node(f"{name}.kv_write", "kv_write", [k, v], state=state)
        inputs = [q]
        if sinks:
            inputs.append(self._weight(f"{name}.sinks", (heads,), ("heads",)))
        return self._node(
            name,
            "attention",
            inputs,
            state=state,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    def activation(self, x: Value, kind: str, name: str = "activation") -> Value:
        return self._node(name, "activation", [x], kind=kind)

    def gated_activation(
        self, gate: Value, up: Value, kind: str, name: str = "activation"
    ) -> Value:
        return self._node(name, "gated_activation", [gate, up], kind=kind)

    def add(self, x: Value, y: Value, name: str = "add") -> Value:
        return self._node(name, "add", [x, y])

    def mul(self, x: Value, y: Value, name: str = "mul") -> Value:
        return self._node(name, "mul", [x, y])

    def scale(self, x: Value, factor: float, name: str = "scale") -> Value:
        return self._node(name, "scale", [x], factor=factor)

    def softcap(self, x: Value, cap: float, name: str = "softcap") -> Value:
        return self._node(name, "softcap", [x], cap=cap)

    def gather_rows(self, x: Value, rows: Value, name: str = "gather_rows") -> Value:
        return self._node(name, "gather_rows", [x, rows])

    def finish(self, logits: Value) -> Program:
        """Ends the program: samples from ``logits [R, vocab]``."""
        vocab = logits.shape[1]
        assert isinstance(vocab, int)
        if logits.shape[0] != "R":
            raise UsageError("program: gather the output rows before the head")
        tokens = self._node("sample", "sample", [logits])
        return Program(
            values=tuple(self._values),
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
            states=tuple(self._states),
            ropes=tuple(self._ropes),
            inputs={
                "token_ids": self.token_ids.id,
                "positions": self.positions.id,
                "output_rows": self.output_rows.id,
            },
            outputs={"logits": logits.id, "tokens": tokens.id},
            vocab=vocab,
        )

    # Parts ----------------------------------------------------------------------------

    def _value(
        self, name: str, shape: Shape, dtype: ValueType = "fp32", source: Any = "node"
    ) -> Value:
        value = Value(len(self._values), name, shape, dtype, source)
        self._values.append(value)
        return value

    def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Value:
        name = self.path(name)
        if name in self._weights:
            raise UsageError(f"program: weight {name} is declared twice")
        value = self._value(name, shape, "fp32", "weight")
        self._weights[name] = WeightSpec(name, value.id, shape, axes)
        return value

    def _node(self, name: str, op: str, inputs: Sequence[Value], **attributes: Any) -> Value:
        entry = operator(op)
        missing = set(entry.attributes) ^ set(attributes)
        if missing:
            raise UsageError(f"operator {op}: attributes {sorted(missing)} missing or unknown")
        name = self.path(name)
        if name in self._names:
            raise UsageError(f"program: two nodes are named {name}")
        self._names.add(name)
        shapes = entry.infer([value.shape for value in inputs], attributes)
        dtype: ValueType = "int32" if op == "sample" else "fp32"
        outputs = [self._value(name, shape, dtype) for shape in shapes]
        self._nodes.append(
            Node(
                name,
                op,
                tuple(value.id for value in inputs),
                tuple(value.id for value in outputs),
                attributes,
            )
        )
        return outputs[0] if outputs else inputs[0]
