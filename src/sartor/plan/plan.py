"""The execution plan: every choice about how a model runs, as one validated value.

The engine and the server read it; the configuration search writes it. Two runs with equal
plans on one instruction-set path give bitwise equal answers (design: Numerics); fields in
:meth:`ExecutionPlan.numerics` are those that can change an answer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from sartor.errors import UsageError

ActivationFormat = Literal["int8", "fp32"]
KVFormat = Literal["bf16", "fp16", "fp32", "int8"]

ISAS = ("auto", "portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon", "i8mm")
"""Instruction-set paths of the CPU backend; a machine and a build have some of them."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How to run a model.

    backend, device    names from the registry and from ``sartor devices``; "auto" chooses
    threads            CPU threads; 0 uses every core of the affinity mask
    activation         arithmetic of quantised linear layers: dynamic int8 (groups of 32;
                       outliers and the inputs of the head keep 16 bits), or fp32
    head_bits          weights that make the logits: 0 as the file has them; 2 to 8 quantises
                       them again where they have more, which changes answers
    kv                 storage of keys and values; int8 has a scale for each token and kv head, and
                       leaves latent states in bf16 and recurrent ones in fp32
    block_size         tokens a state block; a power of two
    max_batch_tokens   token budget of one step (prompt chunks and decodes together)
    max_sequences      sequences that run at once
    max_context        longest prompt + output; 0 takes the model's own limit
    state_bytes        memory for sequence state (KV cache); 0 sizes it from free memory
    prefix_cache       share the state of equal prefixes
    isa                CPU instruction-set path, one of ISAS; "auto" takes the best
    tune               use the kernel variants that were fastest on this machine, and let an idle
                       server measure those that are not known; changes no answer
    """

    backend: str = "auto"
    device: str = "auto"
    threads: int = 0
    activation: ActivationFormat = "int8"
    head_bits: int = 0
    kv: KVFormat = "bf16"
    block_size: int = 32
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_context: int = 0
    state_bytes: int = 0
    prefix_cache: bool = True
    isa: str = "auto"
    tune: bool = True

    def __post_init__(self) -> None:
        _choice("activation", self.activation, ("int8", "fp32"))
        _choice("kv", self.kv, get_args(KVFormat))
        _choice("isa", self.isa, ISAS)
        _at_least("head_bits", self.head_bits, 0)
        if self.head_bits == 1 or self.head_bits > 8:
            raise UsageError(
                f"plan: head_bits is {self.head_bits}; it must be 2 to 8, or 0 to keep the head "
                "as the file has it",
                fields=("head_bits",),
            )
        _at_least("threads", self.threads, 0)
        _at_least("max_batch_tokens", self.max_batch_tokens, 1)
        _at_least("max_sequences", self.max_sequences, 1)
        _at_least("max_context", self.max_context, 0)
        _at_least("state_bytes", self.state_bytes, 0)
        if self.block_size < 16 or self.block_size > 256 or self.block_size & (self.block_size - 1):
            raise UsageError(
                f"plan: block_size {self.block_size} must be a power of two from 16 to 256",
                fields=("block_size",),
            )

    def numerics(self) -> tuple[object, ...]:
        """What can change an answer: part of a prefix key and of a replay's identity."""
        return (self.backend, self.activation, self.head_bits, self.kv, self.isa)

    def replace(self, **changes: object) -> ExecutionPlan:
        """A copy with some fields changed; unknown names are an error that lists the fields."""
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise UsageError(
                f"plan: unknown field {', '.join(unknown)}; "
                f"the fields are {', '.join(sorted(known))}"
            )
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(
            f"plan: {field} is {value!r}; choose from {', '.join(allowed)}", fields=(field,)
        )


def _at_least(field: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(
            f"plan: {field} is {value!r}; it must be an integer >= {low}", fields=(field,)
        )
