"""Qwen 3 with experts (arXiv:2505.09388): Qwen 3's attention, experts in all or some layers."""

from __future__ import annotations

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import experts, gguf, huggingface
from sartor.models.config import ExpertsConfig, ModelConfig
from sartor.models.registry import Architecture, TensorPlace


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' Qwen3MoeConfig."""
    options = huggingface.hf_options(checkpoint)
    layers = huggingface.hf_layer_count(checkpoint, options)
    bias = options.flag("attention_bias", False)
    # Unlike in the dense models the window holds for every layer.
    window = options.flag("use_sliding_window", False) and options.window("sliding_window", 4096)
    config = huggingface.hf_config(
        checkpoint,
        "qwen3_moe",
        windows=(int(window),) * layers,
        qkv_bias=bias,
        output_bias=bias,
    )
    found = ExpertsConfig(
        count=options.size("num_experts", options.size("num_local_experts", 128)),
        used=options.size("num_experts_per_tok", 8),
        size=options.size("moe_intermediate_size", 768),
        normalize=options.flag("norm_topk_prob", False),
    )
    return experts.with_experts(config, found, huggingface.hf_dense_layers(options, layers))


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    config = gguf.gguf_config(checkpoint, options, "qwen3_moe")
    config = experts.with_experts(config, gguf.gguf_experts(options))
    gguf.refuse_unread(options)
    return config


def build(config: ModelConfig) -> Program:
    return experts.sparse_decoder(config, qk_norm=True)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind == "gguf":
        return TensorPlace(gguf.gguf_name(name))
    return experts.hf_place(name, checkpoint, config)


ARCHITECTURE = Architecture(
    name="qwen3_moe",
    hf_names=("Qwen3MoeForCausalLM",),
    gguf_names=("qwen3moe",),
    models=("Qwen 3 with experts (30B-A3B, 235B-A22B, Coder)",),
    features=("experts in all or some layers", "query and key norms", "biases", "sliding window"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
