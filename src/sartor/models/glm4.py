"""GLM-4, dense (arXiv:2406.12793): half of each head is rotated, pairs being neighbours; gate and
up are fused. The 0414 models norm the results of attention and feed-forward as well."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, gated_mlp, norm, pre_norm_layer, self_attention
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.fused import attention_and_mlp, locate_part
from sartor.models.registry import Architecture, TensorPlace

_HEAD_DIM = 128  # where config.json does not say
_ROTATED = 0.5
_EPS = 1.5625e-7
_GGUF_PARTS = {
    **gguf.LAYER_PARTS,
    "mlp.gate_up_proj": "ffn_up",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, kw_only=True)
class Glm4Config(ModelConfig):
    """``sandwich``: norms behind attention and feed-forward too."""

    sandwich: bool


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        options = gguf.gguf_options(checkpoint)
        bias = gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v")
        config = gguf.gguf_config(checkpoint, options, "glm4", partial=True, qkv_bias=bias)
        gguf.refuse_unread(options)
        sandwich = True
    else:
        config = huggingface.hf_config(
            checkpoint,
            "glm4",
            head_dim=_HEAD_DIM,
            partial=_ROTATED,
            norm_eps=_EPS,
            qkv_bias=huggingface.hf_options(checkpoint).flag("attention_bias", True),
        )
        sandwich = checkpoint.architecture == "Glm4ForCausalLM"
    rope = config.layers[0].rope
    assert rope is not None
    layer = LayerConfig(dataclasses.replace(rope, interleaved=True))
    values = vars(config) | {"layers": (layer,) * len(config.layers)}
    return Glm4Config(**values, sandwich=sandwich)


def sandwich_layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
    """Norms before and after each part; the sums are of normalised results."""
    inner = norm(b, x, config, "input_layernorm")
    inner = self_attention(b, inner, config, part)
    inner = norm(b, inner, config, "post_self_attn_layernorm")
    x = b.add(x, inner, "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    inner = gated_mlp(b, inner, config)
    inner = norm(b, inner, config, "post_mlp_layernorm")
    return b.add(x, inner, "mlp_residual")


def build(config: ModelConfig) -> Program:
    assert isinstance(config, Glm4Config)
    return decoder(config, sandwich_layer if config.sandwich else pre_norm_layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    layout = attention_and_mlp(config, qkv=False)
    place = locate_part(name, layout, config.hidden_size) or TensorPlace(name)
    if checkpoint.kind == "gguf":
        place = dataclasses.replace(place, tensor=gguf.gguf_name(place.tensors[0], _GGUF_PARTS))
    return place


ARCHITECTURE = Architecture(
    name="glm4",
    hf_names=("Glm4ForCausalLM", "GlmForCausalLM"),
    gguf_names=("glm4",),
    models=("GLM-4 9B and 32B (0414, Z1)", "GLM-4 9B chat (in transformers' layout)"),
    features=("partial rope over neighbours", "norms behind each part", "biases", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
