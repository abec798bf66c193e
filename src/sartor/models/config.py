"""What a model file needs to know of a checkpoint, in one normalised form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sartor.errors import UnsupportedError
from sartor.ops.rope import RopeSpec


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    ``rope`` is None for a layer without rotary positions; ``window`` is in tokens, 0 sees all of
    them; ``sparse`` layers have experts as their feed-forward part.
    """

    rope: RopeSpec | None
    window: int = 0
    sparse: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a model's sparse layers, and how tokens are sent to them.

    count, used    experts, and how many of them a token is sent to
    size           features inside an expert
    score, normalize, scale, groups, top_groups, group_score   as in ops.experts.route_experts
    choice_bias    a bias is added to the scores for the choice (DeepSeek-V3)
    router_bias    the router's linear layer has a bias; ``bias``: those of the experts do
    shared_size    features inside the expert that sees every token; 0 for none
    """

    count: int
    used: int
    size: int
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    choice_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    shared_size: int = 0

    def __post_init__(self) -> None:
        eligible = self.count // self.groups * self.top_groups
        if self.count % self.groups or not 0 < self.used <= eligible <= self.count:
            raise UnsupportedError(
                f"experts: {self.used} of {self.count} a token, from {self.top_groups} of "
                f"{self.groups} groups, cannot be chosen; the configuration is damaged"
            )


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of latent attention (DeepSeek-V2, arXiv:2405.04434).

    query_rank  features that queries are compressed to; 0 where they are not
    rank        compressed features of a token's keys and values, which the state keeps
    nope_dim    features of a head's key that are not rotated; rope_dim: those that are
    value_dim   features of a head's value
    """

    query_rank: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class VectorStep:
    """One step behind the pooling of an encoder, on the vector of a text.

    kind        ``dense``, ``layer_norm`` or ``normalize`` (length 1)
    name        prefix of its weights; empty where it has none
    width       features that it gives
    bias        whether a dense step has one
    activation  behind a dense step: a kind of the operator, ``tanh``, or empty for none
    residual    a dense step adds its input to its result; through a matrix where widths differ
    """

    kind: str
    name: str = ""
    width: int = 0
    bias: bool = False
    activation: str = ""
    residual: bool = False


@dataclass(frozen=True)
class VectorConfig:
    """What an encoder makes of its tokens, and what it wants to be asked with.

    poolings        how tokens become one vector: kinds of the operator ``pool``, or one of
                    :data:`WEIGHTED_POOLINGS`; several are put behind each other
    steps           what follows, in order
    dimensions      how many numbers of a vector are given where a request does not say; 0: all
    prompts         texts by name that may be put before a text; ``default_prompt`` names the one
                    that is where a request does not say, empty for none
    include_prompt  whether the tokens of a prompt take part in the pooling
    lower_case      texts are made lower case, whatever the tokenizer does
    max_length      longest text in tokens; 0 where only the model's positions limit it
    limit           what states that, for people
    """

    poolings: tuple[str, ...] = ("mean",)
    steps: tuple[VectorStep, ...] = ()
    dimensions: int = 0
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(NO_PROMPTS))
    default_prompt: str = ""
    include_prompt: bool = True
    lower_case: bool = False
    max_length: int = 0
    limit: str = ""

    @property
    def weighted(self) -> bool:
        """Whether the step that runs a text gives a weight for each token and pooling."""
        return not self.include_prompt or not WEIGHTED_POOLINGS.isdisjoint(self.poolings)


NO_PROMPTS: Mapping[str, str] = {"query": "", "document": ""}
"""What every model has prompts for, as in sentence-transformers; empty where it states none."""

WEIGHTED_POOLINGS = frozenset({"weighted_mean", "mean_sqrt_length"})
"""Poolings that no operator has: means of tokens that are multiplied by weights first."""


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes and options, whichever checkpoint format they came from.

    vocab_size       rows of the embedding
    ffn_size         features inside the feed-forward part
    attention_scale  factor of the scores before the softmax
    tied_head        the output head reads the embedding's weight
    norm_offset      added to every norm weight (Gemma stores ``weight - 1``)
    embedding_scale  factor of the embedding rows
    residual_scale   factor of what attention and feed-forward add to a layer's input
    logit_scale      factor of the logits
    final_softcap    the logits are ``cap * tanh(logits / cap)``; 0 for none
    attention_softcap  the same for the scores of attention, before the softmax
    experts          of a model with sparse layers
    latent           sizes of latent attention, where the model has it
    vectors          of an encoder: what becomes of its tokens
    notes            lines for people: what was assumed where the checkpoint does not say it
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
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float = 0.0
    attention_softcap: float = 0.0
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    vectors: VectorConfig | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UnsupportedError(
                f"{self.architecture}: {self.heads} attention heads do not divide into "
                f"num_key_value_heads = {self.kv_heads} groups"
            )
