"""What a checkpoint says of itself, from its headers: no weight is read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.engine.load import load_text
from sartor.errors import SartorError
from sartor.formats import Checkpoint, open_checkpoint
from sartor.graph import SamplingDefaults
from sartor.graph.program import Program, RecurrentStateSpec
from sartor.hardware import memory
from sartor.models import load_model, own_sampling
from sartor.models.config import VectorConfig
from sartor.store.quantizations import PACKING
from sartor.text.tokenizer import Tokenizer

STATE_TOKENS = 2048
"""A conversation of so many tokens must fit beside the weights, or the model's context if that is
shorter."""

_STATE_FORMAT = "bf16"  # as plans have it by default
_GGUF_NAMES = {"unk": "unknown_token_id", "pad": "padding_token_id"}


@dataclass(frozen=True)
class FormatShare:
    """The tensors that are stored in one format."""

    format: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class SpecialToken:
    """``role``: bos, unk, pad, or end for each token that ends an answer."""

    role: str
    id: int | None
    text: str


@dataclass(frozen=True)
class TokenizerFacts:
    """``kind`` as the files name it; ``problem`` says why it cannot be used, with nothing else."""

    kind: str
    vocab_size: int | None = None
    adds_bos: bool | None = None
    special: tuple[SpecialToken, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes of this machine's memory that the model needs, as packed, and that are free now.

    ``state_bytes`` are those of ``state_tokens`` tokens of conversation; None where it is unknown.
    """

    weights_bytes: int
    state_tokens: int | None
    state_bytes: int | None
    available_bytes: int
    fits: bool


@dataclass(frozen=True)
class ModelFacts:
    """``problem`` says why Sartor does not run it (transformers may); None where it does.

    ``layers``, ``width`` (features of a token between layers), ``context_length`` (tokens) and the
    like are None where the checkpoint does not say. ``sampling`` are the model's own settings;
    ``notes`` are lines for people: what was assumed, and what is wrong and
    not used.
    """

    path: Path
    kind: Literal["gguf", "safetensors"]
    title: str | None
    architecture: str
    makes: Literal["text", "embeddings"] | None
    problem: str | None
    parameters: int
    size_bytes: int
    bits_per_weight: float
    formats: tuple[FormatShare, ...]
    context_length: int | None
    layers: int | None
    width: int | None
    heads: int | None
    kv_heads: int | None
    chat_template: bool
    tokenizer: TokenizerFacts
    license: str | None
    sampling: SamplingDefaults
    memory: MemoryFacts
    notes: tuple[str, ...]


def describe(path: Path) -> ModelFacts:
    """Reads the headers of the checkpoint at ``path``. Errors: as of ``open_checkpoint``; what is
    wrong with a model or tokenizer inside a sound file is told in the facts."""
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        return _facts(checkpoint)


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    size = sum(info.nbytes for info in infos)
    config = _Config(checkpoint)
    program, problem, vectors = None, None, None
    notes: list[str] = []
    try:
        model = load_model(checkpoint)
        program = model.program
        vectors = model.config.vectors
        notes += model.notes
    except SartorError as error:
        problem = str(error)
    tokenizer, template = _text(checkpoint, notes, vectors)
    context = config.integer("context_length", "max_position_embeddings", "n_positions")
    if program is not None:
        context = model.context_length
    sampling = own_sampling(checkpoint)
    return ModelFacts(
        path=checkpoint.path,
        kind=checkpoint.kind,
        title=_string(checkpoint.metadata.get("general.name")),
        architecture=checkpoint.architecture,
        makes=None if program is None else "text" if program.samples else "embeddings",
        problem=problem,
        parameters=sum(info.size for info in infos),
        size_bytes=size,
        bits_per_weight=checkpoint.bits_per_weight,
        formats=_formats(checkpoint),
        context_length=context,
        layers=config.integer("block_count", "num_hidden_layers", "n_layer"),
        width=config.integer("embedding_length", "hidden_size", "n_embd"),
        heads=config.integer("attention.head_count", "num_attention_heads", "n_head"),
        kv_heads=config.integer("attention.head_count_kv", "num_key_value_heads"),
        chat_template=template,
        tokenizer=tokenizer,
        license=_string(checkpoint.metadata.get("general.license")),
        sampling=sampling,
        memory=_memory(size, program, context),
        notes=(*notes, *sampling.notes),
    )


class _Config:
    """Integers of a configuration, whichever of their names it uses."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._metadata = checkpoint.metadata
        self._prefix = f"{checkpoint.architecture}." if checkpoint.kind == "gguf" else ""

    def integer(self, *names: str) -> int | None:
        places: list[Mapping[str, object]] = [self._metadata]
        nested = self._metadata.get("text_config")
        if isinstance(nested, dict):
            places.append(nested)
        for place in places:
            for name in names:
                value = place.get(self._prefix + name)
                if type(value) is int:
                    return value
        return None


def _formats(checkpoint: Checkpoint) -> tuple[FormatShare, ...]:
    """By format, the one with the most bytes first."""
    found: dict[str, list[int]] = {}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        sums = found.setdefault(info.stored, [0, 0, 0])
        for at, value in enumerate((1, info.size, info.nbytes)):
            sums[at] += value
    shares = [FormatShare(stored, *sums) for stored, sums in found.items()]
    return tuple(sorted(shares, key=lambda share: -share.bytes))


def _text(
    checkpoint: Checkpoint, notes: list[str], vectors: VectorConfig | None
) -> tuple[TokenizerFacts, bool]:
    """The tokenizer, and whether there is a chat template."""
    kind = _tokenizer_kind(checkpoint)
    try:
        tokenizer, template = load_text(checkpoint, notes, vectors=vectors)
    except SartorError as error:
        return TokenizerFacts(kind, problem=str(error)), False
    special = _special(checkpoint, tokenizer)
    facts = TokenizerFacts(kind, tokenizer.vocab_size, tokenizer.add_bos, special)
    return facts, template is not None and not template.fault


def _tokenizer_kind(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "gguf":
        model = _string(checkpoint.metadata.get("tokenizer.ggml.model"))
        pre = _string(checkpoint.metadata.get("tokenizer.ggml.pre"))
        return (model or "none") + (f", {pre}" if pre else "")
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"):
        if (checkpoint.path / name).exists():
            return name
    return "none"


def _special(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[SpecialToken, ...]:
    found = []
    if tokenizer.bos_id is not None:
        found.append(SpecialToken("bos", tokenizer.bos_id, tokenizer.token_text(tokenizer.bos_id)))
    for token in sorted(tokenizer.eos_ids):
        found.append(SpecialToken("end", token, tokenizer.token_text(token)))
    if checkpoint.kind == "gguf":
        for role, key in _GGUF_NAMES.items():
            value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
            if type(value) is int and 0 <= value < tokenizer.vocab_size:
                found.append(SpecialToken(role, value, tokenizer.token_text(value)))
    else:
        config = _side_file(checkpoint.path / "tokenizer_config.json")
        for role in _GGUF_NAMES:
            token_of = config.get(f"{role}_token")
            text = token_of.get("content") if isinstance(token_of, dict) else token_of
            if isinstance(text, str):
                found.append(SpecialToken(role, None, text))
    return tuple(found)


def _side_file(path: Path) -> Mapping[str, Any]:
    """A small JSON file of a folder; empty where it is not there or not sound."""
    from sartor.formats.safetensors import read_json

    with contextlib.suppress(SartorError):
        return read_json(path)
    return {}


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _memory(size: int, program: Program | None, context: int | None) -> MemoryFacts:
    weights = int(size * PACKING)
    tokens = state = None
    if program is not None and program.samples:
        tokens = min(STATE_TOKENS, context or STATE_TOKENS)
        state = state_bytes(program, tokens)
    available = memory()[1]
    return MemoryFacts(weights, tokens, state, available, weights + (state or 0) <= available)


def state_bytes(program: Program, tokens: int) -> int:
    """Bytes of state that a sequence of ``tokens`` tokens needs, as plans store it by default."""
    total = 0
    for spec in program.states:
        if isinstance(spec, RecurrentStateSpec):
            total += spec.nbytes
        else:
            window = spec.group_key[1]
            seen = min(tokens, window) if window else tokens
            total += seen * spec.bytes_per_token(_STATE_FORMAT)
    return total
