"""Adapters of every linear layer: a folder and a GGUF file of one model take the same ones, and
give the logits of PEFT."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import pytest
import test_model_experts_gguf
import test_model_gguf
import test_model_more_gguf
import tiny_experts_gguf
import tiny_gguf
import torch
from cases import CASES
from logits_runner import LENGTH, TOKENS, TOLERANCE, compiled, head_of, relative_error, step_batch
from safetensors.numpy import load_file, save_file
from tiny_models import Case, build, save

from sartor.engine.adapter import AdapterTable
from sartor.engine.head import requantize_head
from sartor.engine.peft import read_peft
from sartor.errors import UnsupportedError
from sartor.formats import open_checkpoint
from sartor.models import Model, load_model

PLAIN = ("llama", "llama-biases-tied", "qwen2", "qwen3-yarn", "gemma3")
MORE = ("phi3", "glm4", "glm4-tied-no-bias", "granite", "olmo2", "gemma2", "smollm3")
EXPERTS = ("mixtral", "qwen3moe", "qwen2moe", "olmoe", "gpt-oss", "deepseek2-lite", "deepseek2-v3")
FOLDERS = (
    "llama-biases-tied",
    "mistral-window",
    "gemma3-multimodal",
    "phi3",
    "glm",
    "qwen3-moe-some-layers",
    "qwen2-moe-some-layers",
    "mixtral",
    "deepseek-v3-biases",
    "qwen3-next-some-dense",
    "granite-experts-nope",
    "granite-groups-biases",
)
"""Cases whose folders name or fuse their layers in some way of their own."""


def written(route: str, path: Path) -> tuple[Any, Path]:
    """The model of a route, and its GGUF file."""
    if route in EXPERTS:
        architecture, case = test_model_experts_gguf.ROUTES[route]
        oracle = build(case, {})
        return oracle, tiny_experts_gguf.write(oracle, architecture, path)
    table = test_model_gguf.ROUTES if route in PLAIN else test_model_more_gguf.ROUTES
    architecture, case, extra = table[route]
    oracle = build(case, {})
    return oracle, tiny_gguf.write(oracle, architecture, path, extra)


def loaded(path: Path) -> Model:
    return load_model(open_checkpoint(path))


def suffixes(oracle: torch.nn.Module) -> list[str]:
    """The last names of all linear modules: what people write into ``target_modules``."""
    linear = [n for n, module in oracle.named_modules() if isinstance(module, torch.nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear if "vision" not in name})


def adapter(oracle: Any, folder: Path, targets: list[str], **options: Any) -> Any:
    """PEFT's model with a random adapter, which lies in ``folder`` afterwards.

    It adapts linear modules with these last names. That PEFT takes such names for those of experts,
    which were linear modules before transformers 5, is left out.
    """
    torch.manual_seed(3)
    conversion = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"
    with warnings.catch_warnings(), patch(conversion):
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            **({"r": 3, "lora_alpha": 5} | options),
            target_modules=rf"(?!.*(vision|projector)).*\b({'|'.join(targets)})",
            init_lora_weights=False,
        )
        made = peft.get_peft_model(copy.deepcopy(oracle), config).eval()
        made.save_pretrained(str(folder))
    return made


def wanted_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = (
            model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
        )
    return found


def logits(model: Model, folder: Path, backend: str = "reference") -> np.ndarray:
    executable = compiled(model, backend)
    AdapterTable(executable, True).load("one", read_peft(folder, model))
    batch = step_batch(model.program, [(TOKENS, 0)], [[5, 2, 7]], LENGTH)
    batch = dataclasses.replace(batch, adapters=np.zeros(1, np.int32))
    output = executable.collect(executable.submit(batch))
    found = np.array(output.taps[head_of(model.program)])
    executable.close()
    return found


@pytest.mark.parametrize("route", PLAIN + MORE + EXPERTS)
def test_a_folder_and_a_gguf_take_the_same_adapters(route: str, tmp_path: Path) -> None:
    oracle, path = written(route, tmp_path / "tiny.gguf")
    models = [loaded(save(oracle, tmp_path / "folder")), loaded(path)]
    plain, accepted = wanted_logits(oracle), set()
    for suffix in suffixes(oracle):
        folder = tmp_path / suffix
        wanted = wanted_logits(adapter(oracle, folder, [suffix]))
        assert relative_error(plain, wanted) > 10 * TOLERANCE, "the adapter does nothing"
        if suffix == "kv_b_proj":
            for model in models:
                with pytest.raises(
                    UnsupportedError, match=r"kv_b_proj cannot be .*two parts.*merge"
                ):
                    read_peft(folder, model)
            continue
        for model in models:
            assert relative_error(logits(model, folder), wanted) < TOLERANCE, suffix
        accepted.add(suffix)
    assert {"o_proj", "lm_head"} <= accepted


@pytest.mark.parametrize("case", FOLDERS)
def test_all_layers_of_a_folder_at_once(case: str, tmp_path: Path) -> None:
    oracle = build(CASES[case], {})
    targets = [name for name in suffixes(oracle) if name != "kv_b_proj"]
    wanted = wanted_logits(adapter(oracle, tmp_path / "adapter", targets))
    found = logits(loaded(save(oracle, tmp_path / "folder")), tmp_path / "adapter", "cpu")
    assert relative_error(found, wanted) < TOLERANCE


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Model]]:
    """A model whose head is its embedding, and a folder and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("tied")
    oracle = build(Case("Llama", {"tie_word_embeddings": True, "num_hidden_layers": 2}), {})
    path = tiny_gguf.write(oracle, "llama", folder / "tiny.gguf")
    return oracle, [loaded(save(oracle, folder / "folder")), loaded(path)]


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 7, "lm_head": 1},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_peft(options: str, tied: tuple[Any, list[Model]], tmp_path: Path) -> None:
    oracle, models = tied
    targets = ["q_proj", "up_proj"] + ([] if options == "some layers" else ["lm_head"])
    made = OPTIONS[options]
    if options != "some layers":
        wanted = wanted_logits(adapter(oracle, tmp_path, targets, **made))
    else:  # only with a list of names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **made)
            model = peft.get_peft_model(copy.deepcopy(oracle), config).eval()
        model.save_pretrained(str(tmp_path))
        wanted = wanted_logits(model)
        assert not any(".0." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    for model in models:
        assert relative_error(logits(model, tmp_path), wanted) < TOLERANCE


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "DoRA": ({"use_dora": True}, ["q_proj"], "use_dora = True is not implemented: DoRA also.*merge"),
    "biases": ({"bias": "all"}, ["q_proj"], "bias = 'all' is not implemented: it changes.*merge"),
    "biases of layers": ({"lora_bias": True}, ["q_proj"], "lora_bias = True.*have biases"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, ["q_proj"], "modules_to_save.*whole layers"),
    "parameters": (
        {"target_parameters": ["mlp.up_proj.weight"]},
        ["q_proj"],
        "target_parameters.*weights of experts",
    ),
    "tokens": ({"trainable_token_indices": [1]}, ["q_proj"], "trainable_token.*rows of the embedding"),
    "the embedding": ({}, ["embed_tokens"], "lora_embedding_A: model.embed_tokens is an embedding.*merge"),
    "both, tied": (
        {"ensure_weight_tying": True},
        ["q_proj", "lm_head"],
        "ensure_weight_tying|lora_embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_can_do_beside_is_refused_with_its_reason(
    case: str, tied: tuple[Any, list[Model]], tmp_path: Path
) -> None:
    oracle, models = tied
    options, targets, message = REFUSED[case]
    adapter(oracle, tmp_path, targets, **options)
    for model in models:
        with pytest.raises(UnsupportedError, match=message) as caught:
            read_peft(tmp_path, model)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_head_is_saved_with_its_adapter_and_must_be_the_models_own(
    tied: tuple[Any, list[Model]], tmp_path: Path
) -> None:
    oracle, models = tied
    made = adapter(oracle, tmp_path / "a", ["lm_head"])
    made.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in tensors
    quantised = loaded(tiny_gguf.write(oracle, "llama", tmp_path / "q8.gguf", quantize=True))
    for model in [*models, quantised]:
        assert set(read_peft(tmp_path / "a", model)) == {"model.embed_tokens.weight"}
    trained = tensors[name].copy()
    trained[3] = -trained[3]
    for other in (trained, tensors[name][:-1]):  # a new token, fewer tokens
        save_file(tensors | {name: other.copy()}, path)
        for model in models:
            with pytest.raises(UnsupportedError, match=r"lm_head.*replaces lm_head of the model"):
                read_peft(tmp_path / "a", model)


def test_a_tied_head_in_fewer_bits_takes_its_adapter(
    tied: tuple[Any, list[Model]], tmp_path: Path
) -> None:
    case = Case("Llama", {"tie_word_embeddings": True, "hidden_size": 64, "num_hidden_layers": 2})
    oracle = build(case, {})
    model = loaded(save(oracle, tmp_path / "folder"))
    adapter(oracle, tmp_path / "a", ["lm_head", "q_proj"])
    program, _ = requantize_head(model, 4)
    layers = read_peft(tmp_path / "a", model, program)
    assert "lm_head.weight" in layers
    assert "model.embed_tokens.weight" not in layers
    assert {spec.name for spec in program.weights} >= set(layers)


def renamed(folder: Path, old: str, new: str) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): data for name, data in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.model.layers", "model.model.language_model.layers"),
        ("model.model.layers", "model.language_model.model.layers"),
        ("model.model.layers", "model.layers"),
        ("lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_names_of_other_versions(
    old: str, new: str, tied: tuple[Any, list[Model]], tmp_path: Path
) -> None:
    """A wrapper for several modalities, a model without its head, a file written by hand."""
    oracle, models = tied
    wanted = wanted_logits(adapter(oracle, tmp_path, ["q_proj", "down_proj"]))
    folder = renamed(tmp_path, old, new)
    for model in models:
        assert relative_error(logits(model, folder), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("route", "new", "message"),
    [
        ("llama", "model.layers.0.self_attn.qkv_proj", "no layer of this name .*like model.layers.0"),
        ("llama", "model.layers.7.self_attn.q_proj", "no layer of this name .*made for this model"),
        ("llama", "model.layers.0.input_layernorm", "it is no linear layer.*merge"),
        ("llama", "model.embed_tokens", "it is an embedding.*merge"),
        ("llama", "model.vision_tower.layers.0.self_attn.q_proj", "not in the part of the model.*text"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w1", "a layer of experts.*merge"),
        ("mixtral", "model.layers.0.mlp.experts", "a layer of experts.*merge"),
        ("deepseek2-v3", "model.layers.0.self_attn.kv_b_proj", "run.* in two parts.*merge"),
        ("deepseek2-v3", "model.layers.0.self_attn.k_b_proj", "run.* in two parts.*merge"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_adapted(route: str, new: str, message: str, tmp_path: Path) -> None:
    """The reason is the same one for a folder and for a GGUF file."""
    oracle, path = written(route, tmp_path / "tiny.gguf")
    adapter(oracle, tmp_path / "a", ["o_proj"])
    folder = renamed(tmp_path / "a", "model.layers.0.self_attn.o_proj", new)
    reasons = set()
    for model in (loaded(save(oracle, tmp_path / "folder")), loaded(path)):
        with pytest.raises(
            UnsupportedError, match=f"{new} cannot be adapted: .*{message}"
        ) as caught:
            read_peft(folder, model)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
