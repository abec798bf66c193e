"""Qwen 3, dense (arXiv:2505.09388): each query and key head is normalised before the rope."""

from __future__ import annotations

from functools import partial

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, pre_norm_layer
from sartor.models.config import ModelConfig
from sartor.models.registry import Architecture, TensorPlace

_HEAD_DIM = 128  # where config.json does not say


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        gguf_options = gguf.gguf_options(checkpoint)
        config = gguf.gguf_config(checkpoint, gguf_options, "qwen3")
        gguf.refuse_unread(gguf_options)
        return config
    options = huggingface.hf_options(checkpoint)
    bias = options.flag("attention_bias", False)
    return huggingface.hf_config(
        checkpoint,
        "qwen3",
        windows=huggingface.hf_windows(options, huggingface.hf_layer_count(checkpoint, options)),
        head_dim=_HEAD_DIM,
        qkv_bias=bias,
        output_bias=bias,
    )


def build(config: ModelConfig) -> Program:
    return decoder(config, partial(pre_norm_layer, qk_norm=True))


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    return TensorPlace(gguf.gguf_name(name) if checkpoint.kind == "gguf" else name)


ARCHITECTURE = Architecture(
    name="qwen3",
    hf_names=("Qwen3ForCausalLM",),
    gguf_names=("qwen3",),
    models=("Qwen 3 (dense)",),
    features=("query and key norms", "biases", "sliding window by layer", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
