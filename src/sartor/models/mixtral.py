"""Mixtral (arXiv:2401.04088): Mistral's layer with experts, as Hugging Face checkpoints hold it.

In GGUF it is called "llama".
"""

from __future__ import annotations

import dataclasses
import re

from sartor.formats import Checkpoint
from sartor.graph import Program
from sartor.models import experts, huggingface
from sartor.models.config import ExpertsConfig, ModelConfig
from sartor.models.registry import Architecture, TensorPlace

_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_MLP = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:gate|experts\.(gate|up|down)_proj)\.weight")


def configure(checkpoint: Checkpoint) -> ModelConfig:
    """Defaults are those of transformers' MixtralConfig."""
    options = huggingface.hf_options(checkpoint)
    layers = huggingface.hf_layer_count(checkpoint, options)
    window = options.window("sliding_window", 0)
    config = huggingface.hf_config(checkpoint, "mixtral", windows=(window,) * layers, theta=1e6)
    config = dataclasses.replace(config, norm_eps=options.positive("rms_norm_eps", 1e-5))
    return experts.with_experts(
        config,
        ExpertsConfig(
            count=options.size("num_local_experts", 8),
            used=options.size("num_experts_per_tok", 2),
            size=config.ffn_size,
        ),
    )


def build(config: ModelConfig) -> Program:
    return experts.sparse_decoder(config)


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    match = _MLP.fullmatch(name)
    if match is None:
        return TensorPlace(name)
    layer, part = match.groups()
    old = f"{layer}.block_sparse_moe"
    if f"{layer}.mlp.gate.weight" in checkpoint.names():
        return experts.hf_place(name, checkpoint, config)
    if part is None:
        return TensorPlace(f"{old}.gate.weight")
    return experts.apart(f"{old}.experts.{{}}.{_PARTS[part]}.weight", checkpoint, config)


ARCHITECTURE = Architecture(
    name="mixtral",
    hf_names=("MixtralForCausalLM",),
    gguf_names=(),
    models=("Mixtral 8x7B and 8x22B",),
    features=("experts", "sliding window", "tied head"),
    configure=configure,
    build=build,
    locate=locate,
    ignored=huggingface.IGNORED,
)
