"""Granite 3 (dense): Llama's shape with a factor each for embedding, attention scores, sums and
logits (arXiv:2203.03466: what was tuned on a small model then holds for a large one)."""

from __future__ import annotations

import dataclasses

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, pre_norm_layer
from sartor.models.config import ModelConfig
from sartor.models.llama import locate
from sartor.models.options import Options
from sartor.models.registry import Architecture


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint)
    options = huggingface.hf_options(checkpoint)
    bias = options.flag("attention_bias", False)
    config = huggingface.hf_config(
        checkpoint,
        "granite",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=options.flag("mlp_bias", False),
    )
    return dataclasses.replace(
        config,
        attention_scale=options.positive("attention_multiplier", 1.0),
        embedding_scale=options.positive("embedding_multiplier", 1.0),
        residual_scale=options.positive("residual_multiplier", 1.0),
        logit_scale=1 / options.positive("logits_scaling", 1.0),
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    options = gguf.gguf_options(checkpoint)
    options.require("rope.scaling.finetuned", True)  # llama.cpp: false is a model without rope
    config = gguf.gguf_config(
        checkpoint,
        options,
        "granite",
        qkv_bias=gguf.has_biases(checkpoint, "attn_q", "attn_k", "attn_v"),
        output_bias=gguf.has_biases(checkpoint, "attn_output"),
        mlp_bias=gguf.has_biases(checkpoint, "ffn_gate", "ffn_up", "ffn_down"),
    )
    config = dataclasses.replace(
        config,
        attention_scale=_factor(options, "attention.scale", config.attention_scale),
        embedding_scale=_factor(options, "embedding_scale", 1.0),
        residual_scale=_factor(options, "residual_scale", 1.0),
        logit_scale=1 / _factor(options, "logit_scale", 1.0),
    )
    gguf.refuse_unread(options)
    return config


def _factor(options: Options, key: str, default: float) -> float:
    """A factor; 0 is "not set"."""
    return options.cap(key, 0.0) or default


def build(config: ModelConfig) -> Program:
    return decoder(config, pre_norm_layer)


ARCHITECTURE = Architecture(
    name="granite",
    hf_names=("GraniteForCausalLM",),
    gguf_names=("granite",),
    models=("Granite 3.0 to 3.3 (dense)",),
    features=("factors of embedding, scores, sums and logits", "biases", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
