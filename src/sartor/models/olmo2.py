"""OLMo 2 (arXiv:2501.00656): norms stand behind attention and feed-forward and not before them;
queries and keys are normalised over all heads together."""

from __future__ import annotations

from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, gated_mlp, norm, self_attention
from sartor.models.config import LayerConfig, ModelConfig
from sartor.models.registry import Architecture, TensorPlace

_EPS = 1e-5  # where config.json does not say
_GGUF_PARTS = {
    **gguf.LAYER_PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        options = gguf.gguf_options(checkpoint)
        config = gguf.gguf_config(checkpoint, options, "olmo2")
        gguf.refuse_unread(options)
        return config
    bias = huggingface.hf_options(checkpoint).flag("attention_bias", False)
    return huggingface.hf_config(
        checkpoint, "olmo2", norm_eps=_EPS, qkv_bias=bias, output_bias=bias
    )


def layer(b: Builder, x: Value, config: ModelConfig, part: LayerConfig) -> Value:
    """Attention, norm, sum; feed-forward, norm, sum."""
    inner = self_attention(b, x, config, part, row_norm=True)
    inner = norm(b, inner, config, "post_attention_layernorm")
    x = b.add(x, inner, "attention_residual")
    inner = gated_mlp(b, x, config)
    inner = norm(b, inner, config, "post_feedforward_layernorm")
    return b.add(x, inner, "mlp_residual")


def build(config: ModelConfig) -> Program:
    return decoder(config, layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        return TensorPlace(gguf.gguf_name(name, _GGUF_PARTS))
    return TensorPlace(name)


ARCHITECTURE = Architecture(
    name="olmo2",
    hf_names=("Olmo2ForCausalLM",),
    gguf_names=("olmo2",),
    models=("OLMo 2 1B to 32B",),
    features=("query and key norms over all heads", "biases", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
