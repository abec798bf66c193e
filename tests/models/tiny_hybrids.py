"""Tiny random models of further architectures, beside those of ``tiny_models``."""

from __future__ import annotations

from typing import Any

from tiny_models import Case

SHORT = [1.0, 1.1, 1.3, 1.7]
LONG = [1.5, 2.5, 4.0, 8.0]
"""Divisors of a rope over eight features."""


def longrope(original: int, **values: Any) -> dict[str, Any]:
    """Heads of 12 features, eight of them rotated."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "partial_rotary_factor": 0.67,
        **values,
    }
    return {"rope_parameters": parameters, "original_max_position_embeddings": original}


FACTORS: dict[str, Any] = {
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 3.0,
}
GEMMA2: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
DENSE_CASES: dict[str, Case] = {
    "phi3": Case("Phi3", {"sliding_window": 7}, {"sliding_window": None}),
    "phi3-longrope-long": Case("Phi3", longrope(16), longrope(16, long_factor=SHORT)),
    "phi3-longrope-short": Case("Phi3", longrope(48), longrope(48, short_factor=LONG)),
    "phi3-longrope-factor": Case(
        "Phi3", longrope(16, attention_factor=1.25), longrope(16, attention_factor=1.0)
    ),
    "glm4": Case("Glm4", {"head_dim": 16}, {"partial_rotary_factor": 1.0}),
    "glm4-quarter-no-bias": Case(
        "Glm4",
        {"head_dim": 16, "partial_rotary_factor": 0.25, "attention_bias": False},
        {"partial_rotary_factor": 0.5},
    ),
    "glm": Case("Glm", {"head_dim": 16, "tie_word_embeddings": True}),
    "granite": Case("Granite", FACTORS, {"residual_multiplier": 1.0}),
    "granite-biases-tied": Case(
        "Granite",
        FACTORS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"attention_multiplier": 1.0},
    ),
    "olmo2": Case("Olmo2", {"attention_bias": True}),
    "olmo2-tied": Case("Olmo2", {"tie_word_embeddings": True}),
    "gemma2": Case("Gemma2", GEMMA2, {"attn_logit_softcapping": None}),
    "gemma2-no-caps": Case(
        "Gemma2",
        GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
        {"sliding_window": 64},
    ),
    "smollm3": Case("SmolLM3", {"no_rope_layer_interval": 2}, {"no_rope_layers": [1, 1, 1]}),
    "smollm3-window": Case(
        "SmolLM3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
        },
        {"use_sliding_window": False},
    ),
}

QWEN3_NEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
GRANITE: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "shared_intermediate_size": 40,
    "num_local_experts": 0,
    **FACTORS,
}
HYBRID_CASES: dict[str, Case] = {
    "qwen3-next": Case("Qwen3Next", QWEN3_NEXT, {"norm_topk_prob": False}),
    "qwen3-next-some-dense": Case(
        "Qwen3Next",
        QWEN3_NEXT
        | {
            "full_attention_interval": 2,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "attention_bias": True,
            "linear_conv_kernel_dim": 3,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
        },
        {"partial_rotary_factor": 1.0},
    ),
    "granite-dense-rope": Case(
        "GraniteMoeHybrid",
        GRANITE | {"position_embedding_type": "rope", "tie_word_embeddings": True},
        {"position_embedding_type": None},
    ),
    "granite-experts-nope": Case(
        "GraniteMoeHybrid",
        GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24},
        {"num_experts_per_tok": 1},
    ),
    "granite-groups-biases": Case(
        "GraniteMoeHybrid",
        GRANITE
        | {
            "mamba_n_groups": 3,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "attention_bias": True,
        },
        {"residual_multiplier": 1.0},
    ),
}
