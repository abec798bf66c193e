"""Qwen 1.5 and 2 with experts (arXiv:2407.10671): Qwen 2's attention; in all or some layers
experts, whose weights are not normalised, beside a shared one with a gate of its own."""

from __future__ import annotations

import dataclasses

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import experts, gguf, huggingface
from sartor.models.config import ExpertsConfig, ModelConfig
from sartor.models.options import Options
from sartor.models.registry import Architecture, TensorPlace

_GGUF_PARTS = {
    **gguf.LAYER_PARTS,
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' Qwen2MoeConfig."""
    options = huggingface.hf_options(checkpoint)
    layers = huggingface.hf_layer_count(checkpoint, options)
    config = huggingface.hf_config(
        checkpoint,
        "qwen2_moe",
        windows=_windows(options, layers),
        qkv_bias=options.flag("qkv_bias", True),
    )
    found = ExpertsConfig(
        count=options.size("num_experts", 60),
        used=options.size("num_experts_per_tok", 4),
        size=options.size("moe_intermediate_size", 1408),
        normalize=options.flag("norm_topk_prob", False),
        shared_size=options.size("shared_expert_intermediate_size", 5632),
    )
    return experts.with_experts(config, found, huggingface.hf_dense_layers(options, layers))


def _windows(options: Options, layers: int) -> tuple[int, ...]:
    """Window of each layer; unless ``layer_types`` says otherwise, every other one of the first
    ``max_window_layers`` has it, where the dense models have it in all but these."""
    used = options.flag("use_sliding_window", False)
    window = options.window("sliding_window", 4096) if used else 0
    end = options.integer("max_window_layers", 28)
    types = options.texts("layer_types")
    if types is None:
        return tuple(0 if index % 2 or index >= end else window for index in range(layers))
    return huggingface.windows_of_types(options, types, layers, window)


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    """Sizes of experts that a file does not state are derived as llama.cpp derives them."""
    options = gguf.gguf_options(checkpoint)
    biased = gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v")
    config = gguf.gguf_config(checkpoint, options, "qwen2_moe", qkv_bias=biased)
    found = gguf.gguf_experts(
        options,
        config.ffn_size // options.size("expert_used_count"),
        normalize=options.flag("expert_weights_norm", False),
    )
    shared = options.size("expert_shared_feed_forward_length", config.ffn_size)
    gguf.refuse_unread(options)
    return experts.with_experts(config, dataclasses.replace(found, shared_size=shared))


def build(config: ModelConfig) -> Program:
    return experts.sparse_decoder(config, shared_gate=True)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind != "gguf":
        return experts.hf_place(name, checkpoint, config)
    tensor, row = gguf.gguf_name(name, _GGUF_PARTS), (config.hidden_size,)
    # llama.cpp's tools drop the axis of the single row when they quantise a file.
    if name.endswith(".shared_expert_gate.weight") and checkpoint.info(tensor).shape == row:
        return TensorPlace(tensor, shape=row, convert=lambda weight: weight.reshape(1))
    return TensorPlace(tensor)


ARCHITECTURE = Architecture(
    name="qwen2_moe",
    hf_names=("Qwen2MoeForCausalLM",),
    gguf_names=("qwen2moe",),
    models=("Qwen 1.5 MoE A2.7B", "Qwen 2 57B-A14B"),
    features=(
        "experts in all or some layers, a gated shared one",
        "query, key and value biases",
        "sliding window by layer",
        "tied head",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
