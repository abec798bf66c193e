"""Llama and what has its shape: Llama 1-3, SmolLM 1 and 2, Mistral 7B, and many others.

Llama 2: arXiv:2307.09288. Mistral 7B (sliding window): arXiv:2310.06825. GGUF files say "llama"
for Mixtral (arXiv:2401.04088), too: it has experts instead of the feed-forward part.
"""

from __future__ import annotations

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.config import ModelConfig
from sartor.models.experts import sparse_decoder, with_experts
from sartor.models.registry import Architecture, TensorPlace


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint)
    options = huggingface.hf_options(checkpoint)
    if checkpoint.architecture == "MistralForCausalLM":
        layers = huggingface.hf_layer_count(checkpoint, options)
        window = options.window("sliding_window", 4096)
        # Mistral's window holds for every layer; a checkpoint that says otherwise is not one.
        uniform = "sliding_attention" if window else "full_attention"
        if set(options.texts("layer_types") or (uniform,)) != {uniform}:
            raise options.refusal("layer_types", options.raw("layer_types"))
        return huggingface.hf_config(checkpoint, "llama", windows=(window,) * layers)
    bias = options.flag("attention_bias", False)
    return huggingface.hf_config(
        checkpoint,
        "llama",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=options.flag("mlp_bias", False),
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    config = gguf.gguf_config(
        checkpoint,
        options,
        "llama",
        window=options.window("attention.sliding_window", 0),
        qkv_bias=gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v"),
        output_bias=gguf.has_biases(checkpoint, "attn_output"),
        mlp_bias=gguf.has_biases(checkpoint, "ffn_gate", "ffn_up", "ffn_down"),
    )
    if options.integer("expert_count", 0):
        config = with_experts(config, gguf.gguf_experts(options, config.ffn_size))
    gguf.refuse_unread(options)
    return config


def build(config: ModelConfig) -> Program:
    return sparse_decoder(config)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    if checkpoint.kind != "gguf":
        return TensorPlace(name)
    for part, heads in ((".q_proj.", config.heads), (".k_proj.", config.kv_heads)):
        if part in name:
            rows = gguf.halves_from_interleaved(heads, config.head_dim)
            return TensorPlace(gguf.gguf_name(name), rows)
    return TensorPlace(gguf.gguf_name(name))


ARCHITECTURE = Architecture(
    name="llama",
    hf_names=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf_names=("llama",),
    models=("Llama 1-3", "SmolLM 1-2", "Mistral 7B", "TinyLlama", "Mixtral (GGUF)"),
    features=("biases", "sliding window (Mistral)", "tied head", "experts (GGUF)"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
