"""Phi-3 and Phi-4 (arXiv:2404.14219; arXiv:2412.08905): Llama's shape, with q, k, v and gate, up
fused, a sliding window in some sizes, and LongRoPE (arXiv:2402.13753) in the long ones."""

from __future__ import annotations

import dataclasses

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, pre_norm_layer
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.fused import attention_and_mlp, locate_part
from sartor.models.registry import Architecture, TensorPlace
from sartor.models.rope import gguf_longrope
from sartor.ops.rope import RopeSpec

_ATTENTION_FACTOR = "rope.scaling.attn_factor"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_GGUF_PARTS = {
    **gguf.LAYER_PARTS,
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint)
    options = huggingface.hf_options(checkpoint)
    layers = huggingface.hf_layer_count(checkpoint, options)
    window = options.window("sliding_window", 0)
    config = huggingface.hf_config(
        checkpoint, "phi3", windows=(window,) * layers, partial=1.0, norm_eps=1e-5
    )
    rope = config.layers[0].rope
    if rope is not None and rope.kind == "longrope":
        # transformers has a default for it, which would be wrong for most models.
        options.size("original_max_position_embeddings")
    return config


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    window = options.window("attention.sliding_window", 0)
    config = gguf.gguf_config(checkpoint, options, "phi3", window=window, partial=True)
    rope = config.layers[0].rope
    if rope is not None and _LONG in checkpoint.names():
        context = config.context_length
        original = options.size("rope.scaling.original_context_length", context)
        rope = _longrope(checkpoint, rope, context, original)
        notes: tuple[str, ...] = ()
        if options.raw(_ATTENTION_FACTOR) is None:
            notes = (
                f"the file has no {options.prefix}{_ATTENTION_FACTOR}, which LongRoPE needs: 1 is "
                "assumed; where answers are poor, convert the model again",
            )
        config = dataclasses.replace(
            config, layers=(LayerConfig(rope, window),) * len(config.layers), notes=notes
        )
    gguf.refuse_unread(options)
    return config


def _longrope(checkpoint: Checkpoint, rope: RopeSpec, context: int, original: int) -> RopeSpec:
    """The rope whose divisors are tensors; the file states what cos and sin are multiplied by."""
    if rope.kind != "default":
        raise FormatError(
            f"{checkpoint.path}: has {_LONG} beside rope scaling of type {rope.kind!r}; only one "
            "can hold, convert the model again"
        )
    short, long = (
        tuple(float(divisor) for divisor in checkpoint.weight(name).dequantize().reshape(-1))
        for name in (_SHORT, _LONG)
    )
    return gguf_longrope(rope, context, original, short, long, str(checkpoint.path))


def build(config: ModelConfig) -> Program:
    return decoder(config, pre_norm_layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    layout = attention_and_mlp(config, qkv=True)
    place = locate_part(name, layout, config.hidden_size) or TensorPlace(name)
    if checkpoint.kind == "gguf":
        place = dataclasses.replace(place, tensor=gguf.gguf_name(place.tensors[0], _GGUF_PARTS))
    return place


ARCHITECTURE = Architecture(
    name="phi3",
    hf_names=("Phi3ForCausalLM",),
    gguf_names=("phi3",),
    models=("Phi-3 and Phi-3.5 mini and medium", "Phi-4", "Phi-4 mini"),
    features=("LongRoPE", "partial rope", "sliding window", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=(*huggingface.IGNORED, *gguf.IGNORED, r"rope_factors_(short|long)\.weight"),
)
