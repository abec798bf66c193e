"""Folders of sentence-transformers: the vectors are those of its ``encode``."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from tiny_encoder import HIDDEN, write_tiny_encoder

from sartor.engine.llm import LLM
from sartor.errors import CapacityError, FormatError, SartorError, UnsupportedError, UsageError

TEXTS = ["the cat sat on the mat", "Dogs ran", "mat", "the dog sat on the cats on the mat", ""]
EVERY = ["cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("st") / "base")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(folder: Path, backend: str = "reference", **fields: Any) -> LLM:
    plan = {"activation": "fp32"} | ({"device": "reference"} if backend == "reference" else {})
    return LLM(folder, backend=backend, **(plan | fields))


def save(base: Path, folder: Path, *modules: Any, **options: Any) -> Path:
    """A folder that sentence-transformers wrote."""
    torch.manual_seed(0)
    first = Transformer(str(base))
    SentenceTransformer(modules=[first, *modules], **options).save(str(folder))
    return folder


def encode(folder: Path, texts: list[str], **options: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(SentenceTransformer(str(folder)).encode(texts, **options))


def change(folder: Path, file: str, **values: Any) -> Path:
    """Sets keys of a JSON file; None takes one away."""
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    content = {key: value for key, value in (content | values).items() if value is not None}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return folder


def dense(inputs: int, outputs: int, *more: Any, **options: Any) -> Any:
    torch.manual_seed(inputs + outputs)
    return Dense(inputs, outputs, *more, **options)


def scaled_norm(width: int) -> Any:
    norm = LayerNorm(width)
    with torch.no_grad():
        norm.norm.weight.uniform_(0.5, 2)
        norm.norm.bias.uniform_(-1, 1)
    return norm


CHAINS: dict[str, Callable[[], list[Any]]] = {
    **{f"pool {mode}": lambda mode=mode: [Pooling(HIDDEN, mode)] for mode in EVERY},
    "pool several": lambda: [Pooling(HIDDEN, ("lasttoken", "mean", "cls"))],
    "pool all": lambda: [Pooling(HIDDEN, tuple(EVERY)), Normalize()],
    "dense": lambda: [Pooling(HIDDEN), dense(HIDDEN, 20), Normalize()],
    "dense on several": lambda: [Pooling(HIDDEN, ("mean", "cls")), dense(2 * HIDDEN, 20)],
    "dense without bias": lambda: [
        Pooling(HIDDEN),
        dense(HIDDEN, 20, bias=False, activation_function=torch.nn.Identity()),
    ],
    "dense twice": lambda: [
        Pooling(HIDDEN),
        dense(HIDDEN, 48, activation_function=torch.nn.GELU()),
        dense(48, 16, activation_function=torch.nn.ReLU()),
    ],
    "dense residual": lambda: [Pooling(HIDDEN), dense(HIDDEN, HIDDEN, use_residual=True)],
    "dense projected residual": lambda: [Pooling(HIDDEN), dense(HIDDEN, 16, use_residual=True)],
    "dense others": lambda: [
        Pooling(HIDDEN),
        dense(HIDDEN, 48, activation_function=torch.nn.SiLU()),
        dense(48, 16, activation_function=torch.nn.Sigmoid()),
    ],
    "norms and dropout": lambda: [
        Pooling(HIDDEN),
        Dropout(0.5),
        scaled_norm(HIDDEN),
        Normalize(),
        dense(HIDDEN, 8),
        Normalize(),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_vectors_of_every_chain_of_modules(
    chain: str, base: Path, backend: str, tmp_path: Path
) -> None:
    folder = save(base, tmp_path / "st", *CHAINS[chain]())
    wanted = encode(folder, TEXTS)
    with model(folder, backend) as llm:
        found = llm.embed(TEXTS)
        alone = np.concatenate([llm.embed(text) for text in TEXTS])
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(alone, wanted, atol=2e-5)


FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
OLD: dict[str, dict[str, Any]] = {
    **{mode: {FLAGS[mode]: True} for mode in EVERY},
    "two, joined in their order": {FLAGS["lasttoken"]: True, FLAGS["cls"]: True},
    "none: the mean": dict.fromkeys(FLAGS.values(), False),
    "nothing at all: the mean": {},
    "both spellings: the newer": {"pooling_mode": "cls", FLAGS["mean"]: True},
    "a list of one": {"pooling_mode": ["lasttoken"]},
    "a list": {"pooling_mode": ["mean", "lasttoken"]},
}


@pytest.mark.parametrize("case", OLD)
def test_every_spelling_of_a_pooling(case: str, base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "st"))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": HIDDEN} | OLD[case])
    )
    wanted = encode(folder, TEXTS)
    with model(folder) as llm:
        np.testing.assert_allclose(llm.embed(TEXTS), wanted, atol=2e-6)


def test_dimensions_are_cut_as_encode_cuts_them(base: Path, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "st", Pooling(HIDDEN), Normalize(), truncate_dim=16)
    with model(folder) as llm:
        found = llm.embed(TEXTS)
        assert found.shape == (len(TEXTS), 16)
        np.testing.assert_allclose(found, encode(folder, TEXTS), atol=2e-6)
        assert np.linalg.norm(found, axis=1).max() < 0.99  # cut, and left as it is
        for count in (1, 7, 20, HIDDEN):
            wanted = encode(folder, TEXTS, truncate_dim=count)
            np.testing.assert_allclose(llm.embed(TEXTS, dimensions=count), wanted, atol=2e-6)
        for count in (0, HIDDEN + 1):
            with pytest.raises(UsageError, match=f"dimensions is {count}, .* vectors have 32"):
                llm.embed(TEXTS, dimensions=count)
    change(folder, "config_sentence_transformers.json", truncate_dim=1000)
    with model(folder) as llm:
        assert llm.embed(TEXTS).shape == encode(folder, TEXTS).shape == (len(TEXTS), HIDDEN)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("poolings", [[mode] for mode in EVERY] + [EVERY])
def test_prompts_stand_in_front_of_texts(
    poolings: list[str], include: bool, base: Path, backend: str, tmp_path: Path
) -> None:
    folder = save(
        base,
        tmp_path / "st",
        Pooling(HIDDEN, tuple(poolings), include_prompt=include),
        prompts={"query": "the dog ran on ", "short": "on "},
        default_prompt_name="short",
    )
    with model(folder, backend) as llm:
        for name in (None, "query", "short", "document"):
            wanted = encode(folder, TEXTS, prompt_name=name)
            found = llm.embed(TEXTS, prompt_name=name)
            np.testing.assert_allclose(found, wanted, atol=2e-5)
        with pytest.raises(UsageError, match=r"prompt_name 'passage' is unknown.*query.*short"):
            llm.embed(TEXTS, prompt_name="passage")
        ids = [2, 4, 5, 3]
        np.testing.assert_allclose(
            llm.embed([ids]), llm.embed(["the cat"], prompt_name="document"), atol=2e-6
        )
        with pytest.raises(UsageError, match="token ids take none"):
            llm.embed([ids], prompt_name="query")


def test_without_a_default_no_prompt_is_put(base: Path, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "st", Pooling(HIDDEN), prompts={"query": "the dog "})
    with model(folder) as llm:
        plain, asked = llm.embed(TEXTS), llm.embed(TEXTS, prompt_name="query")
    np.testing.assert_allclose(plain, encode(folder, TEXTS), atol=2e-6)
    np.testing.assert_allclose(asked, encode(folder, TEXTS, prompt_name="query"), atol=2e-6)
    assert np.abs(plain - asked).max() > 0.01


def test_lower_case(base: Path, tmp_path: Path) -> None:
    """Also where the tokenizer keeps the case."""
    folder = Path(shutil.copytree(base, tmp_path / "st"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **special)
    texts = ["The CAT sat", "on the MAT"]
    with model(folder) as llm:
        np.testing.assert_allclose(llm.embed(texts), encode(folder, texts), atol=2e-6)
        kept = llm.embed(texts)
    change(folder, "sentence_bert_config.json", do_lower_case=True)
    with model(folder) as llm:
        found = llm.embed(texts)
        np.testing.assert_allclose(found, encode(folder, texts), atol=2e-6)
    assert np.abs(found - kept).max() > 0.01


LENGTHS: dict[str, tuple[dict[str, dict[str, Any]], int, str]] = {
    "positions": ({}, 24, "the positions that it has"),
    "old file": (
        {"sentence_bert_config.json": {"max_seq_length": 9}},
        9,
        "max_seq_length of sentence_bert",
    ),
    "old name": (
        {"sentence_roberta_config.json": {"max_seq_length": 9}},
        9,
        "sentence_roberta_config",
    ),
    "tokenizer": (
        {"tokenizer_config.json": {"model_max_length": 10}},
        10,
        "model_max_length of tokenizer_config",
    ),
    "the first before the second": (
        {
            "tokenizer_config.json": {"model_max_length": 10},
            "sentence_bert_config.json": {"max_seq_length": 12},
        },
        12,
        "max_seq_length",
    ),
    "arguments": (
        {
            "sentence_bert_config.json": {
                "tokenizer_args": {"model_max_length": 8},
                "max_seq_length": 12,
            }
        },
        8,
        "model_max_length of sentence_bert_config",
    ),
    "of a call": (
        {"sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 7}}}},
        7,
        "max_length of sentence_bert_config",
    ),
    "no limit": ({"tokenizer_config.json": {"model_max_length": 1e30}}, 24, "positions"),
    "a limit beyond the positions": (
        {"tokenizer_config.json": {"model_max_length": 512}},
        24,
        "positions",
    ),
    "null": ({"sentence_bert_config.json": {"max_seq_length": None}}, 24, "positions"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_the_longest_text(case: str, base: Path, tmp_path: Path) -> None:
    """One that is too long is refused: ``encode`` cuts it without a word."""
    files, length, reason = LENGTHS[case]
    folder = Path(shutil.copytree(base, tmp_path / "st"))
    for file, values in files.items():
        change(folder, file, **values)
    reference = SentenceTransformer(str(folder))[0]
    cut = reference.preprocess(["cat " * 100])["input_ids"].shape[1]
    assert cut == length or reason.endswith("positions")
    with model(folder) as llm:
        assert llm.context_length == length
        fitting = "cat " * (length - 2)
        np.testing.assert_allclose(llm.embed(fitting), encode(folder, [fitting]), atol=2e-6)
        with pytest.raises(
            CapacityError, match=rf"{length + 1} tokens.*at most {length} \(.*{reason}"
        ):
            llm.embed(fitting + "cat")


def test_a_context_that_was_asked_for_is_named(base: Path) -> None:
    with (
        model(base, max_context=8) as llm,
        pytest.raises(CapacityError, match=r"at most 8 \(the context that was asked for\)"),
    ):
        llm.embed("cat " * 9)


SETTINGS = "config_sentence_transformers.json"
FIRST = "sentence_bert_config.json"
POOL = "1_Pooling/config.json"
NORM = "2_Normalize/config.json"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another kind of model": (SETTINGS, {"model_type": "SparseEncoder"}, "model_type = 'SparseEncoder'"),
    "a setting of later": (SETTINGS, {"quantize": "int8"}, "quantize = 'int8'"),
    "another task": (FIRST, {"transformer_task": "fill-mask"}, "transformer_task = 'fill-mask'"),
    "the pooler": (
        FIRST,
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
        "modality_config = .*pooler_output",
    ),
    "a chat template": (
        FIRST,
        {"modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}}},
        "modality_config = .*message",
    ),
    "expansion": (FIRST, {"query_expansion": {"length": 32}}, "query_expansion"),
    "another tokenizer": (FIRST, {"tokenizer_name_or_path": "x"}, "tokenizer_name_or_path = 'x'"),
    "arguments of the model": (FIRST, {"model_args": {"output_hidden_states": True}}, "output_hidden_states"),
    "arguments of the configuration": (FIRST, {"config_kwargs": {"hidden_act": "relu"}}, "hidden_act"),
    "arguments of the tokenizer": (FIRST, {"tokenizer_args": {"add_special_tokens": False}}, "add_special_tokens"),
    "arguments of each call": (FIRST, {"processing_kwargs": {"text": {"stride": 2}}}, "stride = 2"),
    "of other inputs": (FIRST, {"processing_kwargs": {"chat_template": {"a": 1}}}, "chat_template"),
    "max pooling": (POOL, {"pooling_mode": "max"}, "pooling by max is not implemented"),
    "max among others": (POOL, {"pooling_mode": ["mean", "max"]}, "pooling by max"),
    "old max": (POOL, {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "pooling by max"),
    "unknown pooling": (POOL, {"pooling_mode": "median"}, "pooling by median"),
    "unknown flag": (POOL, {"pooling_mode_median": True}, "pooling_mode_median = True"),
    "tokens of length 1": (NORM, {"module_input_name": "token_embeddings"}, "module_input_name"),
    "another result": (NORM, {"module_output_name": "normalized"}, "module_output_name = 'normalized'"),
    "an adapter": ("adapter_config.json", {"peft_type": "LORA"}, "merge it into the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    file, values, message = REFUSED[case]
    folder = change(Path(shutil.copytree(base, tmp_path / "st")), file, **values)
    with pytest.raises(UnsupportedError, match=message) as caught:
        model(folder)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


HARMLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "similarity": (SETTINGS, {"similarity_fn_name": "dot", "requirements": {"torch": ">=2"}}),
    "nulls": (SETTINGS, {"prompts": {"query": None}, "truncate_dim": None}),
    "speed": (FIRST, {"unpad_inputs": False, "model_args": {"attn_implementation": "eager"}}),
    "lengths of encode_query": (FIRST, {"query_length": 4, "document_length": 5}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_no_vector(case: str, base: Path, tmp_path: Path) -> None:
    file, values = HARMLESS[case]
    folder = change(Path(shutil.copytree(base, tmp_path / "st")), file, **values)
    if case == "nulls":
        (folder / SETTINGS).write_text(json.dumps(values))
    with model(folder) as llm:
        np.testing.assert_allclose(llm.embed(TEXTS), encode(base, TEXTS), atol=2e-6)


def steps(folder: Path, *entries: tuple[str, str]) -> Path:
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


ST = "sentence_transformers.models."
HEAD = (("", f"{ST}Transformer"), ("1_Pooling", f"{ST}Pooling"))


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ((*HEAD, ("2_LSTM", f"{ST}LSTM")), UnsupportedError, "step 'LSTM' is not implemented"),
        ((*HEAD, ("2_W", f"{ST}WeightedLayerPooling")), UnsupportedError, "'WeightedLayerPooling'"),
        ((*HEAD, ("1_P", f"{ST}Pooling")), UnsupportedError, "step 'Pooling' is not"),
        ((HEAD[0], ("1", f"{ST}WordWeights"), HEAD[1]), UnsupportedError, "'WordWeights' before"),
        ((HEAD[0],), UnsupportedError, "the steps are Transformer; implemented are"),
        ((("", f"{ST}StaticEmbedding"),), UnsupportedError, "the steps are StaticEmbedding"),
        ((("", "custom_st.Transformer"), HEAD[1]), UnsupportedError, "'custom_st.Transformer' is Python code"),
        ((*HEAD, ("2_N", "mine.Normalize")), UnsupportedError, "'mine.Normalize' is Python code"),
        ((("0_Transformer", f"{ST}Transformer"), HEAD[1]), UnsupportedError, "in the folder '0_Transformer'"),
        ((HEAD[0], ("", f"{ST}Pooling")), FormatError, "step 'Pooling' names no folder"),
        ((*HEAD, ("1_Pooling", f"{ST}Normalize")), FormatError, "two steps have the folder"),
        ((*HEAD, ("2_Dense", f"{ST}Dense")), FormatError, "2_Dense.config.json: this file is missing"),
    ],
)  # fmt: skip
def test_chains_that_are_not_read(
    entries: tuple[tuple[str, str], ...],
    error: type[SartorError],
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    folder = steps(Path(shutil.copytree(base, tmp_path / "st")), *entries)
    with pytest.raises(error, match=message):
        model(folder)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"in_features": 31}, FormatError, "in_features is 31, but the step before gives 32"),
        ({"out_features": 9}, FormatError, r"2_Dense.linear.weight has shape \[8, 32\]"),
        ({"activation_function": "torch.nn.modules.activation.PReLU"}, UnsupportedError, "PReLU"),
        (
            {"activation_function": "mine.Tanh"},
            UnsupportedError,
            "activation_function = 'mine.Tanh'",
        ),
        ({"bias": False}, FormatError, r"no place for: 2_Dense.linear.bias"),
        ({"use_residual": True}, FormatError, "2_Dense.residual.weight"),
        ({"module_input_name": "token_embeddings"}, UnsupportedError, "module_input_name"),
        ({"dropout": 0.5}, UnsupportedError, "dropout = 0.5"),
    ],
)
def test_dense_steps_that_do_not_fit(
    values: dict[str, Any], error: type[SartorError], message: str, base: Path, tmp_path: Path
) -> None:
    folder = save(base, tmp_path / "st", Pooling(HIDDEN), dense(HIDDEN, 8))
    with pytest.raises(error, match=message):
        model(change(folder, "2_Dense/config.json", **values))


def test_weights_of_a_step_that_are_missing_or_pickled(base: Path, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "st", Pooling(HIDDEN), dense(HIDDEN, 8))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"2_Dense.model.safetensors: this file is missing"):
        model(folder)
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"2_Dense.pytorch_model.bin: a Python pickle"):
        model(folder)


def test_packed_weights_are_made_again_when_a_step_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    folder = save(base, tmp_path / "st", Pooling(HIDDEN), dense(HIDDEN, 8))
    with model(folder, "cpu") as llm:
        before = llm.embed(TEXTS)
    torch.manual_seed(5)
    other = Dense(HIDDEN, 8)
    folder = save(base, folder, Pooling(HIDDEN), other)
    with model(folder, "cpu") as llm:
        after = llm.embed(TEXTS)
    np.testing.assert_allclose(after, encode(folder, TEXTS), atol=2e-5)
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"default_prompt_name": "q"}, FormatError, "default_prompt_name is 'q', but the prompts are query, document"),
        ({"prompts": ["query: "]}, FormatError, "prompts is .*must be an object"),
        ({"prompts": {"query": 3}}, FormatError, "query is 3"),
        ({"truncate_dim": 0}, FormatError, "truncate_dim is 0"),
        ({"truncate_dim": "16"}, FormatError, "truncate_dim is '16'"),
    ],
)  # fmt: skip
def test_damaged_settings(
    values: dict[str, Any], error: type[SartorError], message: str, base: Path, tmp_path: Path
) -> None:
    folder = change(Path(shutil.copytree(base, tmp_path / "st")), SETTINGS, **values)
    with pytest.raises(error, match=message):
        model(folder)


def test_a_plain_folder_says_what_is_assumed(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "st"))
    with model(folder) as llm:
        assert not llm._loaded.notes
    (folder / "modules.json").unlink()
    with model(folder) as llm:
        assert "no modules.json" in llm._loaded.notes[0]
        np.testing.assert_allclose(llm.embed(TEXTS), encode(folder, TEXTS), atol=2e-6)
        asked = llm.embed(TEXTS, prompt_name="query")
        np.testing.assert_allclose(asked, encode(folder, TEXTS, prompt_name="query"), atol=2e-6)
