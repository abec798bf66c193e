"""What the configurations of Hugging Face checkpoints have in common.

Source: the configuration classes of transformers 5 and what their models read of them. An
option that those models do not read is not read here either.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import Checkpoint
from sartor.models.blocks import EMBEDDING, HEAD
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.rope import hf_rope
from sartor.ops.rope import RopeSpec

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""Names in transformers, and the operator's ``kind``."""

IGNORED = (r".*\.rotary_emb\.inv_freq",)
"""Tensors that hold no weights: frequencies follow from the configuration."""


def hf_options(checkpoint: Checkpoint) -> Options:
    """The options in config.json. The quantised layout, if any, is the checkpoint's business."""
    options = Options(checkpoint.metadata, f"{checkpoint.path}/config.json")
    options.raw("quantization_config")
    return options


def hf_activation(options: Options, key: str = "hidden_act", default: str = "silu") -> str:
    name = options.text(key, default)
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"{options.where}: {key} = {name!r} is not implemented; implemented are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def hf_layer_count(checkpoint: Checkpoint, options: Options, default: int | None = None) -> int:
    """Layers; no more than the checkpoint can hold, so that a damaged number costs nothing."""
    count = options.size("num_hidden_layers", default)
    if count > len(checkpoint.names()):
        raise FormatError(
            f"{options.where}: num_hidden_layers is {count}, but the checkpoint has only "
            f"{len(checkpoint.names())} tensors"
        )
    return count


def hf_head_dim(options: Options, heads: int, hidden: int) -> int:
    """The width of a head, stated or derived."""
    if options.raw("head_dim") is None and hidden % heads:
        raise UnsupportedError(
            f"{options.where}: hidden_size = {hidden} does not divide into "
            f"num_attention_heads = {heads}, and no head_dim is given"
        )
    return options.even_size("head_dim", hidden // heads)


def hf_tied_head(
    checkpoint: Checkpoint,
    options: Options,
    default: bool,
    embedding: str = EMBEDDING,
    head: str = HEAD,
) -> bool:
    """Whether the head reads the embedding.

    A checkpoint that is tied and yet holds a head of its own is tied only if both are equal
    (as in transformers). Where nothing is said, a checkpoint without a head is tied.
    """
    has_head = head in checkpoint.names()
    if options.raw("tie_word_embeddings") is None and not has_head:
        return True
    if not options.flag("tie_word_embeddings", default):
        return False
    return not has_head or np.array_equal(
        checkpoint.weight(head).data, checkpoint.weight(embedding).data
    )


def hf_windows(options: Options, layers: int) -> tuple[int, ...]:
    """Window of each layer of the Qwen family: ``use_sliding_window``, ``max_window_layers``."""
    types = options.texts("layer_types")
    used = options.flag("use_sliding_window", False)
    window = options.window("sliding_window", 4096) if used else 0
    first = options.integer("max_window_layers", 28)
    if types is None:
        return tuple(window if index >= first else 0 for index in range(layers))
    return windows_of_types(options, types, layers, window)


def windows_of_types(
    options: Options, types: tuple[str, ...], layers: int, window: int
) -> tuple[int, ...]:
    """Window of each layer from ``layer_types``, which must fit the layers."""
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != layers:
        raise options.refusal("layer_types", unknown or f"{len(types)} entries")
    if "sliding_attention" in types and window <= 0:
        raise UnsupportedError(
            f"{options.where}: layer_types has sliding_attention, but sliding_window is not set"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def hf_dense_layers(options: Options, layers: int) -> set[int]:
    """Layers of the Qwen family that have no experts: those in ``mlp_only_layers``, and all but
    the last of every ``decoder_sparse_step`` layers."""
    listed = options.raw("mlp_only_layers") or ()
    if not isinstance(listed, list | tuple) or not all(isinstance(item, int) for item in listed):
        raise options.refusal("mlp_only_layers", listed)
    step = options.size("decoder_sparse_step", 1)
    return {*listed, *(index for index in range(layers) if (index + 1) % step)}


def hf_context(options: Options, rope: RopeSpec) -> int:
    """Longest sequence in tokens.

    ``max_position_embeddings`` states it, except where the rope stretches it by definition:
    dynamic NTK grows from it, and YaRN states the pre-training context beside it.
    """
    stated = options.size("max_position_embeddings")
    if rope.kind == "dynamic":
        return int(stated * max(rope.factor, 1))
    if rope.kind == "yarn":
        return max(stated, int(rope.original_context * rope.factor))
    return stated


def hf_config(
    checkpoint: Checkpoint,
    architecture: str,
    *,
    windows: tuple[int, ...] | None = None,
    head_dim: int = 0,
    theta: float = 10000.0,
    partial: float | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
) -> ModelConfig:
    """The configuration of a Llama-like decoder.

    ``head_dim`` is a default, 0 derives it; so are ``theta``, ``norm_eps`` and ``tied``;
    ``partial`` as in :func:`hf_rope`.
    """
    options = hf_options(checkpoint)
    layers = hf_layer_count(checkpoint, options)
    hidden = options.size("hidden_size")
    heads = options.size("num_attention_heads")
    if not head_dim or options.raw("head_dim") is not None:
        head_dim = hf_head_dim(options, heads, hidden)
    rope = hf_rope(options, head_dim, theta, partial=partial)
    return ModelConfig(
        architecture=architecture,
        vocab_size=options.size("vocab_size"),
        hidden_size=hidden,
        ffn_size=options.size("intermediate_size"),
        heads=heads,
        kv_heads=options.size("num_key_value_heads", heads),
        head_dim=head_dim,
        layers=tuple(LayerConfig(rope, window) for window in windows or (0,) * layers),
        context_length=hf_context(options, rope),
        norm_eps=options.positive("rms_norm_eps", norm_eps),
        activation=hf_activation(options),
        attention_scale=head_dim**-0.5,
        tied_head=hf_tied_head(checkpoint, options, default=tied),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )
