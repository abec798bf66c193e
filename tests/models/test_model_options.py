"""Options of config.json: read in both spellings, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cases import CASES
from config_changes import Change, Folders, absurd_values_refused, changed, load
from tiny_models import build, save

from sartor.errors import FormatError, UnsupportedError
from sartor.ops.rope import RopeSpec

REFUSED: list[Change] = [
    ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
    ("llama", {"rope_parameters": {"rope_type": "mrope", "factor": 2}}, "rope type 'mrope'"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, "rope type 'ntk'"),
    ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    ("llama", {"head_dim": 7}, "head_dim = 7"),
    ("llama", {"head_dim": None, "hidden_size": 49}, "hidden_size = 49"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ("llama", {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
    (
        "mistral-window",
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        "layer_types",
    ),
    ("qwen2-tied", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2-tied", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
    ("gemma3", {"sliding_window": ...}, "sliding_window"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_not_implemented_are_refused_by_name(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(changed(folders[family], tmp_path, **changes))


DAMAGED: list[Change] = [
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"vocab_size": 68}, r"embed_tokens\.weight has shape \[67, 48\].*\[68, 48\]"),
    ("llama", {"num_hidden_layers": 2}, r"no place for: model\.layers\.2\."),
    ("llama", {"num_hidden_layers": 4}, r"missing: model\.layers\.3\."),
    ("llama", {"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
    ("llama", {"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
    ("llama", {"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0"),
    ("llama", {"attention_bias": True}, r"missing: .*q_proj\.bias"),
    ("llama", {"attention_bias": 1}, "attention_bias is 1"),
    ("llama", {"rope_parameters": {"rope_theta": 1.0}}, "base of its frequencies"),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        "low_freq_factor",
    ),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "beta_slow": 40.0}}, "beta_slow"),
    ("llama", {"architectures": ["Qwen3ForCausalLM"]}, r"missing: .*k_norm\.weight"),
    ("qwen3", {"architectures": ["LlamaForCausalLM"]}, r"no place for: .*k_norm\.weight"),
    ("qwen2-tied", {"sliding_window": "x", "use_sliding_window": True}, "sliding_window is 'x'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), DAMAGED)
def test_configurations_that_do_not_fit_are_errors(
    family: str, changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        load(changed(folders[family], tmp_path, **changes))


OLD_SPELLINGS: list[tuple[str, dict[str, Any], RopeSpec]] = [
    ("llama", {"rope_theta": 5e5}, RopeSpec(12, 5e5)),
    ("llama", {}, RopeSpec(12, 1e4)),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 2e4},
        RopeSpec(12, 2e4, "linear", 2.0),
    ),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        RopeSpec(12, 1e4, "dynamic", 3.0, 64),
    ),
    (
        "qwen2-tied",
        {
            "rope_theta": 1e6,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        RopeSpec(12, 1e6, "yarn", 4.0, 32),
    ),
]


@pytest.mark.parametrize(("family", "changes", "wanted"), OLD_SPELLINGS)
def test_older_rope_spelling(
    family: str,
    changes: dict[str, Any],
    wanted: RopeSpec,
    folders: Folders,
    tmp_path: Path,
) -> None:
    model = load(changed(folders[family], tmp_path, rope_parameters=None, **changes))
    assert model.program.ropes == (wanted,)


def test_older_gemma3_spelling(folders: Folders, tmp_path: Path) -> None:
    folder = changed(
        folders["gemma3"],
        tmp_path,
        rope_parameters=None,
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=None,
        sliding_window_pattern=2,
    )
    layers = load(folder).config.layers
    assert [part.window for part in layers] == [5, 0, 5, 0, 5, 0, 5]
    assert layers[0].rope == RopeSpec(16, 3e4)
    assert layers[1].rope == RopeSpec(16, 2e6, "linear", 8.0)


def test_mistral_window_absent_and_null(folders: Folders, tmp_path: Path) -> None:
    """An absent window is the class's default, a null one is none: as in transformers."""
    absent = load(changed(folders["mistral-window"], tmp_path, sliding_window=None))
    assert absent.config.layers[0].window == 4096
    null = load(changed(folders["mistral-window"], tmp_path, sliding_window=...))
    assert null.config.layers[0].window == 0


@pytest.mark.parametrize(
    ("family", "rope", "context"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 128),
        (
            "llama",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            128,
        ),
        ("llama", {"rope_type": "linear", "factor": 2.0}, 64),
    ],
)
def test_context_length(
    family: str, rope: dict[str, Any], context: int, folders: Folders, tmp_path: Path
) -> None:
    assert load(changed(folders[family], tmp_path, rope_parameters=rope)).context_length == context


def _rewritten(folder: Path, to: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The checkpoint with tensors added or replaced."""
    values = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(values | tensors, to / "model.safetensors")
    return changed(folder, to)


def test_tied_checkpoint_with_a_copy_of_the_head(folders: Folders, tmp_path: Path) -> None:
    values = safetensors.numpy.load_file(folders["qwen2-tied"] / "model.safetensors")
    table = values["model.embed_tokens.weight"]
    same = load(_rewritten(folders["qwen2-tied"], tmp_path, {"lm_head.weight": table}))
    assert same.config.tied_head
    other = load(_rewritten(folders["qwen2-tied"], tmp_path, {"lm_head.weight": table + 1}))
    assert not other.config.tied_head
    assert np.array_equal(other.source.weight("lm_head.weight").dequantize(), table + 1)


def test_harmless_and_left_over_tensors(folders: Folders, tmp_path: Path) -> None:
    data = np.ones(6, np.float32)
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": data}
    load(_rewritten(folders["llama"], tmp_path, harmless))
    with pytest.raises(FormatError, match=r"no place for: score\.weight"):
        load(_rewritten(folders["llama"], tmp_path, {"score.weight": data}))


@pytest.mark.parametrize(
    ("name", "nested"), [("llama-yarn", "rope_parameters"), ("gemma3-multimodal", "text_config")]
)
def test_any_configuration_loads_or_is_an_error_for_users(
    name: str, nested: str, folders: Folders, tmp_path: Path
) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    assert absurd_values_refused(changed(folders[name], tmp_path), nested) > 100


def test_both_namings_of_multimodal_gemma3(tmp_path: Path) -> None:
    """The text part stands under language_model.model, or under model.language_model."""
    folder = save(build(CASES["gemma3-multimodal"], {}), tmp_path)
    model = load(folder)
    values = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {}
    for name, data in values.items():
        inner = name.replace("language_model.model.", "language_model.")
        renamed[f"model.{inner}"] = data
    assert not set(renamed) & set(values)
    safetensors.numpy.save_file(renamed, folder / "model.safetensors")
    other = load(folder)
    assert other.config == model.config
    name = "model.layers.3.mlp.up_proj.weight"
    assert np.array_equal(other.source.weight(name).data, model.source.weight(name).data)
