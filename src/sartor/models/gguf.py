"""What GGUF checkpoints have in common: keys, tensor names, the order of rotary rows.

Source: ``docs/gguf.md`` of ggml, and llama.cpp for the meaning of the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.models.config import ExpertsConfig, LayerConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.rope import gguf_rope
from sartor.ops.rope import RopeSpec

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"
IGNORED = (re.escape(ROPE_FREQUENCIES), r"blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that are no weights of the program: the first goes into the rope."""

_OUTSIDE = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}
LAYER_PARTS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Parts of a layer: the Hugging Face name, and GGUF's."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "pooling_type": (0,),
}
"""Values of optional keys that change nothing."""

_NOTES = ("tensor_data_layout", "rope.scaling.finetuned", "vision.*", "mm.*")
"""Keys that do not bear on the text decoder."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str, parts: Mapping[str, str] = LAYER_PARTS) -> str:
    """The GGUF name of a tensor by its Hugging Face name."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTSIDE[name]
    return f"blk.{match[1]}.{parts[match[2]]}.{match[3]}"


def halves_from_interleaved(heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Rows of a projection stored for interleaved rope, in the order of rope over halves.

    GGUF files of architecture "llama" keep feature ``i`` and ``i + head_dim / 2`` of a head
    next to each other; indexing the rows with the result puts them back.
    """
    rows = np.arange(heads * head_dim, dtype=np.int64)
    return rows.reshape(heads, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)


def gguf_options(checkpoint: Checkpoint) -> Options:
    """The keys of the file's architecture."""
    return Options(checkpoint.metadata, str(checkpoint.path), f"{checkpoint.architecture}.")


def refuse_unread(options: Options) -> None:
    """Every key of the architecture has been read, changes nothing, or is refused by name."""
    for key, values in _NEUTRAL.items():
        if not options.has_read(key):
            options.require(key, *values)
    options.refuse_unread(_NOTES)


def has_biases(checkpoint: Checkpoint, *parts: str) -> bool:
    """Whether the first layer has a bias in any of these parts; strict loading checks the rest."""
    names = set(checkpoint.names())
    return any(f"blk.0.{part}.bias" in names for part in parts)


def layer_count(checkpoint: Checkpoint, options: Options) -> int:
    """Layers; no more than the file can hold, so that a damaged number costs nothing."""
    count = options.size("block_count")
    if count > len(checkpoint.names()):
        raise FormatError(
            f"{options.where}: {options.prefix}block_count is {count}, but the file has only "
            f"{len(checkpoint.names())} tensors"
        )
    return count


def gguf_config(
    checkpoint: Checkpoint,
    options: Options,
    architecture: str,
    *,
    window: int = 0,
    partial: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    activation: str = "silu",
    head: tuple[int, RopeSpec] | None = None,
) -> ModelConfig:
    """The configuration of a decoder whose layers are alike; ``partial`` as in
    :func:`gguf_rope`. ``head`` gives width and rope of a head where the caller has read them."""
    names = set(checkpoint.names())
    if EMBEDDING not in names:
        raise FormatError(f"{checkpoint.path}: tensor {EMBEDDING} is missing; fetch it again")
    vocab = checkpoint.info(EMBEDDING).shape[0]
    if options.size("vocab_size", vocab) != vocab:
        raise FormatError(
            f"{options.where}: {options.prefix}vocab_size differs from {EMBEDDING}, which has "
            f"{vocab} rows"
        )
    count = layer_count(checkpoint, options)
    hidden = options.size("embedding_length")
    heads = options.size("attention.head_count")
    context = options.size("context_length")
    if head is None:
        head_dim = options.even_size("attention.key_length", hidden // heads)
        options.require("attention.value_length", head_dim)
        frequencies: tuple[float, ...] = ()
        if ROPE_FREQUENCIES in names:
            divisors = checkpoint.weight(ROPE_FREQUENCIES).dequantize()
            frequencies = tuple(float(divisor) for divisor in divisors)
        head = head_dim, gguf_rope(options, head_dim, context, frequencies, partial=partial)
    head_dim, rope = head
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        ffn_size=options.size("feed_forward_length"),
        heads=heads,
        kv_heads=options.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        layers=(LayerConfig(rope, window),) * count,
        context_length=context,
        norm_eps=options.positive("attention.layer_norm_rms_epsilon"),
        activation=activation,
        attention_scale=head_dim**-0.5,
        tied_head=HEAD not in names,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )


def gguf_experts(options: Options, size: int = 0, *, normalize: bool = True) -> ExpertsConfig:
    """Experts weighted by a softmax, over the chosen or over all: nearly every architecture's.

    ``size`` is the width of an expert where the file does not state it. ``normalize`` is for
    architectures that leave it to the file; all others normalise, and a file that says otherwise
    is refused.
    """
    options.require("expert_gating_func", 0, 1)
    options.require("expert_weights_norm", normalize)
    options.require("expert_weights_scale", 0.0, 1.0)
    return ExpertsConfig(
        count=options.size("expert_count"),
        used=options.size("expert_used_count"),
        size=options.size("expert_feed_forward_length", size or None),
        normalize=normalize,
    )
