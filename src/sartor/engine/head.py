"""The output head in fewer bits than its file has, where the plan asks for it.

It is read whole for every token of an answer, so in a small model with a large vocabulary it is
much of a decode step. An embedding that shares its weight with the head is left as it is: the
head gets a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sartor.backends.base import WeightSource
from sartor.errors import UnsupportedError
from sartor.graph import Program
from sartor.graph.passes import head_weight, untie_head
from sartor.models import Model
from sartor.models.model import WeightSource as ModelSource
from sartor.ops.requantize import GROUP, REQUANTIZER_VERSION, requantize
from sartor.ops.weights import (
    AffineFormat,
    DenseFormat,
    Fp8Format,
    LookupFormat,
    Weight,
    WeightFormat,
)


@dataclass(frozen=True)
class HeadSource:
    """The weights of ``source``, and ``name``: its weight ``origin`` in ``bits`` bits."""

    source: ModelSource
    name: str
    origin: str
    bits: int

    def weight(self, name: str) -> Weight:
        if name != self.name:
            return self.source.weight(name)
        return requantize(self.source.weight(self.origin), self.bits, name)

    @property
    def path(self) -> Path:
        return self.source.path

    def identity(self) -> str:
        """Another one than the source's, which it begins with: packed files of both may lie side by
        side."""
        recipe = f"affine{self.bits}g{GROUP}o version {REQUANTIZER_VERSION}"
        return f"{self.source.identity()} {self.name} as {recipe}"


def requantize_head(model: Model, bits: int) -> tuple[Program, WeightSource]:
    """Program and weights of a model whose head has at most ``bits`` bits; 0: as it is.

    Errors: UnsupportedError for a model without a head, and for a head that does not divide
    into groups.
    """
    program = model.program
    if not bits:
        return program, model.source
    origin = head_weight(program)
    if origin is None:
        raise UnsupportedError(
            f"plan: head_bits is {bits}, but {model.name} has no linear layer that makes logits; "
            "leave it at 0"
        )
    if code_bits(model.source.format(origin.name)) <= bits:
        return program, model.source
    if origin.shape[1] % GROUP:
        raise UnsupportedError(
            f"plan: head_bits is {bits}, but rows of {origin.shape[1]} weights of {origin.name} do "
            f"not divide into groups of {GROUP}; leave it at 0"
        )
    untied = untie_head(program)
    own = head_weight(untied)
    assert own is not None
    return untied, HeadSource(model.source, own.name, origin.name, bits)


def code_bits(form: WeightFormat) -> int:
    """Bits of one number, without its share of scales and offsets."""
    match form:
        case DenseFormat():
            return int(form.bits_per_weight)
        case AffineFormat(bits=bits):
            return bits
        case LookupFormat():
            return 4
        case Fp8Format():
            return 8
