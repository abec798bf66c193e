"""From a path to a model that is ready to run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sartor.backends.base import Executable
from sartor.backends.registry import choose
from sartor.engine.engine import Engine
from sartor.engine.sizing import size_state
from sartor.errors import UnsupportedError
from sartor.graph import Capabilities, Program
from sartor.hardware import inventory
from sartor.plan import ExecutionPlan

if TYPE_CHECKING:
    from sartor.formats import Checkpoint
    from sartor.models import Model
    from sartor.text.template import ChatTemplate
    from sartor.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model compiled for one device, its tokenizer, and its chat template where it has one.

    ``plan`` has every "auto" replaced; ``bits_per_weight`` counts scales and offsets.
    """

    name: str
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    executable: Executable
    plan: ExecutionPlan
    load_seconds: float
    bits_per_weight: float

    @property
    def context_length(self) -> int:
        """Longest prompt + output that model and plan allow, in tokens."""
        limit = self.model.context_length
        return min(limit, self.plan.max_context) if self.plan.max_context else limit


def load(
    path: Path,
    plan: ExecutionPlan,
    name: str,
    cache: Path | None,
    taps: Sequence[str] = (),
) -> LoadedModel:
    """Opens a checkpoint, packs its weights and compiles its program.

    ``cache`` is the folder of packed files, None for none; ``taps`` name nodes whose results
    batches may ask for. Errors name what is missing, damaged or not supported.
    """
    from sartor.formats import open_checkpoint
    from sartor.models import load_model

    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint)
    # A large vocabulary takes as long as the weights, and packing leaves the interpreter free.
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(load_text, checkpoint)
        backend, device = choose(plan.backend, plan.device)
        plan = plan.replace(backend=backend.name, device=device.name)
        _check(backend.capabilities(device.name), model.program, plan)
        weights = backend.pack(model.program, model.source, plan, cache)
        executable = backend.compile(model.program, weights, plan, device.name, taps)
        tokenizer, template = text.result()
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        template=template,
        executable=executable,
        plan=executable.plan,
        load_seconds=time.perf_counter() - started,
        bits_per_weight=weights.bits_per_weight,
    )


def make_engine(loaded: LoadedModel) -> Engine:
    """An engine with state allocated as the plan says, or from the memory that is free now."""
    executable = loaded.executable
    groups = executable.program.groups()
    blocks = size_state(
        [group.window for group in groups],
        [executable.block_bytes(group.index) for group in groups],
        loaded.plan,
        loaded.context_length,
        inventory().available_bytes,
    )
    return Engine(
        executable,
        loaded.tokenizer,
        context_length=loaded.context_length,
        model_key=f"{loaded.name}@{loaded.model.source.identity()}",
        state_blocks=blocks,
    )


def load_text(checkpoint: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a checkpoint, and its chat template where it has one."""
    from sartor.text.template import template_from_folder, template_from_gguf
    from sartor.text.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

    if checkpoint.kind == "gguf":
        metadata = checkpoint.metadata
        return tokenizer_from_gguf(metadata), template_from_gguf(metadata)
    return tokenizer_from_folder(checkpoint.path), template_from_folder(checkpoint.path)


def _check(capabilities: Capabilities, program: Program, plan: ExecutionPlan) -> None:
    """Refuses what the backend cannot do before any weight is read."""
    missing = {node.op for node in program.nodes} - capabilities.operators
    if missing:
        raise UnsupportedError(
            f"backend {plan.backend} has no operator {', '.join(sorted(missing))}, which this "
            "model needs; choose another backend"
        )
    for field, value, known in (
        ("activation", plan.activation, sorted(capabilities.activations)),
        ("kv", plan.kv, sorted(capabilities.kv_formats)),
        ("block_size", plan.block_size, capabilities.block_sizes),
    ):
        if value not in known:
            choices = ", ".join(map(str, known))
            raise UnsupportedError(
                f"plan: {field} {value} is not supported by backend {plan.backend} on "
                f"{plan.device}; choose from {choices}"
            )
