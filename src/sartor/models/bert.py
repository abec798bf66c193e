"""BERT as an encoder (arXiv:1810.04805) and the sentence embeddings made of it
(arXiv:1908.10084): learned positions, norms behind each sum, every token sees all others.

RoBERTa (arXiv:1907.11692) and XLM-RoBERTa (arXiv:1911.02116) differ in where positions begin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.errors import FormatError
from sartor.formats import Checkpoint
from sartor.graph import Builder, Program, Value
from sartor.models import gguf, huggingface, vectors
from sartor.models.config import LayerConfig, ModelConfig, VectorConfig, VectorStep
from sartor.models.registry import Architecture, TensorPlace
from sartor.models.sentence_transformers import vectors_of
from sartor.ops.weights import Weight, dense

_TABLE = "embeddings.word_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
_PREFIXES = ("", "bert.", "roberta.")
_ROBERTAS = ("RobertaModel", "XLMRobertaModel", "RobertaForMaskedLM", "XLMRobertaForMaskedLM")
_GGUF_OUTSIDE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_GGUF_PARTS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_UNSAID = (
    "no modules.json says what becomes of the tokens of a text, so its vector is their mean, of "
    "any length (as sentence-transformers does)"
)
_UNSAID_GGUF = (
    "bert.pooling_type does not say what becomes of the tokens of a text, so its vector is their "
    "mean, made to length 1"
)
_GGUF_POOLING = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
"""Values of ``pooling_type``; 0 leaves it to whoever runs the model."""

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """``positions`` and ``token_types`` are rows of these embeddings; ``skipped`` rows of the
    stored positions come before those of the first token."""

    positions: int
    skipped: int
    token_types: int


def configure(checkpoint: Checkpoint) -> ModelConfig:
    return _from_gguf(checkpoint) if checkpoint.kind == "gguf" else _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> ModelConfig:
    options = huggingface.hf_options(checkpoint)
    options.require("position_embedding_type", "absolute")
    options.require("is_decoder", False)
    options.require("add_cross_attention", False)
    architecture, hidden = checkpoint.architecture, options.size("hidden_size", 768)
    stated = vectors_of(checkpoint.path, hidden)
    if stated is not None:
        vectors.include_weights(checkpoint, stated)
    # RoBERTa counts positions from the padding token's id on.
    skipped = options.nullable("pad_token_id", 1) + 1 if architecture in _ROBERTAS else 0
    rows = options.size("max_position_embeddings", 512)
    if rows <= skipped:
        raise options.refusal("max_position_embeddings", rows)
    positions = rows - skipped
    made = stated or VectorConfig()
    return BertConfig(
        **_heads(
            options.where,
            hidden,
            options.size("num_attention_heads", 12),
            huggingface.hf_layer_count(checkpoint, options, 12),
        ),
        vocab_size=options.size("vocab_size"),
        ffn_size=options.size("intermediate_size", 3072),
        context_length=min(positions, made.max_length or positions),
        norm_eps=options.positive("layer_norm_eps", 1e-12),
        activation=huggingface.hf_activation(options, default="gelu"),
        vectors=made,
        notes=() if stated else (_UNSAID,),
        positions=positions,
        skipped=skipped,
        token_types=options.size("type_vocab_size", 2),
    )


def _from_gguf(checkpoint: Checkpoint) -> ModelConfig:
    """llama.cpp normalises the vectors that it returns; the file does not say."""
    options = gguf.gguf_options(checkpoint)
    options.require("attention.causal", False)
    pooling = options.integer("pooling_type", 0)
    if pooling not in _GGUF_POOLING:
        raise options.refusal("pooling_type", pooling)
    hidden, context = options.size("embedding_length"), options.size("context_length")
    tables = (gguf.EMBEDDING, "position_embd.weight", "token_types.weight")
    vocab, positions, token_types = (checkpoint.info(name).shape[0] for name in tables)
    config = BertConfig(
        **_heads(
            options.where,
            hidden,
            options.size("attention.head_count"),
            gguf.layer_count(checkpoint, options),
        ),
        vocab_size=vocab,
        ffn_size=options.size("feed_forward_length"),
        context_length=min(context, positions),
        norm_eps=options.positive("attention.layer_norm_epsilon"),
        activation="gelu",
        vectors=VectorConfig((_GGUF_POOLING[pooling],), (VectorStep("normalize", width=hidden),)),
        notes=() if pooling else (_UNSAID_GGUF,),
        positions=positions,
        skipped=0,
        token_types=token_types,
    )
    options.require("attention.head_count_kv", config.heads)
    options.require("vocab_size", vocab)
    gguf.refuse_unread(options)
    return config


def _heads(where: str, hidden: int, heads: int, layers: int) -> dict[str, Any]:
    """What follows from the width and its heads, alike in every layer."""
    if hidden % heads:
        raise FormatError(f"{where}: {hidden} features do not divide into {heads} heads")
    return {
        "architecture": "bert",
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "attention_scale": (hidden // heads) ** -0.5,
        "layers": (LayerConfig(None),) * layers,
        "tied_head": False,
    }


def build(config: ModelConfig) -> Program:
    assert isinstance(config, BertConfig)
    b, width = Builder(), config.hidden_size
    with b.scope("embeddings"):
        x = b.embedding(b.token_ids, "word_embeddings", config.vocab_size, width)
        places = b.embedding(b.positions, "position_embeddings", config.positions, width)
        # A text is of the first type throughout; the second is for pairs.
        x = b.add(x, b.vector("token_type_embeddings.weight", width), "with_types")
        x = b.add(x, places, "with_positions")
        x = b.layer_norm(x, "LayerNorm", eps=config.norm_eps)
    for index in range(len(config.layers)):
        with b.scope(f"encoder.layer.{index}"):
            x = layer(b, x, config)
    assert config.vectors is not None
    return b.finish_encoder(vectors.text_vectors(b, x, config.vectors), config.vocab_size)


def layer(b: Builder, x: Value, config: ModelConfig) -> Value:
    """Attention, sum, norm; feed-forward, sum, norm."""
    hidden, ffn = config.hidden_size, config.ffn_size
    with b.scope("attention"):
        with b.scope("self"):
            q, k, v = (
                b.linear(x, part, hidden, bias=True, axes=("heads", "hidden"))
                for part in ("query", "key", "value")
            )
            inner = b.self_attention(
                q,
                k,
                v,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                scale=config.attention_scale,
            )
        with b.scope("output"):
            inner = b.linear(inner, "dense", hidden, bias=True, axes=("hidden", "heads"))
            x = b.add(x, inner, "residual")
            x = b.layer_norm(x, "LayerNorm", eps=config.norm_eps)
    with b.scope("intermediate"):
        inner = b.linear(x, "dense", ffn, bias=True, axes=("ffn", "hidden"))
        inner = b.activation(inner, config.activation)
    with b.scope("output"):
        inner = b.linear(inner, "dense", hidden, bias=True, axes=("hidden", "ffn"))
        x = b.add(x, inner, "residual")
        return b.layer_norm(x, "LayerNorm", eps=config.norm_eps)


def _first_row(weight: Weight) -> Weight:
    return dense(weight.name, weight.rows(np.zeros(1, np.int64)).dequantize()[0])


def locate(name: str, checkpoint: Checkpoint, config: ModelConfig) -> TensorPlace:
    assert isinstance(config, BertConfig)
    assert config.vectors is not None
    if checkpoint.kind == "gguf":
        stored = _gguf_name(name)
    elif any(name.startswith(f"{step.name}.") for step in config.vectors.steps if step.name):
        stored = name
    else:
        names = checkpoint.names()
        prefix = next((p for p in _PREFIXES if p + _TABLE in names), "")
        stored = prefix + name
    if name == _TYPES:
        shape = (config.token_types, config.hidden_size)
        return TensorPlace(stored, shape=shape, convert=_first_row)
    if name == _POSITIONS and config.skipped:
        shape = (config.positions + config.skipped, config.hidden_size)
        return TensorPlace(stored, slice(config.skipped, None), shape)
    return TensorPlace(stored)


def _gguf_name(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is not None:
        return f"blk.{match[1]}.{_GGUF_PARTS[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_GGUF_OUTSIDE[stem]}.{kind}"


ARCHITECTURE = Architecture(
    name="bert",
    hf_names=("BertModel", "BertForMaskedLM", *_ROBERTAS),
    gguf_names=("bert",),
    models=(
        "BERT",
        "RoBERTa",
        "XLM-RoBERTa",
        "all-MiniLM",
        "BGE 1.5 and M3 (dense vectors)",
        "E5",
        "other sentence-transformers",
    ),
    features=(
        "sentence embeddings",
        "mean, weighted mean, first or last token, several of them",
        "dense layers, norms and length 1 behind that",
        "prompts",
    ),
    configure=configure,
    build=build,
    locate=locate,
    ignored=(
        r"((bert|roberta)\.)?embeddings\.position_ids",
        r"((bert|roberta)\.)?pooler\.dense\..*",
        r"cls\.(predictions|seq_relationship)\..*",
        r"lm_head\..*",
    ),
)
