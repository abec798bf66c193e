"""Options of further architectures in config.json: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_hybrids import DENSE_CASES, HYBRID_CASES, LONG, SHORT
from tiny_models import build, save

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model
from sartor.ops.rope import RopeSpec

CASES = {
    "phi3": DENSE_CASES["phi3"],
    "longrope": DENSE_CASES["phi3-longrope-long"],
    "glm4": DENSE_CASES["glm4"],
    "qwen3-next": HYBRID_CASES["qwen3-next"],
    "granite-dense": DENSE_CASES["granite"],
    "olmo2": DENSE_CASES["olmo2"],
    "gemma2": DENSE_CASES["gemma2"],
    "smollm3": DENSE_CASES["smollm3-window"],
    "granite": HYBRID_CASES["granite-experts-nope"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved checkpoint for each; tests copy its configuration and change it."""
    root = tmp_path_factory.mktemp("families")
    return {name: save(build(case, {}), root / name) for name, case in CASES.items()}


def _changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The checkpoint with another configuration; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").symlink_to(folder / "model.safetensors")
    return to


def _load(folder: Path) -> Model:
    return load_model(open_checkpoint(folder))


def _rope(**changes: Any) -> dict[str, Any]:
    base = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.67,
        "short_factor": SHORT,
        "long_factor": LONG,
    }
    parameters = {k: v for k, v in (base | changes).items() if v is not None}
    return {"rope_parameters": parameters}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("longrope", _rope(mscale=2.0), "option mscale = 2.0"),
    ("longrope", _rope(partial_rotary_factor=1.0), "needs 6 short and as many long factors"),
    ("longrope", _rope(partial_rotary_factor=0.77), "partial_rotary_factor = 0.77"),
    ("longrope", _rope(partial_rotary_factor=1.5), "partial_rotary_factor = 1.5"),
    ("longrope", _rope(partial_rotary_factor=1e-3), "partial_rotary_factor = 0.001"),
    ("phi3", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"layer_types": ["full_attention"]}, "1 entries"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]"),
    ("smollm3", {"no_rope_layers": [1, 0, 2]}, r"no_rope_layers = \[1, 0, 2\]"),
    ("qwen3-next", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
    ("qwen3-next", {"layer_types": ["linear_attention"] * 3}, "3 entries"),
    ("qwen3-next", {"linear_num_key_heads": 3}, "linear_num_key_heads = 3"),
    ("qwen3-next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1"),
    ("qwen3-next", {"num_experts_per_tok": 7}, "7 of 6"),
    ("granite", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
    ("granite", {"time_step_limit": [0.0, 2.0]}, r"time_step_limit = \[0.0, 2.0\]"),
    ("granite", {"time_step_limit": 3}, "time_step_limit = 3"),
    ("granite", {"mamba_n_heads": 5}, "mamba_n_heads = 5"),
    ("granite", {"mamba_n_groups": 4}, "mamba_n_groups = 4"),
    ("granite", {"mamba_d_conv": 1}, "mamba_d_conv = 1"),
    ("granite", {"layer_types": ["mamba", "moe", "attention"]}, "moe"),
    ("granite", {"normalization_function": "layernorm"}, "normalization_function = 'layernorm'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_not_implemented_are_refused_by_name(
    family: str,
    changes: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        _load(_changed(folders[family], tmp_path, **changes))


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("longrope", {"original_max_position_embeddings": None}, "original_max_position.* is missing"),
    ("longrope", _rope(short_factor=None), "short_factor is missing"),
    ("longrope", _rope(short_factor="x"), "short_factor is 'x'; it must be a list of numbers"),
    ("longrope", _rope(long_factor=[1.0, 1.0, 0.0, 1.0]), "a longrope factor is not above 0"),
    ("longrope", {"original_max_position_embeddings": 1}, "more than one token"),
    ("phi3", {"num_key_value_heads": 4}, r"qkv_proj\.weight has shape \[96, 48\]"),
    ("phi3", {"intermediate_size": 79}, r"gate_up_proj\.weight has shape \[160, 48\]"),
    ("glm4", {"architectures": ["GlmForCausalLM"]}, r"no place for: .*post_mlp_layernorm"),
    ("glm4", {"attention_bias": False}, r"no place for: .*bias"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
    ("granite-dense", {"logits_scaling": 0}, "logits_scaling is 0"),
    ("olmo2", {"architectures": ["LlamaForCausalLM"]}, r"missing: .*input_layernorm"),
    ("smollm3", {"no_rope_layers": ["x"]}, "must be a list of numbers"),
    ("qwen3-next", {"linear_value_head_dim": 8}, "linear_attn"),
    ("qwen3-next", {"num_experts": 0}, r"missing: .*mlp\.down_proj"),
    ("qwen3-next", {"mlp_only_layers": [0]}, r"missing: .*layers\.0\.mlp\.gate_proj"),
    ("granite", {"mamba_d_state": 4}, "mamba"),
    ("granite", {"shared_intermediate_size": 39}, r"input_linear\.weight has shape \[80, 48\]"),
    ("granite", {"num_local_experts": 0}, r"no place for: .*block_sparse_moe"),
    ("granite", {"mamba_conv_bias": False}, r"no place for: .*conv1d\.bias"),
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


def test_older_spellings(folders: dict[str, Path], tmp_path: Path) -> None:
    scaling = {"type": "su", "short_factor": SHORT, "long_factor": LONG}
    changes = {"rope_theta": 1000.0, "partial_rotary_factor": 0.67, "rope_scaling": scaling}
    folder = _changed(folders["longrope"], tmp_path, rope_parameters=None, **changes)
    (rope,) = _load(folder).program.ropes
    assert rope == RopeSpec(
        8, 1e3, "longrope", 4.0, 16, short_factors=tuple(SHORT), long_factors=tuple(LONG)
    )


def test_older_layer_types(folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba"]}
    other = _load(_changed(folders["granite"], tmp_path, **changes))
    assert other.config == _load(folders["granite"]).config


def test_caps_of_gemma2_absent_and_null(folders: dict[str, Path], tmp_path: Path) -> None:
    """An absent cap is the class's default, a null one is none: as in transformers."""
    folder = _changed(folders["gemma2"], tmp_path, attn_logit_softcapping=None)
    assert _load(folder).config.attention_softcap == 50.0
    config = json.loads((folder / "config.json").read_text())
    config |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    (folder / "config.json").write_text(json.dumps(config))
    found = _load(folder).config
    assert (found.attention_softcap, found.final_softcap) == (0.0, 0.0)


def test_context_of_longrope(folders: dict[str, Path]) -> None:
    assert _load(folders["longrope"]).context_length == 64


VALUES: list[Any] = [0, -1, 7, 2**70, 1e308, 0.5, "x", [], ["full_attention"], {}, True, None]


@pytest.mark.parametrize("name", ["longrope", "qwen3-next", "granite", "smollm3"])
def test_any_configuration_loads_or_is_an_error_for_users(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    folder = _changed(folders[name], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for table in (config, config["rope_parameters"]):
        for key, before in list(table.items()):
            for value in VALUES:
                table[key] = value
                (folder / "config.json").write_text(json.dumps(config))
                try:
                    _load(folder)
                except SartorError:
                    refused += 1
            table[key] = before
    assert refused > 100
