"""Models with experts as Hugging Face folders: layouts of experts, and options refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from config_changes import Change, Folders, absurd_values_refused, changed, load
from logits_runner import LENGTH, TOKENS, TOLERANCE, relative_error, run
from tiny_experts import GPT_OSS
from tiny_models import Case, build, expected_logits, save

from sartor.errors import FormatError, UnsupportedError
from sartor.ops.weights import LookupFormat

REFUSED: list[Change] = [
    ("qwen3-moe", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ("qwen3-moe", {"mlp_only_layers": ["x"]}, "mlp_only_layers = "),
    ("qwen3-moe", {"num_experts_per_tok": 9}, "9 of 8 a token"),
    ("qwen2-moe-window", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ("qwen2-moe-window", {"mlp_only_layers": ["x"]}, "mlp_only_layers = "),
    ("qwen2-moe-window", {"layer_types": ["chunked_attention"] * 5}, "chunked_attention"),
    ("qwen2-moe-window", {"use_sliding_window": False}, "sliding_window is not set"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("olmoe", {"clip_qkv": 0.0}, "clip_qkv = 0.0"),
    ("olmoe", {"num_experts_per_tok": 9}, "9 of 8 a token"),
    ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt-oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("gpt-oss", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ("gpt-oss", {"sliding_window": 0}, "sliding_window"),
    ("deepseek-v2-groups", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    ("deepseek-v2-groups", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("deepseek-v2-groups", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
    ("deepseek-v2-groups", {"mlp_bias": True}, "mlp_bias = True"),
    ("deepseek-v2-groups", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("deepseek-v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("deepseek-v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("deepseek-v3", {"n_group": 3}, "of 3 groups"),
    ("deepseek-v3", {"topk_group": 5}, "from 5 of 4 groups"),
    ("deepseek-v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_not_implemented_are_refused_by_name(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(changed(folders[family], tmp_path, **changes))


DAMAGED: list[Change] = [
    ("qwen3-moe", {"num_local_experts": 9}, r"missing: .*experts\.8\.down_proj"),
    ("qwen3-moe", {"num_local_experts": 7}, r"no place for: .*experts\.7\.down_proj"),
    ("qwen3-moe", {"num_local_experts": 2**40}, "1099511627776 experts"),
    (
        "qwen3-moe",
        {"moe_intermediate_size": 21},
        r"experts\.0\.gate_proj\.weight has shape \[20, 48\]",
    ),
    ("qwen3-moe", {"decoder_sparse_step": 2}, r"missing: .*mlp\.down_proj"),
    ("qwen2-moe-window", {"num_experts": 9}, r"missing: .*experts\.8\.down_proj"),
    ("qwen2-moe-window", {"mlp_only_layers": [1]}, r"missing: model\.layers\.1\.mlp\.down_proj"),
    ("qwen2-moe-window", {"qkv_bias": False}, r"no place for: .*k_proj\.bias"),
    (
        "qwen2-moe-window",
        {"shared_expert_intermediate_size": 20},
        r"shared_expert\.gate_proj\.weight has shape \[28, 48\].*\[20, 48\]",
    ),
    ("olmoe", {"num_experts": 7}, r"no place for: .*experts\.7\.down_proj"),
    ("olmoe", {"num_experts": 2**40}, "1099511627776 experts"),
    ("olmoe", {"intermediate_size": 21}, r"experts\.0\.gate_proj\.weight has shape \[20, 48\]"),
    ("olmoe", {"attention_bias": True}, r"missing: .*k_proj\.bias"),
    ("mixtral", {"num_local_experts": 5}, r"missing: .*experts\.4\.w1"),
    ("gpt-oss", {"num_local_experts": 5}, r"router\.weight has shape \[6, 48\].*\[5, 48\]"),
    ("gpt-oss", {"intermediate_size": 24}, r"gate_up_proj has shape \[6, 48, 40\].*\[6, 48, 48\]"),
    ("gpt-oss", {"rope_parameters": None}, "rope_scaling is missing"),
    ("deepseek-v2-groups", {"n_group": None}, "n_group is missing"),
    (
        "deepseek-v2-groups",
        {"q_lora_rank": None},
        r"q_a_proj\.weight has shape \[24, 48\].*\[1536, 48\]",
    ),
    ("deepseek-v3", {"kv_lora_rank": 24}, r"kv_a_proj_with_mqa\.weight has shape \[28, 48\]"),
    ("deepseek-v3", {"n_shared_experts": 0}, r"no place for: .*shared_experts"),
    ("deepseek-v3", {"first_k_dense_replace": 2}, r"missing: model\.layers\.1\.mlp\.down_proj"),
]


@pytest.mark.parametrize(("family", "changes", "message"), DAMAGED)
def test_configurations_that_do_not_fit_are_errors(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        load(changed(folders[family], tmp_path, **changes))


@pytest.mark.parametrize(
    "family", ["qwen3-moe", "qwen2-moe-window", "olmoe", "gpt-oss", "deepseek-v3"]
)
def test_any_configuration_loads_or_is_an_error_for_users(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    assert absurd_values_refused(changed(folders[family], tmp_path)) > 100


@pytest.mark.parametrize(
    "family", ["qwen3-moe", "qwen2-moe-window", "olmoe", "mixtral", "deepseek-v3"]
)
def test_fused_experts(family: str, folders: Folders, tmp_path: Path) -> None:
    """Experts may lie in two tensors a layer, as transformers holds them in memory."""
    stored = safetensors.numpy.load_file(folders[family] / "model.safetensors")
    fused: dict[str, np.ndarray] = {}
    apart: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    old = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, data in stored.items():
        name = name.replace("block_sparse_moe", "mlp")
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            fused[name] = data
        else:
            part = old.get(match[3], match[3])
            apart.setdefault((match[1], part), {})[int(match[2])] = data
    for (prefix, part), parts in apart.items():
        together = np.stack([parts[i] for i in range(len(parts))])
        if part == "gate_proj":
            others = apart[prefix, "up_proj"]
            up = np.stack([others[i] for i in range(len(others))])
            fused[f"{prefix}.gate_up_proj"] = np.concatenate([together, up], axis=1)
        elif part == "down_proj":
            fused[f"{prefix}.down_proj"] = together
    safetensors.numpy.save_file(fused, tmp_path / "model.safetensors")
    one, two = load(folders[family]), load(changed(folders[family], tmp_path))
    assert one.config == two.config
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.2.mlp.experts.{part}.weight"
        assert np.array_equal(one.source.weight(name).data, two.source.weight(name).data)


def test_windows_of_qwen2_without_layer_types(folders: Folders, tmp_path: Path) -> None:
    """Checkpoints from before ``layer_types`` leave them to ``max_window_layers``."""
    stated = load(folders["qwen2-moe-window"])
    derived = load(changed(folders["qwen2-moe-window"], tmp_path, layer_types=None))
    assert stated.config == derived.config
    assert [layer.window for layer in derived.config.layers] == [6, 0, 6, 0, 0]


def test_mxfp4_experts_of_gpt_oss(backend: str, tmp_path: Path) -> None:
    """Published layout: blocks of codes, rows first. The shape alone would not tell it from the
    plain one here, where hidden_size is twice the experts' size."""
    case = Case(
        "GptOss",
        GPT_OSS | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
    )
    oracle = build(case, {})
    generator = np.random.default_rng(3)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([values, -values])
    packed: dict[str, np.ndarray] = {}
    for name, parameter in oracle.named_parameters():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            continue
        experts, columns, rows = parameter.shape
        codes = generator.integers(0, 16, (experts, rows, columns // 32, 32), dtype=np.uint8)
        scales = generator.integers(123, 126, (experts, rows, columns // 32), dtype=np.uint8)
        packed[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        packed[f"{name}_scales"] = scales
        weights = values[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
        whole = torch.from_numpy(weights.reshape(experts, rows, columns))
        parameter.data.copy_(whole.swapaxes(1, 2))
    plain = save(oracle, tmp_path / "plain")
    published = tmp_path / "published"
    published.mkdir()
    stored = safetensors.numpy.load_file(plain / "model.safetensors")
    kept = {name: data for name, data in stored.items() if f"{name}_blocks" not in packed}
    safetensors.numpy.save_file(kept | packed, published / "model.safetensors")
    changed(plain, published, quantization_config={"quant_method": "mxfp4"})
    model = load(published)
    weight = model.source.weight("model.layers.1.mlp.experts.up_proj.weight")
    assert isinstance(weight.format, LookupFormat)
    expected = load(plain).source.weight("model.layers.1.mlp.experts.up_proj.weight")
    assert np.array_equal(weight.dequantize(), expected.dequantize())
    found = run(model, backend, TOKENS, [LENGTH])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


def test_layers_beyond_the_last(folders: Folders, tmp_path: Path) -> None:
    """V3's head that predicts several tokens is layer 61; another left-over layer is an error."""
    stored = safetensors.numpy.load_file(folders["deepseek-v3"] / "model.safetensors")
    head = {"model.layers.61.eh_proj.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(stored | head, tmp_path / "model.safetensors")
    load(changed(folders["deepseek-v3"], tmp_path))
    head = {"model.layers.60.eh_proj.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(stored | head, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"no place for: model\.layers\.60\."):
        load(changed(folders["deepseek-v3"], tmp_path))
