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
from tiny_models import build, save

from sartor.engine.adapter import AdapterTable
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
