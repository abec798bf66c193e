"""OLMoE (arXiv:2409.02060): Llama's layer with experts, whose weights are not normalised; queries
and keys are normalised over all heads together."""

from __future__ import annotations

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import experts, gguf, huggingface
from sartor.models.config import ExpertsConfig, ModelConfig
from sartor.models.registry import Architecture, TensorPlace

_EPS = 1e-5  # where config.json does not say


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' OlmoeConfig."""
    options = huggingface.hf_options(checkpoint)
    options.require("clip_qkv")  # any number clips queries, keys and values
    bias = options.flag("attention_bias", False)
    config = huggingface.hf_config(
        checkpoint, "olmoe", norm_eps=_EPS, qkv_bias=bias, output_bias=bias
    )
    found = ExpertsConfig(
        count=options.size("num_experts", options.size("num_local_experts", 64)),
        used=options.size("num_experts_per_tok", 8),
        size=config.ffn_size,
        normalize=options.flag("norm_topk_prob", False),
    )
    return experts.with_experts(config, found)


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    config = gguf.gguf_config(
        checkpoint,
        options,
        "olmoe",
        qkv_bias=gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v"),
        output_bias=gguf.has_biases(checkpoint, "attn_output"),
    )
    normalize = options.flag("expert_weights_norm", False)
    found = gguf.gguf_experts(options, config.ffn_size, normalize=normalize)
    gguf.refuse_unread(options)
    return experts.with_experts(config, found)


def build(config: ModelConfig) -> Program:
    return experts.sparse_decoder(config, row_norm=True)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        return TensorPlace(gguf.gguf_name(name))
    return experts.hf_place(name, checkpoint, config)


ARCHITECTURE = Architecture(
    name="olmoe",
    hf_names=("OlmoeForCausalLM",),
    gguf_names=("olmoe",),
    models=("OLMoE 1B-7B (0924, 0125)",),
    features=("experts", "query and key norms over all heads", "biases", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
