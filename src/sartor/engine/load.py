"""From a path to a model that is ready to run."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sartor.backends.base import Executable, Tunable
from sartor.backends.registry import choose
from sartor.engine.encoder import Encoder
from sartor.engine.engine import Engine
from sartor.engine.head import requantize_head
from sartor.engine.sizing import MEMORY_SHARE, size_state
from sartor.engine.vectors import text_limit
from sartor.engine.watched import WatchedSource
from sartor.errors import UnsupportedError, UsageError
from sartor.graph import UNSAID, Capabilities, Program, SamplingDefaults
from sartor.hardware import memory
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress, showing

if TYPE_CHECKING:
    from sartor.engine.fallback.model import FallbackModel
    from sartor.formats import Checkpoint
    from sartor.models import Model, UnknownArchitectureError
    from sartor.models.config import VectorConfig
    from sartor.text.template import ChatTemplate
    from sartor.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model compiled for one device, its tokenizer, and its chat template where it has one.

    ``plan`` has every "auto" replaced; ``capabilities`` are those of what runs it;
    ``bits_per_weight``: all that is packed, scales and offsets too, over the checkpoint's weights.
    ``model`` and ``identity`` are the checkpoint's; the executable's program may differ where the
    plan has the head quantised again. ``sampling`` is what the checkpoint says of how to draw
    tokens, for requests that say nothing themselves. ``notes`` are lines for people: where it does
    not run as models usually do (see ``engine/fallback``), what was assumed, and what of the
    checkpoint is wrong and not used.
    """

    name: str
    model: Model | FallbackModel
    tokenizer: Tokenizer
    template: ChatTemplate | None
    executable: Executable
    plan: ExecutionPlan
    capabilities: Capabilities
    load_seconds: float
    bits_per_weight: float
    identity: str
    sampling: SamplingDefaults = UNSAID
    notes: tuple[str, ...] = ()

    @property
    def vectors(self) -> VectorConfig | None:
        """What an encoder makes of texts; None for a model that writes them."""
        from sartor.models import Model

        return self.model.config.vectors if isinstance(self.model, Model) else None

    @property
    def writes_text(self) -> bool:
        """Whether it is for an :class:`Engine`; else for an :class:`Encoder`."""
        return self.executable.program.samples

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
    progress: Progress = SILENT,
) -> LoadedModel:
    """Opens a checkpoint, packs its weights and compiles its program.

    ``cache`` is the folder of packed files, None for none; what was measured of kernels lies
    beside it, in ``tuned``. ``taps`` name nodes whose results batches may ask for. An architecture
    that has no model file runs through ``transformers``, where that is installed. Errors name
    what is missing, damaged or not supported.
    """
    started = time.perf_counter()
    with _no_garbage_collection(), showing(progress, f"loading {called(name)}"):
        return _load(path, plan, name, cache, taps, progress, started)


def _load(
    path: Path,
    plan: ExecutionPlan,
    name: str,
    cache: Path | None,
    taps: Sequence[str],
    progress: Progress,
    started: float,
) -> LoadedModel:
    from sartor.formats import open_checkpoint
    from sartor.models import UnknownArchitectureError, load_model, own_sampling

    checkpoint = open_checkpoint(path)
    try:
        model = load_model(checkpoint)
    except UnknownArchitectureError as unknown:
        progress.part("with transformers")
        return _load_fallback(checkpoint, unknown, plan, name, taps, started)
    check_context(plan, model.context_length, name)
    # A large vocabulary takes as long as the weights, and packing leaves the interpreter free.
    notes: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(load_text, checkpoint, notes, vectors=model.config.vectors)
        backend, device = choose(plan.backend, plan.device)
        plan = plan.replace(backend=backend.name, device=device.name)
        capabilities = backend.capabilities(device.name)
        _check(capabilities, model.program, plan)
        program, source = requantize_head(model, plan.head_bits)
        if source is model.source:  # it has no more bits than that
            plan = plan.replace(head_bits=0)
        with WatchedSource(source, program, progress, f"packing {called(name)}") as watched:
            weights = backend.pack(program, watched, plan, cache)
        executable = backend.compile(program, weights, plan, device.name, taps)
        if cache is not None and plan.tune and isinstance(executable, Tunable):
            executable.tuned_from(cache.with_name("tuned"))
        tokenizer, template = text.result()
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        template=template,
        executable=executable,
        plan=executable.plan,
        capabilities=capabilities,
        load_seconds=time.perf_counter() - started,
        # A head of its own is no further weight of the model, but more bits for the same ones.
        bits_per_weight=weights.bits_per_weight * program.size / model.program.size,
        identity=checkpoint.identity(),
        sampling=own_sampling(checkpoint),
        notes=(*model.notes, *notes),
    )


def called(name: str) -> str:
    """What a progress line calls a model: of a path, the last part."""
    return Path(name).name if os.path.exists(name) else name


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A load makes some hundred thousand objects that stay and few cycles: Python's search for
    these, over all objects again and again as they become more, would find next to nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load_fallback(
    checkpoint: Checkpoint,
    unknown: UnknownArchitectureError,
    plan: ExecutionPlan,
    name: str,
    taps: Sequence[str],
    started: float,
) -> LoadedModel:
    """A model that no file of ``sartor.models`` describes."""
    from sartor.engine.fallback.model import CAPABILITIES, open_fallback
    from sartor.models import own_sampling

    model, executable = open_fallback(checkpoint, unknown, plan, taps)
    check_context(plan, model.context_length, name)
    notes: list[str] = []
    tokenizer, template = load_text(checkpoint, notes)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        template=template,
        executable=executable,
        plan=executable.plan,
        capabilities=CAPABILITIES,
        load_seconds=time.perf_counter() - started,
        bits_per_weight=executable.bits_per_weight,
        identity=checkpoint.identity(),
        sampling=own_sampling(checkpoint),
        notes=(model.note, *notes),
    )


def make_engine(loaded: LoadedModel, budget: int | None = None) -> Engine:
    """An engine with state allocated as the plan says, else from ``budget`` bytes, else from the
    memory that is free now."""
    executable = loaded.executable
    groups = executable.program.groups()
    free, share = budget, 1.0
    if budget is None:
        free, share = executable.memory().free, MEMORY_SHARE
    blocks = size_state(
        groups,
        [executable.block_bytes(group.index) for group in groups],
        loaded.plan,
        loaded.context_length,
        memory()[1] if free is None else free,
        share,
    )
    return Engine(
        executable,
        loaded.tokenizer,
        capabilities=loaded.capabilities,
        context_length=loaded.context_length,
        model_key=f"{loaded.name}@{loaded.identity}",
        state_blocks=blocks,
    )


def make_encoder(loaded: LoadedModel) -> Encoder:
    """The same for a model that makes vectors of texts."""
    executable = loaded.executable
    executable.allocate_state([])
    vectors = loaded.vectors
    assert vectors is not None
    return Encoder(
        executable,
        vectors,
        context_length=loaded.context_length,
        limit=text_limit(vectors, loaded.plan, loaded.context_length),
    )


def load_text(
    checkpoint: Checkpoint,
    notes: list[str] | None = None,
    *,
    vectors: VectorConfig | None = None,
) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a checkpoint, and its chat template where it has one. ``notes`` gets a line
    for each thing that is wrong there and not used; ``vectors`` is what an encoder wants."""
    from sartor.text.template import template_from_folder, template_from_gguf
    from sartor.text.template_process import TemplateProcess
    from sartor.text.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

    process = TemplateProcess()
    notes = [] if notes is None else notes
    about_template: list[str] = []
    # The template is compiled in its process while the tokenizer, which takes longer, is made.
    with ThreadPoolExecutor(1) as beside:
        if checkpoint.kind == "gguf":
            metadata = checkpoint.metadata
            template = beside.submit(template_from_gguf, metadata, about_template, process)
            tokenizer = tokenizer_from_gguf(metadata, notes)
        else:
            folder = checkpoint.path
            template = beside.submit(template_from_folder, folder, about_template, process)
            lower_case = vectors is not None and vectors.lower_case
            tokenizer = tokenizer_from_folder(folder, notes, lower_case=lower_case)
    notes += about_template
    return tokenizer, template.result()


def check_context(plan: ExecutionPlan, limit: int, name: str) -> None:
    """UsageError where the plan asks for a longer context than the model has been made for."""
    if plan.max_context > limit:
        raise UsageError(
            f"plan: max_context is {plan.max_context}, but {name} has a limit of its own of "
            f"{limit} tokens; give at most that, or leave it out to get it",
            fields=("max_context",),
        )


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
                f"{plan.device}; choose from {choices}",
                fields=(field,),
            )
