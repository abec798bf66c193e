"""Gemma 3, text (arXiv:2503.19786).

Five local layers with a sliding window, then a global one; each kind has its own rope. Norms
stand before and after attention and feed-forward, and on each query and key head. The text
part of the multimodal checkpoints is read too; their vision tensors are left alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import gguf, huggingface
from sartor.models.blocks import EMBEDDING, HEAD, decoder, gated_mlp, norm, self_attention
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.registry import Architecture, TensorPlace
from sartor.models.rope import hf_rope_table
from sartor.ops.rope import RopeSpec

_LOCAL_THETA = 10000.0
_GLOBAL_THETA = 1_000_000.0
_PERIOD = 6  # layers; the last of each period is global
_LAYERS_27B = 62  # the only size whose scores are not scaled by the head's width
GGUF_PARTS: Mapping[str, str] = {
    **gguf.LAYER_PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' Gemma3TextConfig; published files rely on them."""
    whole = huggingface.hf_options(checkpoint)
    multimodal = whole.raw("text_config") is not None
    options = whole.table("text_config") if multimodal else whole
    options.require("attn_logit_softcapping")
    options.require("use_bidirectional_attention", False)
    options.raw("quantization_config")
    count = huggingface.hf_layer_count(checkpoint, options, 26)
    hidden = options.size("hidden_size", 2304)
    head_dim = options.even_size("head_dim", 256)
    bias = options.flag("attention_bias", False)
    tied = huggingface.hf_tied_head(
        checkpoint,
        whole if multimodal else options,
        True,
        _hf_name(EMBEDDING, checkpoint),
        _hf_name(HEAD, checkpoint),
    )
    return ModelConfig(
        architecture="gemma3",
        vocab_size=options.size("vocab_size", 262208),
        hidden_size=hidden,
        ffn_size=options.size("intermediate_size", 9216),
        heads=options.size("num_attention_heads", 8),
        kv_heads=options.size("num_key_value_heads", 4),
        head_dim=head_dim,
        layers=_hf_layers(options, head_dim, count),
        context_length=options.size("max_position_embeddings", 131072),
        norm_eps=options.positive("rms_norm_eps", 1e-6),
        activation=huggingface.hf_activation(options, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=options.positive("query_pre_attn_scalar", 256) ** -0.5,
        tied_head=tied,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        embedding_scale=math.sqrt(hidden),
        final_softcap=options.number("final_logit_softcapping", 0.0),
    )


def _hf_layers(options: Options, head_dim: int, count: int) -> tuple[LayerConfig, ...]:
    period = options.size("sliding_window_pattern", _PERIOD)
    types = options.texts("layer_types") or _types(count, period)
    window = options.window("sliding_window", 4096)
    local, everywhere = _hf_ropes(options, head_dim)
    return tuple(
        LayerConfig(local if part else everywhere, part)
        for part in huggingface.windows_of_types(options, types, count, window)
    )


def _hf_ropes(options: Options, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Ropes of local and of global layers; older configurations scale the global one only."""
    context = options.size("max_position_embeddings", 131072)
    local_theta = options.positive("rope_local_base_freq", _LOCAL_THETA)
    theta = options.positive("rope_theta", _GLOBAL_THETA)
    tables = options.table("rope_parameters")
    unknown = [k for k in tables.present() if k not in ("sliding_attention", "full_attention")]
    if unknown:
        raise tables.refusal(unknown[0], tables.raw(unknown[0]))
    nested = "full_attention" in tables.present()
    whole = tables.table("full_attention") if nested else options.table("rope_scaling")
    return (
        hf_rope_table(tables.table("sliding_attention"), head_dim, local_theta, context),
        hf_rope_table(whole, head_dim, theta, context),
    )


def _types(count: int, period: int) -> tuple[str, ...]:
    return tuple(
        "sliding_attention" if (index + 1) % period else "full_attention" for index in range(count)
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    options.require("attn_logit_softcapping", 0.0)
    config = gguf.gguf_config(checkpoint, options, "gemma3", activation="gelu_tanh")
    local = RopeSpec(config.head_dim, options.positive("rope.freq_base_swa", _LOCAL_THETA))
    window = options.window("attention.sliding_window", 0)
    everywhere = config.layers[0].rope
    count = len(config.layers)
    is_local = _gguf_pattern(options, count) if window else (False,) * count
    scale = config.attention_scale
    if count == _LAYERS_27B:
        scale = (config.hidden_size // config.heads) ** -0.5
    config = dataclasses.replace(
        config,
        layers=tuple(
            LayerConfig(local, window) if part else LayerConfig(everywhere) for part in is_local
        ),
        attention_scale=scale,
        embedding_scale=math.sqrt(config.hidden_size),
        final_softcap=options.number("final_logit_softcapping", 0.0),
    )
    gguf.refuse_unread(options)
    return config


def _gguf_pattern(options: Options, count: int) -> tuple[bool, ...]:
    """Which layers are local: a period, or a flag a layer."""
    pattern = options.raw("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if len(pattern) != count:
            raise FormatError(
                f"{options.where}: {options.prefix}attention.sliding_window_pattern has "
                f"{len(pattern)} entries for {count} layers"
            )
        return tuple(bool(part) for part in pattern)
    period = options.size("attention.sliding_window_pattern", _PERIOD)
    return tuple(bool((index + 1) % period) for index in range(count))


def sandwich_layer(
    b: Builder, x: Value, config: ModelConfig, part: LayerConfig, *, qk_norm: bool
) -> Value:
    """Norms before and after each part; the sums are of normalised results."""
    inner = norm(b, x, config, "input_layernorm")
    inner = self_attention(b, inner, config, part, qk_norm=qk_norm)
    inner = norm(b, inner, config, "post_attention_layernorm")
    x = b.add(x, inner, "attention_residual")
    inner = norm(b, x, config, "pre_feedforward_layernorm")
    inner = gated_mlp(b, inner, config)
    inner = norm(b, inner, config, "post_feedforward_layernorm")
    return b.add(x, inner, "mlp_residual")


def build(config: ModelConfig) -> Program:
    return decoder(config, partial(sandwich_layer, qk_norm=True))


def _hf_name(name: str, checkpoint: Checkpoint) -> str:
    """The text part of a multimodal checkpoint stands under a prefix of its own."""
    names = checkpoint.names()
    if name == HEAD:
        nested = "language_model.lm_head.weight"
        return nested if nested in names else name
    for prefix in _TEXT_PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix + name.removeprefix("model.")
    return name


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        return TensorPlace(gguf.gguf_name(name, GGUF_PARTS))
    return TensorPlace(_hf_name(name, checkpoint))


ARCHITECTURE = Architecture(
    name="gemma3",
    hf_names=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf_names=("gemma3",),
    models=("Gemma 3 270M to 27B (text)",),
    features=(
        "query and key norms",
        "local and global layers",
        "biases",
        "final soft-cap",
        "tied head",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=(
        *huggingface.IGNORED,
        r"(model\.)?(vision_tower|multi_modal_projector)\..*",
        r"(v|mm)\..*",
    ),
)
