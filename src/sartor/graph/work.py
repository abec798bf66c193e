"""What a step of a program asks of a machine: bytes and operations, counted by node.

Only what no implementation can leave out. Bytes: every weight that the step needs, once, as it
is packed; the state that attention sees, once a sequence; what is written to the state.
Activations stay in caches. Operations: multiplies and adds of matrix products, attention,
convolutions and recurrences; norms, activations and the like count as none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sartor.graph.program import (
    KVStateSpec,
    LatentStateSpec,
    Node,
    Program,
    RecurrentStateSpec,
    WeightSpec,
)
from sartor.hardware import Arithmetic, Work


@dataclass(frozen=True)
class StepShape:
    """A step: for each sequence its new tokens and those before them; rows that give an output."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    outputs: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def rows(self, symbol: object) -> int:
        """What a symbol of a shape stands for in this step."""
        return {"T": self.tokens, "R": self.outputs, "S": len(self.lengths), "M": 0}[str(symbol)]


@dataclass(frozen=True)
class ProgramWork:
    """Counts the work of a program as a backend runs it.

    program       with the fused operators that run
    weight_bytes  of each weight, packed
    kv            storage of keys and values, as in the plan
    arithmetic    of the nodes by name, float32 where there is no entry
    """

    program: Program
    weight_bytes: Mapping[str, int]
    kv: str
    arithmetic: Mapping[str, Arithmetic]

    def step(self, step: StepShape) -> Work:
        """Of all nodes."""
        return sum((self.node(node, step) for node in self.program.nodes), Work())

    def node(self, node: Node, step: StepShape) -> Work:
        held = [self._weights[value] for value in node.inputs if value in self._weights]
        shapes = [spec.shape for spec in held]
        whole = float(sum(self.weight_bytes[spec.name] for spec in held))
        rows = self._rows(node, step)
        match node.op:
            case "embedding":
                return Work(whole * rows / shapes[0][0])
            case "linear" | "linear_group" | "head_linear":
                products = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
                return self._work(node, whole, products * rows)
            case "grouped_linear":
                experts, n, k = shapes[0]
                slots = self._width(node.inputs[1])
                share = _chosen(experts, slots, rows) / experts
                return self._work(node, whole * share, rows * slots * n * k)
            case "kv_write" | "latent_write":
                return Work(float(step.tokens * self._token_bytes(node)))
            case "attention" | "latent_attention":
                return self._attention(node, step, whole)
            case "self_attention":
                seen = sum(_seen_both_ways(n, node.attributes["window"]) for n in step.lengths)
                return self._work(node, 0, seen * _per_key(node))
            case "short_conv":
                return self._work(
                    node, whole + self._slots(node, step), rows * math.prod(shapes[0])
                )
            case "recurrent_scan":
                heads, key_dim = node.attributes["heads"], node.attributes["key_dim"]
                size = heads * key_dim * node.attributes["value_dim"]
                # What is added and what is read out; the delta rule looks up the key before.
                passes = 3 if node.attributes["delta"] else 2
                return self._work(node, self._slots(node, step), rows * size * passes)
            case _:
                return Work(whole)

    @cached_property
    def _weights(self) -> Mapping[int, WeightSpec]:
        return self.program.weight_values()

    def _work(self, node: Node, size: float, products: float) -> Work:
        return Work(float(size), {self.arithmetic.get(node.name, "fp32"): 2.0 * products})

    def _rows(self, node: Node, step: StepShape) -> int:
        if not node.outputs:
            return step.tokens
        return step.rows(self.program.values[node.outputs[0]].shape[0])

    def _width(self, value: int) -> int:
        width = self.program.values[value].shape[1]
        assert isinstance(width, int)
        return width

    def _token_bytes(self, node: Node) -> int:
        state = self.program.states[node.attributes["state"]]
        assert isinstance(state, KVStateSpec | LatentStateSpec)
        return state.bytes_per_token(self.kv)

    def _slots(self, node: Node, step: StepShape) -> float:
        """A state that is read where there is one, and written."""
        state = self.program.states[node.attributes["state"]]
        assert isinstance(state, RecurrentStateSpec)
        return state.nbytes * (len(step.lengths) + sum(1 for c in step.contexts if c))

    def _attention(self, node: Node, step: StepShape, sinks: float) -> Work:
        window = node.attributes.get("window", 0)
        held = seen = 0
        for length, context in zip(step.lengths, step.contexts, strict=True):
            end = context + length
            held += min(end, length + window - 1) if window else end
            seen += _seen(context, end, window)
        return self._work(node, sinks + held * self._token_bytes(node), seen * _per_key(node))


def _per_key(node: Node) -> int:
    """Multiplications for one key that one token sees, all heads."""
    found = node.attributes
    if node.op == "latent_attention":
        return int(found["heads"] * (2 * found["rank"] + found["rope_dim"]))
    return int(found["heads"] * (found["head_dim"] + found["value_dim"]))


def _seen(begin: int, end: int, window: int) -> int:
    """Keys that the queries at positions [begin, end) see, themselves among them."""
    whole = end if not window else max(begin, min(end, window))  # from here on a window each
    return (whole * (whole + 1) - begin * (begin + 1)) // 2 + (end - whole) * window


def _seen_both_ways(length: int, window: int) -> int:
    """Pairs of positions of a text of which one sees the other."""
    if not window or window >= length:
        return length * length
    return length * length - (length - window) * (length - window + 1)


def _chosen(experts: int, slots: int, tokens: int) -> float:
    """How many experts some token has chosen, expected where all are chosen equally often."""
    return experts * (1.0 - (1.0 - slots / experts) ** tokens)
