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
    LatentStateSpec,
    Node,
    Program,
    RecurrentStateSpec,
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
        self._inputs: dict[str, int] = {}
        self.token_ids = self._input("token_ids", ("T",), "int32")
        self.positions = self._input("positions", ("T",), "int32")
        self.output_rows = self._input("output_rows", ("R",), "int32")

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

    def embedding_segments(self, x: Value, name: str = "embedding_segments") -> Value:
        """Rows of the token embeddings that a request gave as vectors (images, say)."""
        width = x.shape[1]
        rows = self._input("embedding_rows", ("M",), "int32")
        vectors = self._input("embeddings", ("M", width), "fp32")
        return self._node(name, "replace_rows", [x, rows, vectors])

    def token_numbers(self, x: Value, count: int, name: str = "token_numbers") -> Value:
        """``[T, count]`` numbers of each token, which the batch gives as the vectors of all its
        rows (``embeddings``); ``x`` has more features than that and lends its shape only."""
        width = x.shape[1]
        assert isinstance(width, int)
        shape = self.split(x, [count, width - count], f"{name}.shape")[0]
        rows = self._input("embedding_rows", ("M",), "int32")
        numbers = self._input("embeddings", ("M", count), "fp32")
        return self._node(name, "replace_rows", [shape, rows, numbers])

    def vector(self, name: str, width: int, axis: str = "") -> Value:
        """A weight of one row, for :meth:`add` and :meth:`mul`."""
        return self._weight(name, (width,), (axis,))

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
        state = self._state(
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

    def self_attention(
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
        name: str = "attention",
    ) -> Value:
        """Bidirectional attention within the tokens of a step; a step holds whole sequences."""
        return self._node(
            name,
            "self_attention",
            [q, k, v],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim or head_dim,
            scale=scale,
            window=window,
        )

    def latent_attention(
        self,
        q: Value,
        latent: Value,
        rope: Value,
        *,
        heads: int,
        scale: float,
        name: str = "attention",
    ) -> Value:
        """Writes ``latent [T, rank]`` and the rotated ``rope [T, rope_dim]`` into a new state and
        attends ``q [T, heads * (rank + rope_dim)]`` over it: causal, in the absorbed form, so
        the result is ``[T, heads * rank]``."""
        rank, rope_dim = latent.shape[1], rope.shape[1]
        assert isinstance(rank, int)
        assert isinstance(rope_dim, int)
        state = self._state(LatentStateSpec(self.path(name), rank, rope_dim))
        self._node(f"{name}.latent_write", "latent_write", [latent, rope], state=state)
        return self._node(
            name,
            "latent_attention",
            [q],
            state=state,
            heads=heads,
            rank=rank,
            rope_dim=rope_dim,
            scale=scale,
        )

    def short_conv(self, x: Value, name: str, taps: int, *, bias: bool = False) -> Value:
        """Causal convolution of every feature over ``taps`` tokens, the current one last."""
        width = x.shape[1]
        assert isinstance(width, int)
        state = self._state(RecurrentStateSpec(self.path(name), (taps - 1, width)))
        inputs = [x, self._weight(f"{name}.weight", (width, taps), ("heads", ""))]
        if bias:
            inputs.append(self._weight(f"{name}.bias", (width,), ("heads",)))
        return self._node(name, "short_conv", inputs, state=state)

    def recurrent_scan(
        self,
        q: Value,
        k: Value,
        v: Value,
        decay: Value,
        beta: Value,
        *,
        heads: int,
        key_heads: int,
        scale: float,
        delta: bool,
        name: str = "scan",
    ) -> Value:
        """A linear recurrence with a matrix a head as its state (ops.recurrent)."""
        keys, values = k.shape[1], v.shape[1]
        assert isinstance(keys, int)
        assert isinstance(values, int)
        shape = (heads, keys // key_heads, values // heads)
        state = self._state(RecurrentStateSpec(self.path(name), shape))
        return self._node(
            name,
            "recurrent_scan",
            [q, k, v, decay, beta],
            state=state,
            heads=heads,
            key_heads=key_heads,
            key_dim=shape[1],
            value_dim=shape[2],
            scale=scale,
            delta=delta,
        )

    def route_experts(
        self,
        logits: Value,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        bias: str = "",
        name: str = "route",
    ) -> tuple[Value, Value]:
        """Experts and weights of each token, both ``[T, top_k]``; ``bias`` names a weight."""
        inputs = [logits]
        if bias:
            experts = logits.shape[1]
            assert isinstance(experts, int)
            inputs.append(self._weight(bias, (experts,), ("experts",)))
        experts_chosen, weights = self._results(
            name,
            "route_experts",
            inputs,
            top_k=top_k,
            score=score,
            normalize=normalize,
            scale=scale,
            groups=groups,
            top_groups=top_groups,
            group_score=group_score,
        )
        return experts_chosen, weights

    def grouped_linear(
        self,
        x: Value,
        chosen: Value,
        name: str,
        experts: int,
        inputs: int,
        width: int,
        *,
        bias: bool = False,
        axes: tuple[str, str] = ("", ""),
    ) -> Value:
        """The linear layers of the ``chosen [T, k]`` experts, each ``[width, inputs]``: from
        ``x [T, inputs]`` or ``[T, k * inputs]`` to ``[T, k * width]``."""
        sources = [
            x,
            chosen,
            self._weight(f"{name}.weight", (experts, width, inputs), ("experts", *axes)),
        ]
        if bias:
            sources.append(self._weight(f"{name}.bias", (experts, width), ("experts", axes[0])))
        return self._node(name, "grouped_linear", sources)

    def head_linear(self, x: Value, name: str, heads: int, width: int) -> Value:
        """A matrix a head: from ``[T, heads * inputs]`` to ``[T, heads * width]``."""
        features = x.shape[1]
        assert isinstance(features, int)
        shape = (heads, width, features // heads)
        return self._node(
            name, "head_linear", [x, self._weight(f"{name}.weight", shape, ("heads", "", ""))]
        )

    def combine_experts(self, x: Value, weights: Value, name: str = "combine") -> Value:
        return self._node(name, "combine_experts", [x, weights])

    def l2_norm(self, x: Value, run: int, eps: float, name: str) -> Value:
        return self._node(name, "l2_norm", [x], run=run, eps=eps)

    def split(self, x: Value, widths: Sequence[int], name: str, runs: int = 1) -> list[Value]:
        """Parts of each of ``runs`` equal runs of a row: ``[T, runs * width]`` for each width."""
        return self._results(name, "split", [x], widths=list(widths), runs=runs)

    def concat(self, parts: Sequence[Value], name: str, runs: int = 1) -> Value:
        """The reverse of :meth:`split`."""
        return self._node(name, "concat", parts, runs=runs)

    def pool(self, x: Value, kind: str, name: str = "pool") -> Value:
        """One row a sequence: ``[S, width]``."""
        return self._node(name, "pool", [x], kind=kind)

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
        return self._program({"logits": logits.id, "tokens": tokens.id}, vocab)

    def finish_encoder(self, embedding: Value, vocab: int) -> Program:
        """Ends a program that makes one vector ``[S, width]`` of each sequence."""
        if embedding.shape[0] != "S":
            raise UsageError("program: pool the tokens of a sequence first")
        if self._states:
            raise UsageError("program: an encoder keeps no state")
        return self._program({"embedding": embedding.id}, vocab)

    # Parts ----------------------------------------------------------------------------

    def _program(self, outputs: dict[str, int], vocab: int) -> Program:
        return Program(
            values=tuple(self._values),
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
            states=tuple(self._states),
            ropes=tuple(self._ropes),
            inputs=dict(self._inputs),
            outputs=outputs,
            vocab=vocab,
        )

    def _input(self, name: str, shape: Shape, dtype: ValueType) -> Value:
        value = self._value(name, shape, dtype, "input")
        self._inputs[name] = value.id
        return value

    def _state(self, spec: StateSpec) -> int:
        self._states.append(spec)
        return len(self._states) - 1

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
        outputs = self._results(name, op, inputs, **attributes)
        return outputs[0] if outputs else inputs[0]

    def _results(
        self, name: str, op: str, inputs: Sequence[Value], **attributes: Any
    ) -> list[Value]:
        entry = operator(op)
        missing = set(entry.attributes) ^ set(attributes)
        if missing:
            raise UsageError(f"operator {op}: attributes {sorted(missing)} missing or unknown")
        name = self.path(name)
        if name in self._names:
            raise UsageError(f"program: two nodes are named {name}")
        self._names.add(name)
        shapes = entry.infer([value.shape for value in inputs], attributes)
        outputs = [
            self._value(name, shape, "int32" if index in entry.integers else "fp32")
            for index, shape in enumerate(shapes)
        ]
        self._nodes.append(
            Node(
                name,
                op,
                tuple(value.id for value in inputs),
                tuple(value.id for value in outputs),
                attributes,
            )
        )
        return outputs
