"""Writes tiny models with experts as GGUF files: names by the ``gguf`` package's tensor map, experts
and keys as llama.cpp's converter has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from tiny_gguf import Extra, interleaved
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "gpt-oss": gguf.MODEL_ARCH.GPT_OSS,
    "deepseek2": gguf.MODEL_ARCH.DEEPSEEK2,
}
SOFTMAX, SIGMOID = 1, 2
_COUNTS = {"deepseek2": "n_routed_experts", "qwen2moe": "num_experts"}


def write(
    model: PreTrainedModel,
    architecture: str,
    path: Path,
    extra: Extra = lambda writer: None,
    *,
    split: bool = True,
    quantize: bool = False,
) -> Path:
    """``split`` stores DeepSeek's kv_b in two parts, ``quantize`` uses Q8_0 where it fits."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_count(getattr(config, _COUNTS.get(architecture, "num_local_experts")))
    if architecture == "deepseek2":
        _deepseek(writer, model, split)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_head_count_kv(config.num_key_value_heads)
    if architecture in ("qwen3moe", "qwen2moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_sliding_window(config.sliding_window)
    _yarn(writer, config.rope_parameters)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, data in _tensors(model, architecture, split):
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantize and data.ndim > 1 and data.shape[-1] % 32 == 0:
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _deepseek(writer: gguf.GGUFWriter, model: PreTrainedModel, split: bool) -> None:
    config = model.config
    third = config.model_type == "deepseek_v3"
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    if split:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(head_dim)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(config.v_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if third:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType(SIGMOID))
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _yarn(writer: gguf.GGUFWriter, table: dict[str, object]) -> None:
    if table["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(table["factor"])
    writer.add_rope_scaling_orig_ctx_len(table["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(table["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(table["beta_slow"])
    if "mscale_all_dim" in table:
        writer.add_rope_scaling_yarn_log_mul(0.1 * table["mscale_all_dim"])


def _tensors(
    model: PreTrainedModel, architecture: str, split: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values under the names that llama.cpp's converter gives to merged experts."""
    config = model.config
    for name, tensor in model.state_dict().items():
        data = np.ascontiguousarray(tensor.float().numpy())
        stem, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            yield from _experts(stem, last, data, architecture)
        elif last == "sinks":
            yield f"{name}.weight", data
        elif last == "e_score_correction_bias":
            yield f"{stem}.e_score_correction.bias", data
        elif name.endswith("kv_b_proj.weight") and split:
            heads = data.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
            yield name.replace("kv_b", "k_b"), np.ascontiguousarray(keys.swapaxes(1, 2))
            yield name.replace("kv_b", "v_b"), np.ascontiguousarray(values)
        elif architecture == "llama" and ".q_proj." in name:
            yield name, interleaved(data, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj." in name:
            yield name, interleaved(data, config.num_key_value_heads)
        else:
            yield name, data


def _experts(
    stem: str, last: str, data: np.ndarray, architecture: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Gate and up apart: halves, or in GPT-OSS, which also swaps the last two axes, by turns."""
    kind = "bias" if last.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and kind == "weight":
        data = data.swapaxes(1, 2)
    if last.startswith("down"):
        parts = {"down_proj": data}
    elif architecture == "gpt-oss":
        parts = {"gate_proj": data[:, 0::2], "up_proj": data[:, 1::2]}
    else:
        gate, up = np.split(data, 2, axis=1)
        parts = {"gate_proj": gate, "up_proj": up}
    for part, values in parts.items():
        yield f"{stem}.{part}.{kind}", np.ascontiguousarray(values)
