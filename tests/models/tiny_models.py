"""Tiny random models of transformers, saved as checkpoints: the oracle of the logits tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {
    "num_hidden_layers": 7,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 9,
}
LINEAR_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True)
class Case:
    """A configuration; ``plain`` are the changes that switch the option under test off."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **values}}


PLAIN_ROPE = rope("default")
CASES: dict[str, Case] = {
    "llama": Case("Llama", rope("default")),
    "llama-biases-tied": Case(
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 20,
            "hidden_act": "gelu",
        },
        {"hidden_act": "silu"},
    ),
    "llama-linear": Case("Llama", rope("linear", factor=4.0), PLAIN_ROPE),
    "llama-dynamic": Case(
        "Llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}, PLAIN_ROPE
    ),
    "llama-llama3": Case(
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        PLAIN_ROPE,
    ),
    "llama-yarn": Case(
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0),
        PLAIN_ROPE,
    ),
    "mistral-window": Case("Mistral", {"sliding_window": 7}, {"sliding_window": None}),
    "qwen2-tied": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"use_sliding_window": False},
    ),
    "qwen3": Case("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3-yarn": Case(
        "Qwen3",
        {"head_dim": 16} | rope("yarn", factor=4.0, original_max_position_embeddings=16),
        PLAIN_ROPE,
    ),
    "gemma3": Case("Gemma3", GEMMA, {"sliding_window": 64}),
    "gemma3-linear-softcap": Case(
        "Gemma3",
        GEMMA | {"rope_parameters": LINEAR_GLOBAL, "final_logit_softcapping": 3.0},
        {"final_logit_softcapping": None},
    ),
    "gemma3-multimodal": Case("Gemma3Multimodal", GEMMA),
}


def build(case: Case, options: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of a case, with weights large enough that every part of it matters."""
    names = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
    values = SIZES | case.options | options
    if case.family == "Gemma3Multimodal":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        }
        config: Any = transformers.Gemma3Config(
            text_config=values, vision_config=vision, mm_tokens_per_image=4, image_token_index=1
        )
        kind = "Gemma3ForConditionalGeneration"
    else:
        config_kind, kind = names.get(
            case.family, (f"{case.family}Config", f"{case.family}ForCausalLM")
        )
        config = getattr(transformers, config_kind)(**values)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek-V3's, for the choice only
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


def save(model: PreTrainedModel, folder: Path, shards: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def expected_logits(model: PreTrainedModel, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """Logits ``[tokens, vocab]``, fed in chunks through the cache of transformers."""
    past, at, rows = None, 0, []
    with torch.no_grad():
        for length in chunks:
            ids = torch.tensor([tokens[at : at + length]])
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past, at = out.past_key_values, at + length
            rows.append(out.logits[0].numpy())
    return np.concatenate(rows)
