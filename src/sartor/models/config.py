"""What a model file needs to know of a checkpoint, in one normalised form."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.errors import UnsupportedError
from sartor.ops.rope import RopeSpec


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. ``window`` is in tokens; 0 sees all of them."""

    rope: RopeSpec
    window: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and options, whichever checkpoint format they came from.

    vocab_size       rows of the embedding
    ffn_size         features inside the feed-forward part
    attention_scale  factor of the scores before the softmax
    tied_head        the output head reads the embedding's weight
    norm_offset      added to every norm weight (Gemma stores ``weight - 1``)
    embedding_scale  factor of the embedding rows
    final_softcap    the logits are ``cap * tanh(logits / cap)``; 0 for none
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    context_length: int
    norm_eps: float
    activation: str
    attention_scale: float
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    final_softcap: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UnsupportedError(
                f"{self.architecture}: {self.heads} attention heads do not divide into "
                f"num_key_value_heads = {self.kv_heads} groups"
            )
