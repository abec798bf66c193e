"""The fallback as a whole: from a checkpoint and a plan to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sartor.backends.registry import choose
from sartor.errors import UnsupportedError
from sartor.graph import Capabilities, Program
from sartor.models.registry import UnknownArchitectureError
from sartor.plan import ExecutionPlan

if TYPE_CHECKING:
    from sartor.engine.fallback.executable import FallbackExecutable
    from sartor.formats import Checkpoint

_BACKENDS = ("cpu", "torch")
"""Backends of a plan whose devices torch has too."""

NO_ADAPTERS = (
    "a model that runs through transformers takes no adapters; merge the adapter into its weights"
)

BACKEND = "transformers"
"""The name in the plan in effect. It is no backend: it runs no program."""

LOGITS = "logits"
"""The one node whose result can be tapped."""

CAPABILITIES = Capabilities(operators=frozenset(), kv_formats=frozenset({"fp32", "bf16", "fp16"}))
"""It runs no operators of a program; adapters, steps in flight and bitwise answers it has not."""

_NOTES = {
    "chunked": "",
    "stepwise": "; after its first chunk a prompt is read token by token",
    "recompute": ". VERY SLOW: it has no cache that works, so each token computes the whole text "
    "anew; another release of transformers may have one",
}


@dataclass(frozen=True)
class FallbackModel:
    """What is known of a model that ``transformers`` runs; ``architecture`` is its class.

    ``context_length`` is the longest prompt + output in tokens, ``note`` says in one line how it
    runs.
    """

    name: str
    architecture: str
    context_length: int
    program: Program
    note: str

    @property
    def vocab_size(self) -> int:
        return self.program.vocab


def describe_fallback(
    checkpoint: Checkpoint, unknown: UnknownArchitectureError, plan: ExecutionPlan
) -> tuple[int, int]:
    """Context length and vocabulary of a model that :func:`open_fallback` would load, from its
    configuration alone; errors as there."""
    _check_installed(checkpoint, unknown, plan)
    from sartor.engine.fallback.checkpoint import check_known, context_length, quiet, read_config

    check_known(checkpoint)
    with quiet():
        config = read_config(checkpoint)
    return context_length(config), int(config.get_text_config().vocab_size)


def open_fallback(
    checkpoint: Checkpoint,
    unknown: UnknownArchitectureError,
    plan: ExecutionPlan,
    taps: Sequence[str],
) -> tuple[FallbackModel, FallbackExecutable]:
    """Loads a checkpoint that the registry does not know with the library's own code.

    ``unknown`` is what the registry said; it stands where the fallback is no way out: for a
    GGUF file, and for a backend that the plan names and torch has no device of. Other errors:
    UnsupportedError (not installed, not known there either, no causal language model, code
    inside the checkpoint), and those of :func:`load_pretrained` and :func:`probe`.
    """
    _check_installed(checkpoint, unknown, plan)
    import torch

    from sartor.engine.fallback.causal_lm import CausalLM
    from sartor.engine.fallback.checkpoint import (
        check_known,
        context_length,
        load_pretrained,
        quiet,
        read_config,
    )
    from sartor.engine.fallback.executable import FallbackExecutable, opaque_program
    from sartor.engine.fallback.probe import probe

    check_known(checkpoint)
    backend, chosen = choose(plan.backend, plan.device)
    device = chosen.name if backend.name == "torch" and chosen.name != "torch-cpu" else "cpu"
    if plan.kv not in CAPABILITIES.kv_formats:
        choices = ", ".join(sorted(CAPABILITIES.kv_formats))
        raise UnsupportedError(
            f"plan: kv {plan.kv} is not supported where a model runs through transformers, whose "
            f"cache has the type of its weights; choose from {choices}"
        )
    if plan.threads:
        torch.set_num_threads(plan.threads)
    with quiet():
        config = read_config(checkpoint)
        model = load_pretrained(checkpoint, config, device)
        vocab = int(config.get_text_config().vocab_size)
        found = probe(model, vocab)
    lm = CausalLM(model, found.mode)
    program = opaque_program(min(found.vocab, vocab), found, model.dtype.itemsize)
    plan = plan.replace(
        backend=BACKEND,
        device=device,
        threads=torch.get_num_threads(),
        activation="fp32",  # nothing here computes in int8
        kv={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "fp32"),
        prefix_cache=False,  # a cache object can be moved on, but not shared
        isa="auto",
    )
    executable = FallbackExecutable(lm, program, plan, taps)
    note = (
        f"{lm.name} runs through transformers' own code: slower, without prefix cache, "
        f"adapters and quantised arithmetic{_NOTES[found.mode]}"
    )
    facts = FallbackModel(
        name=checkpoint.path.name,
        architecture=lm.name,
        context_length=context_length(config),
        program=program,
        note=note,
    )
    return facts, executable


def _check_installed(
    checkpoint: Checkpoint, unknown: UnknownArchitectureError, plan: ExecutionPlan
) -> None:
    """Whether the fallback can be tried at all."""
    if checkpoint.kind != "safetensors" or plan.backend not in ("auto", *_BACKENDS):
        raise unknown
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{unknown}; transformers may have it, but {' and '.join(missing)} cannot be found: "
            "install sartor[transformers]"
        ) from unknown
    if plan.head_bits:
        raise UnsupportedError(
            f"plan: head_bits is {plan.head_bits}, but {checkpoint.architecture} runs through "
            "transformers, which keeps all weights as they are; leave it at 0"
        )
