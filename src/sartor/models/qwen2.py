"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama's layer with biases on query, key and value."""

from __future__ import annotations

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import gguf, huggingface
from sartor.models.blocks import decoder, pre_norm_layer
from sartor.models.config import ModelConfig
from sartor.models.registry import Architecture, TensorPlace


def configure(checkpoint: Checkpoint) -> ModelConfig:
    if checkpoint.kind == "gguf":
        gguf_options = gguf.gguf_options(checkpoint)
        config = gguf.gguf_config(checkpoint, gguf_options, "qwen2", qkv_bias=True)
        gguf.refuse_unread(gguf_options)
        return config
    options = huggingface.hf_options(checkpoint)
    windows = huggingface.hf_windows(options, huggingface.hf_layer_count(checkpoint, options))
    return huggingface.hf_config(checkpoint, "qwen2", windows=windows, qkv_bias=True)


def build(config: ModelConfig) -> Program:
    return decoder(config, pre_norm_layer)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    return TensorPlace(gguf.gguf_name(name) if checkpoint.kind == "gguf" else name)


ARCHITECTURE = Architecture(
    name="qwen2",
    hf_names=("Qwen2ForCausalLM",),
    gguf_names=("qwen2",),
    models=("Qwen 2", "Qwen 2.5", "DeepSeek-R1-Distill-Qwen"),
    features=("query, key and value biases", "sliding window by layer", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED + gguf.IGNORED,
)
