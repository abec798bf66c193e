"""Options of further architectures in config.json: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_changes import Change, Folders, absurd_values_refused, changed, load
from tiny_hybrids import LONG, SHORT

from sartor.errors import FormatError, UnsupportedError
from sartor.ops.rope import RopeSpec


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


REFUSED: list[Change] = [
    ("phi3-longrope-long", _rope(mscale=2.0), "option mscale = 2.0"),
    (
        "phi3-longrope-long",
        _rope(partial_rotary_factor=1.0),
        "needs 6 short and as many long factors",
    ),
    ("phi3-longrope-long", _rope(partial_rotary_factor=0.77), "partial_rotary_factor = 0.77"),
    ("phi3-longrope-long", _rope(partial_rotary_factor=1.5), "partial_rotary_factor = 1.5"),
    ("phi3-longrope-long", _rope(partial_rotary_factor=1e-3), "partial_rotary_factor = 0.001"),
    ("phi3", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"layer_types": ["full_attention"]}, "1 entries"),
    ("smollm3-window", {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]"),
    ("smollm3-window", {"no_rope_layers": [1, 0, 2]}, r"no_rope_layers = \[1, 0, 2\]"),
    ("qwen3-next", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
    ("qwen3-next", {"layer_types": ["linear_attention"] * 3}, "3 entries"),
    ("qwen3-next", {"linear_num_key_heads": 3}, "linear_num_key_heads = 3"),
    ("qwen3-next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1"),
    ("qwen3-next", {"num_experts_per_tok": 7}, "7 of 6"),
    (
        "granite-experts-nope",
        {"position_embedding_type": "alibi"},
        "position_embedding_type = 'alibi'",
    ),
    ("granite-experts-nope", {"time_step_limit": [0.0, 2.0]}, r"time_step_limit = \[0.0, 2.0\]"),
    ("granite-experts-nope", {"time_step_limit": 3}, "time_step_limit = 3"),
    ("granite-experts-nope", {"mamba_n_heads": 5}, "mamba_n_heads = 5"),
    ("granite-experts-nope", {"mamba_n_groups": 4}, "mamba_n_groups = 4"),
    ("granite-experts-nope", {"mamba_d_conv": 1}, "mamba_d_conv = 1"),
    ("granite-experts-nope", {"layer_types": ["mamba", "moe", "attention"]}, "moe"),
    (
        "granite-experts-nope",
        {"normalization_function": "layernorm"},
        "normalization_function = 'layernorm'",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_not_implemented_are_refused_by_name(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(changed(folders[family], tmp_path, **changes))


DAMAGED: list[Change] = [
    (
        "phi3-longrope-long",
        {"original_max_position_embeddings": None},
        "original_max_position.* is missing",
    ),
    ("phi3-longrope-long", _rope(short_factor=None), "short_factor is missing"),
    (
        "phi3-longrope-long",
        _rope(short_factor="x"),
        "short_factor is 'x'; it must be a list of numbers",
    ),
    (
        "phi3-longrope-long",
        _rope(long_factor=[1.0, 1.0, 0.0, 1.0]),
        "a longrope factor is not above 0",
    ),
    ("phi3-longrope-long", {"original_max_position_embeddings": 1}, "more than one token"),
    ("phi3", {"num_key_value_heads": 4}, r"qkv_proj\.weight has shape \[96, 48\]"),
    ("phi3", {"intermediate_size": 79}, r"gate_up_proj\.weight has shape \[160, 48\]"),
    ("glm4", {"architectures": ["GlmForCausalLM"]}, r"no place for: .*post_mlp_layernorm"),
    ("glm4", {"attention_bias": False}, r"no place for: .*bias"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
    ("olmo2", {"architectures": ["LlamaForCausalLM"]}, r"missing: .*input_layernorm"),
    ("smollm3-window", {"no_rope_layers": ["x"]}, "must be a list of numbers"),
    ("qwen3-next", {"linear_value_head_dim": 8}, "linear_attn"),
    ("qwen3-next", {"num_experts": 0}, r"missing: .*mlp\.down_proj"),
    ("qwen3-next", {"mlp_only_layers": [0]}, r"missing: .*layers\.0\.mlp\.gate_proj"),
    ("granite-experts-nope", {"mamba_d_state": 4}, "mamba"),
    (
        "granite-experts-nope",
        {"shared_intermediate_size": 39},
        r"input_linear\.weight has shape \[80, 48\]",
    ),
    ("granite-experts-nope", {"num_local_experts": 0}, r"no place for: .*block_sparse_moe"),
    ("granite-experts-nope", {"mamba_conv_bias": False}, r"no place for: .*conv1d\.bias"),
]


@pytest.mark.parametrize(("family", "changes", "message"), DAMAGED)
def test_configurations_that_do_not_fit_are_errors(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        load(changed(folders[family], tmp_path, **changes))


def test_older_spellings(folders: Folders, tmp_path: Path) -> None:
    scaling = {"type": "su", "short_factor": SHORT, "long_factor": LONG}
    changes = {"rope_theta": 1000.0, "partial_rotary_factor": 0.67, "rope_scaling": scaling}
    folder = changed(folders["phi3-longrope-long"], tmp_path, rope_parameters=None, **changes)
    (rope,) = load(folder).program.ropes
    assert rope == RopeSpec(
        8, 1e3, "longrope", 4.0, 16, short_factors=tuple(SHORT), long_factors=tuple(LONG)
    )


def test_older_layer_types(folders: Folders, tmp_path: Path) -> None:
    changes = {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba"]}
    other = load(changed(folders["granite-experts-nope"], tmp_path, **changes))
    assert other.config == load(folders["granite-experts-nope"]).config


def test_caps_of_gemma2_absent_and_null(folders: Folders, tmp_path: Path) -> None:
    """An absent cap is the class's default, a null one is none: as in transformers."""
    folder = changed(folders["gemma2"], tmp_path, attn_logit_softcapping=None)
    assert load(folder).config.attention_softcap == 50.0
    config = json.loads((folder / "config.json").read_text())
    config |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    (folder / "config.json").write_text(json.dumps(config))
    found = load(folder).config
    assert (found.attention_softcap, found.final_softcap) == (0.0, 0.0)


def test_context_of_longrope(folders: Folders) -> None:
    assert load(folders["phi3-longrope-long"]).context_length == 64


@pytest.mark.parametrize(
    "name", ["phi3-longrope-long", "qwen3-next", "granite-experts-nope", "smollm3-window"]
)
def test_any_configuration_loads_or_is_an_error_for_users(
    name: str, folders: Folders, tmp_path: Path
) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    assert absurd_values_refused(changed(folders[name], tmp_path), "rope_parameters") > 100
