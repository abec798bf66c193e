"""Models with experts as Hugging Face folders: layouts of experts, and options refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from logits_runner import LENGTH, TOKENS, TOLERANCE, relative_error, run
from tiny_experts import CASES, GPT_OSS, tiny
from tiny_models import Case, expected_logits, save

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model
from sartor.ops.weights import LookupFormat

FAMILIES = {
    "qwen3": "qwen3-moe",
    "qwen2": "qwen2-moe-window",
    "olmoe": "olmoe",
    "mixtral": "mixtral",
    "gpt": "gpt-oss",
    "v2": "deepseek-v2-groups",
    "v3": "deepseek-v3",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save(tiny(CASES[case]), root / name) for name, case in FAMILIES.items()}


def _load(folder: Path) -> Model:
    return load_model(open_checkpoint(folder))


def _changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The checkpoint with another configuration; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (to / "config.json").write_text(json.dumps(config))
    if not (to / "model.safetensors").exists():
        (to / "model.safetensors").symlink_to(folder / "model.safetensors")
    return to


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ("qwen3", {"mlp_only_layers": ["x"]}, "mlp_only_layers = "),
    ("qwen3", {"num_experts_per_tok": 9}, "9 of 8 a token"),
    ("qwen2", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ("qwen2", {"mlp_only_layers": ["x"]}, "mlp_only_layers = "),
    ("qwen2", {"layer_types": ["chunked_attention"] * 5}, "chunked_attention"),
    ("qwen2", {"use_sliding_window": False}, "sliding_window is not set"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("olmoe", {"clip_qkv": 0.0}, "clip_qkv = 0.0"),
    ("olmoe", {"num_experts_per_tok": 9}, "9 of 8 a token"),
    ("gpt", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ("gpt", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("gpt", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ("gpt", {"sliding_window": 0}, "sliding_window"),
    ("v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    ("v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
    ("v2", {"mlp_bias": True}, "mlp_bias = True"),
    ("v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ("v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("v3", {"n_group": 3}, "of 3 groups"),
    ("v3", {"topk_group": 5}, "from 5 of 4 groups"),
    ("v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_not_implemented_are_refused_by_name(
    family: str,
    changes: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        _load(_changed(folders[family], tmp_path, **changes))


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"num_local_experts": 9}, r"missing: .*experts\.8\.down_proj"),
    ("qwen3", {"num_local_experts": 7}, r"no place for: .*experts\.7\.down_proj"),
    ("qwen3", {"num_local_experts": 2**40}, "1099511627776 experts"),
    ("qwen3", {"moe_intermediate_size": 21}, r"experts\.0\.gate_proj\.weight has shape \[20, 48\]"),
    ("qwen3", {"decoder_sparse_step": 2}, r"missing: .*mlp\.down_proj"),
    ("qwen2", {"num_experts": 9}, r"missing: .*experts\.8\.down_proj"),
    ("qwen2", {"mlp_only_layers": [1]}, r"missing: model\.layers\.1\.mlp\.down_proj"),
    ("qwen2", {"qkv_bias": False}, r"no place for: .*k_proj\.bias"),
    (
        "qwen2",
        {"shared_expert_intermediate_size": 20},
        r"shared_expert\.gate_proj\.weight has shape \[28, 48\].*\[20, 48\]",
    ),
    ("olmoe", {"num_experts": 7}, r"no place for: .*experts\.7\.down_proj"),
    ("olmoe", {"num_experts": 2**40}, "1099511627776 experts"),
    ("olmoe", {"intermediate_size": 21}, r"experts\.0\.gate_proj\.weight has shape \[20, 48\]"),
    ("olmoe", {"attention_bias": True}, r"missing: .*k_proj\.bias"),
    ("mixtral", {"num_local_experts": 5}, r"missing: .*experts\.4\.w1"),
    ("gpt", {"num_local_experts": 5}, r"router\.weight has shape \[6, 48\].*\[5, 48\]"),
    ("gpt", {"intermediate_size": 24}, r"gate_up_proj has shape \[6, 48, 40\].*\[6, 48, 48\]"),
    ("gpt", {"rope_parameters": None}, "rope_scaling is missing"),
    ("v2", {"n_group": None}, "n_group is missing"),
    ("v2", {"q_lora_rank": None}, r"q_a_proj\.weight has shape \[24, 48\].*\[1536, 48\]"),
    ("v3", {"kv_lora_rank": 24}, r"kv_a_proj_with_mqa\.weight has shape \[28, 48\]"),
    ("v3", {"n_shared_experts": 0}, r"no place for: .*shared_experts"),
    ("v3", {"first_k_dense_replace": 2}, r"missing: model\.layers\.1\.mlp\.down_proj"),
]


@pytest.mark.parametrize(("family", "changes", "message"), DAMAGED)
def test_configurations_that_do_not_fit_are_errors(
    family: str,
    changes: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(FormatError, match=message):
        _load(_changed(folders[family], tmp_path, **changes))


VALUES: list[Any] = [0, -1, 7, 2**70, 0.5, "x", [], {}, None]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "gpt", "v3"])
def test_any_configuration_loads_or_is_an_error_for_users(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    folder = _changed(folders[family], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for key, before in list(config.items()):
        for value in VALUES:
            config[key] = value
            (folder / "config.json").write_text(json.dumps(config))
            try:
                _load(folder)
            except SartorError:
                refused += 1
        config[key] = before
    assert refused > 100


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "olmoe", "mixtral", "v3"])
def test_fused_experts(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
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
    one, two = _load(folders[family]), _load(_changed(folders[family], tmp_path))
    assert one.config == two.config
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.2.mlp.experts.{part}.weight"
        assert np.array_equal(one.source.weight(name).data, two.source.weight(name).data)


def test_windows_of_qwen2_without_layer_types(folders: dict[str, Path], tmp_path: Path) -> None:
    """Checkpoints from before ``layer_types`` leave them to ``max_window_layers``."""
    stated = _load(folders["qwen2"])
    derived = _load(_changed(folders["qwen2"], tmp_path, layer_types=None))
    assert stated.config == derived.config
    assert [layer.window for layer in derived.config.layers] == [6, 0, 6, 0, 0]


def test_mxfp4_experts_of_gpt_oss(backend: str, tmp_path: Path) -> None:
    """Published layout: blocks of codes, rows first. The shape alone would not tell it from the
    plain one here, where hidden_size is twice the experts' size."""
    case = Case(
        "GptOss",
        GPT_OSS | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
    )
    oracle = tiny(case)
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
    _changed(plain, published, quantization_config={"quant_method": "mxfp4"})
    model = _load(published)
    weight = model.source.weight("model.layers.1.mlp.experts.up_proj.weight")
    assert isinstance(weight.format, LookupFormat)
    expected = _load(plain).source.weight("model.layers.1.mlp.experts.up_proj.weight")
    assert np.array_equal(weight.dequantize(), expected.dequantize())
    found = run(model, backend, TOKENS, [LENGTH])
    assert relative_error(found, expected_logits(oracle, TOKENS, [LENGTH])) < TOLERANCE


def test_layers_beyond_the_last(folders: dict[str, Path], tmp_path: Path) -> None:
    """V3's head that predicts several tokens is layer 61; another left-over layer is an error."""
    stored = safetensors.numpy.load_file(folders["v3"] / "model.safetensors")
    head = {"model.layers.61.eh_proj.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(stored | head, tmp_path / "model.safetensors")
    _load(_changed(folders["v3"], tmp_path))
    head = {"model.layers.60.eh_proj.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(stored | head, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"no place for: model\.layers\.60\."):
        _load(_changed(folders["v3"], tmp_path))
