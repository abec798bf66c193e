"""The program that a model builds: operators in static single assignment, and its state.

A program is symbolic in ``T`` (tokens of a step) and ``R`` (rows that give an output). It
holds no device, no weights and no state, and it can be written to JSON and read back, so a
native core can run it without Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from sartor.errors import FormatError, UsageError
from sartor.ops.kv import vector_bytes
from sartor.ops.operators import Shape
from sartor.ops.rope import RopeSpec

PROGRAM_VERSION = 2
ValueType = Literal["fp32", "int32"]
GroupKind = Literal["paged", "recurrent"]


@dataclass(frozen=True)
class Value:
    """One SSA value. ``source`` says where it comes from."""

    id: int
    name: str
    shape: Shape
    dtype: ValueType = "fp32"
    source: Literal["input", "weight", "node"] = "node"


@dataclass(frozen=True)
class Node:
    """One operator at work. Nodes run in order; only state nodes have effects."""

    name: str
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightSpec:
    """A weight that the program reads: its shape, and a logical name for every axis.

    Axis names ("vocab", "hidden", "heads", "kv_heads", "ffn", "experts", "") tell a sharding
    pass along which axis the weight may be split.
    """

    name: str
    value: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]


class KVStateSpec(msgspec.Struct, frozen=True, tag="kv"):
    """Keys and values of one layer, paged in blocks of tokens.

    ``window`` is how many of the latest positions stay visible; 0 for all of them.
    """

    name: str
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0

    @property
    def group_key(self) -> tuple[GroupKind, int]:
        """States with equal keys share one block table."""
        return ("paged", self.window)

    def storage(self, kv: str) -> str:
        """How it is kept where the plan's ``kv`` says so."""
        return kv

    def bytes_per_token(self, kv: str) -> int:
        return self.kv_heads * (vector_bytes(kv, self.head_dim) + vector_bytes(kv, self.value_dim))


class LatentStateSpec(msgspec.Struct, frozen=True, tag="latent"):
    """What latent attention keeps of a token (arXiv:2405.04434): ``rank`` compressed features,
    which are key and value of every head, and ``rope_dim`` rotated ones, which are key only."""

    name: str
    rank: int
    rope_dim: int

    @property
    def group_key(self) -> tuple[GroupKind, int]:
        return ("paged", 0)

    def storage(self, kv: str) -> str:
        """How it is kept where the plan's ``kv`` says so: bf16 instead of int8. Its two parts
        differ in size, so one scale would cost the smaller one its bits, and it is small as it is.
        """
        return "bf16" if kv == "int8" else kv

    def bytes_per_token(self, kv: str) -> int:
        return vector_bytes(self.storage(kv), self.rank + self.rope_dim)


class RecurrentStateSpec(msgspec.Struct, frozen=True, tag="recurrent"):
    """A state of fixed shape, float32, that each token changes (convolution, recurrence)."""

    name: str
    shape: tuple[int, ...]

    @property
    def group_key(self) -> tuple[GroupKind, int]:
        return ("recurrent", RECURRENT_WINDOW)

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


StateSpec = KVStateSpec | LatentStateSpec | RecurrentStateSpec
"""Every kind of state that a layer may keep."""

RECURRENT_WINDOW = 2
"""A token needs the state that the token before it left: in blocks, what a window of two does."""


@dataclass(frozen=True)
class StateGroup:
    """States that share a block table: one allocation of a block serves all of them.

    A "paged" group has a block for every run of ``block_size`` positions. In a "recurrent" group
    block i holds the state after the last computed token of run i: a step over the positions
    ``[c, c + n)`` reads block ``(c - 1) // block_size`` (nothing where c is 0) and writes block
    ``(c + n - 1) // block_size``; the runs between have none.
    """

    index: int
    window: int
    states: tuple[int, ...]
    kind: GroupKind = "paged"


@dataclass(frozen=True)
class Program:
    """A model as operators.

    Inputs are the int32 values ``token_ids [T]``, ``positions [T]`` and ``output_rows [R]``, and
    where tokens may come as embeddings, ``embedding_rows [M]`` and ``embeddings [M, width]``.
    Outputs are ``logits [R, vocab]`` and the sampled ``tokens [R]``, or, of an encoder,
    ``embedding [S, width]``.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    weights: tuple[WeightSpec, ...]
    states: tuple[StateSpec, ...]
    ropes: tuple[RopeSpec, ...]
    inputs: dict[str, int]
    outputs: dict[str, int]
    vocab: int
    version: int = PROGRAM_VERSION

    def groups(self) -> tuple[StateGroup, ...]:
        """State groups, in the order in which their first state appears."""
        members: dict[tuple[GroupKind, int], list[int]] = {}
        for index, state in enumerate(self.states):
            members.setdefault(state.group_key, []).append(index)
        return tuple(
            StateGroup(i, window, tuple(states), kind)
            for i, ((kind, window), states) in enumerate(members.items())
        )

    @property
    def size(self) -> int:
        """How many numbers all its weights have."""
        return sum(math.prod(spec.shape) for spec in self.weights)

    @property
    def samples(self) -> bool:
        """Whether it writes tokens; an encoder does not."""
        return "tokens" in self.outputs

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(
            f"the program has no node {name!r}; nodes are named like {self.nodes[1].name!r}"
        )

    def weight_values(self) -> Mapping[int, WeightSpec]:
        return {spec.value: spec for spec in self.weights}

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> Program:
        try:
            program = msgspec.json.decode(data, type=Program)
        except msgspec.DecodeError as error:
            raise FormatError(f"not a serialised program: {error}") from None
        if program.version != PROGRAM_VERSION:
            raise FormatError(
                f"serialised program of version {program.version}; this release reads "
                f"{PROGRAM_VERSION}: convert the model again"
            )
        return program
