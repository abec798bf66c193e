"""The program that a model builds: operators in static single assignment, and its state.

A program is symbolic in ``T`` (tokens of a step) and ``R`` (rows that give an output). It
holds no device, no weights and no state, and it can be written to JSON and read back, so a
native core can run it without Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from sartor.errors import FormatError, UsageError
from sartor.ops.operators import Shape
from sartor.ops.rope import RopeSpec

PROGRAM_VERSION = 1
ValueType = Literal["fp32", "int32"]


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


@dataclass(frozen=True)
class KVStateSpec:
    """Keys and values of one layer, paged in blocks of tokens.

    ``window`` is how many of the latest positions stay visible; 0 for all of them.
    """

    name: str
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0

    @property
    def group_key(self) -> tuple[str, int]:
        """States with equal keys share one block table."""
        return ("kv", self.window)

    def bytes_per_token(self, element_bytes: int) -> int:
        return self.kv_heads * (self.head_dim + self.value_dim) * element_bytes


StateSpec = KVStateSpec
"""Every kind of state that a layer may keep (recurrent and latent kinds join this union)."""


@dataclass(frozen=True)
class StateGroup:
    """States that share a block table: one allocation of a block serves all of them."""

    index: int
    window: int
    states: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A model as operators.

    Inputs are the int32 values ``token_ids [T]``, ``positions [T]`` and ``output_rows [R]``.
    ``logits`` is the value ``[R, vocab]`` and ``tokens`` the sampled ``[R]``.
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
        members: dict[tuple[str, int], list[int]] = {}
        for index, state in enumerate(self.states):
            members.setdefault(state.group_key, []).append(index)
        return tuple(
            StateGroup(i, key[1], tuple(states)) for i, (key, states) in enumerate(members.items())
        )

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
