"""Tiny random models with experts."""

from __future__ import annotations

from typing import Any

from tiny_models import Case, rope

QWEN3_MOE: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
QWEN2_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
OLMOE: dict[str, Any] = {"intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 3}
MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "intermediate_size": 40}
GPT_OSS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    **rope(
        "yarn",
        factor=4.0,
        beta_fast=8.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=16,
    ),
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}
V2 = DEEPSEEK | {"n_shared_experts": 2, "routed_scaling_factor": 1.5}
V3 = DEEPSEEK | {"n_group": 4, "topk_group": 2}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 1.0}
DEEPSEEK_YARN = rope("yarn", mscale=0.8, mscale_all_dim=1.2, **YARN)

CASES: dict[str, Case] = {
    "qwen3-moe": Case("Qwen3Moe", QWEN3_MOE, {"norm_topk_prob": False}),
    "qwen3-moe-some-layers": Case(
        "Qwen3Moe",
        QWEN3_MOE
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-window": Case(
        "Qwen3Moe",
        QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 6, "norm_topk_prob": False},
        {"use_sliding_window": False},
    ),
    "qwen2-moe": Case("Qwen2Moe", QWEN2_MOE, {"norm_topk_prob": True}),
    "qwen2-moe-some-layers": Case(
        "Qwen2Moe",
        QWEN2_MOE
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
        {"norm_topk_prob": False},
    ),
    "qwen2-moe-window": Case(
        "Qwen2Moe",
        QWEN2_MOE
        | {
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 3,
        },
        {"use_sliding_window": False},
    ),
    "olmoe": Case("Olmoe", OLMOE, {"norm_topk_prob": True}),
    "olmoe-biases-tied": Case(
        "Olmoe",
        OLMOE
        | {
            "num_key_value_heads": None,
            "attention_bias": True,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        {"norm_topk_prob": False},
    ),
    "mixtral": Case("Mixtral", MIXTRAL, {"num_experts_per_tok": 3}),
    "mixtral-window": Case("Mixtral", MIXTRAL | {"sliding_window": 7}, {"sliding_window": None}),
    "gpt-oss": Case("GptOss", GPT_OSS, {"sliding_window": 64}),
    "gpt-oss-yarn": Case(
        "GptOss",
        GPT_OSS | {"attention_bias": False, "layer_types": ["full_attention"] * 4},
        rope("yarn", **YARN),
    ),
    "deepseek-v2-lite": Case(
        "DeepseekV2", V2 | {"q_lora_rank": None}, {"routed_scaling_factor": 1.0}
    ),
    "deepseek-v2-groups": Case("DeepseekV2", V2 | GROUPS, {"topk_method": "greedy"}),
    "deepseek-v2-yarn": Case("DeepseekV2", V2 | DEEPSEEK_YARN, rope("yarn", **YARN)),
    "deepseek-v3": Case("DeepseekV3", V3, {"topk_group": 4}),
    "deepseek-v3-biases": Case(
        "DeepseekV3",
        V3 | {"attention_bias": True, "norm_topk_prob": False, "rope_interleave": False},
        {"rope_interleave": True},
    ),
    "deepseek-v3-yarn": Case(
        "DeepseekV3", V3 | DEEPSEEK_YARN | {"n_group": 1, "topk_group": 1}, rope("yarn", **YARN)
    ),
}
