"""What decoder architectures share: attention, feed-forward, and the frame around the layers.

Linears that read the same input stand next to each other, and so do a residual sum and the
norm that follows it: the fusion pass looks for neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

from sartor.graph import Builder, Program, Value
from sartor.models.config import LayerConfig, ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Layer = Callable[[Builder, Value, ModelConfig, LayerConfig], Value]


def norm(b: Builder, x: Value, config: ModelConfig, name: str, run: int = 0) -> Value:
    """RMS norm of a row, or of each run of ``run`` features."""
    return b.rms_norm(x, name, eps=config.norm_eps, run=run, weight_offset=config.norm_offset)


def self_attention(
    b: Builder, x: Value, config: ModelConfig, layer: LayerConfig, *, qk_norm: bool = False
) -> Value:
    """Grouped-query attention with rope; ``qk_norm`` normalises each head before the rope."""
    dim, bias = config.head_dim, config.qkv_bias
    q_width, kv_width = config.heads * dim, config.kv_heads * dim
    with b.scope("self_attn"):
        q = b.linear(x, "q_proj", q_width, bias=bias, axes=("heads", "hidden"))
        k = b.linear(x, "k_proj", kv_width, bias=bias, axes=("kv_heads", "hidden"))
        v = b.linear(x, "v_proj", kv_width, bias=bias, axes=("kv_heads", "hidden"))
        if qk_norm:
            q = norm(b, q, config, "q_norm", run=dim)
            k = norm(b, k, config, "k_norm", run=dim)
        out = b.attention(
            b.rope(q, layer.rope, dim, "q_rope"),
            b.rope(k, layer.rope, dim, "k_rope"),
            v,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=dim,
            scale=config.attention_scale,
            window=layer.window,
        )
        return b.linear(
            out, "o_proj", config.hidden_size, bias=config.output_bias, axes=("hidden", "heads")
        )


def gated_mlp(b: Builder, x: Value, config: ModelConfig) -> Value:
    """``down(activation(gate(x)) * up(x))`` (arXiv:2002.05202)."""
    bias = config.mlp_bias
    with b.scope("mlp"):
        gate = b.linear(x, "gate_proj", config.ffn_size, bias=bias, axes=("ffn", "hidden"))
        up = b.linear(x, "up_proj", config.ffn_size, bias=bias, axes=("ffn", "hidden"))
        inner = b.gated_activation(gate, up, config.activation)
        return b.linear(inner, "down_proj", config.hidden_size, bias=bias, axes=("hidden", "ffn"))


def pre_norm_layer(
    b: Builder, x: Value, config: ModelConfig, layer: LayerConfig, *, qk_norm: bool = False
) -> Value:
    """Norm, attention, sum; norm, feed-forward, sum."""
    inner = norm(b, x, config, "input_layernorm")
    x = b.add(x, self_attention(b, inner, config, layer, qk_norm=qk_norm), "attention_residual")
    inner = norm(b, x, config, "post_attention_layernorm")
    return b.add(x, gated_mlp(b, inner, config), "mlp_residual")


def decoder(config: ModelConfig, layer: Layer) -> Program:
    """Embedding, the layers, the rows that give an output, last norm and head."""
    b = Builder()
    with b.scope("model"):
        x = b.embedding(
            b.token_ids,
            "embed_tokens",
            config.vocab_size,
            config.hidden_size,
            config.embedding_scale,
        )
        for index, part in enumerate(config.layers):
            with b.scope(f"layers.{index}"):
                x = layer(b, x, config, part)
        x = b.gather_rows(x, b.output_rows)
        x = norm(b, x, config, "norm")
    logits = b.linear(
        x,
        "lm_head",
        config.vocab_size,
        axes=("vocab", "hidden"),
        weight=EMBEDDING if config.tied_head else None,
    )
    if config.final_softcap:
        logits = b.softcap(logits, config.final_softcap, "final_softcap")
    return b.finish(logits)
