"""BERT against transformers: tiny random encoders, and a real one on sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from config_changes import absurd_values_refused
from encoder_runner import embed

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.formats import open_checkpoint
from sartor.graph import Program
from sartor.models import Model, load_model
from sartor.text.tokenizer import tokenizer_from_folder

VOCAB = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-6,
}
SEQUENCES = [
    [int(t) for t in np.random.default_rng(length).integers(2, VOCAB, length)]
    for length in (1, 2, 7, 16, 33, 40)
]
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 42, "type_vocab_size": 1}
TOLERANCE = 1e-4


def tiny(kind: str = "BertModel", **options: Any) -> Any:
    family = kind.removesuffix("Model").removesuffix("ForMaskedLM")
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                scale = 1.0 if "embeddings" in name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale)
    return model


def expected(model: Any, sequences: list[list[int]], pool: str, normalize: bool) -> np.ndarray:
    rows = []
    encoder = getattr(model, "bert", getattr(model, "roberta", model))
    for tokens in sequences:
        with torch.no_grad():
            hidden = encoder(torch.tensor([tokens])).last_hidden_state[0]
        row = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pool]
        rows.append((row / row.norm() if normalize else row).numpy())
    return np.stack(rows)


def loaded(folder: Path) -> Model:
    return load_model(open_checkpoint(folder))


def described(folder: Path, *steps: str, **pooling: bool) -> Path:
    """Adds the files of sentence-transformers to a folder."""
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    for i, name in enumerate(steps[1:], 1):
        (folder / f"{i}_{name}").mkdir(exist_ok=True)
    content = {"word_embedding_dimension": 48} | pooling
    if "Pooling" in steps:
        place = folder / f"{steps.index('Pooling')}_Pooling" / "config.json"
        place.write_text(json.dumps(content))
    return folder


POOLINGS = {
    "mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    "cls": {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
    "last": {"pooling_mode_lasttoken": True, "include_prompt": True},
}


@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_equal_transformers(
    pool: str, normalize: bool, backend: str, tmp_path: Path
) -> None:
    oracle = tiny()
    oracle.save_pretrained(tmp_path)
    steps = ("Transformer", "Pooling", *(["Normalize"] if normalize else []))
    model = loaded(described(tmp_path, *steps, **POOLINGS[pool]))
    found = embed(model, backend, SEQUENCES)
    wanted = expected(oracle, SEQUENCES, pool, normalize)
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()
    made = model.config.vectors
    assert made is not None
    assert made.poolings == (pool,)
    assert [step.kind for step in made.steps] == ["normalize"] * normalize


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BertForMaskedLM", {}),
        ("BertModel", {"hidden_act": "gelu_new"}),
        ("BertModel", {"hidden_act": "relu", "type_vocab_size": 1}),
        ("RobertaModel", ROBERTA),
        ("RobertaForMaskedLM", ROBERTA),
        ("XLMRobertaModel", ROBERTA | {"pad_token_id": 0, "max_position_embeddings": 41}),
    ],
)
def test_options_equal_transformers(
    kind: str, options: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    oracle = tiny(kind, **options)
    oracle.save_pretrained(tmp_path)
    found = embed(loaded(tmp_path), backend, SEQUENCES)
    wanted = expected(oracle, SEQUENCES, "mean", False)
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


def test_company_does_not_matter(backend: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model = loaded(tmp_path)
    together = embed(model, backend, SEQUENCES)
    for row, tokens in zip(together, SEQUENCES, strict=True):
        alone = embed(model, backend, [tokens])[0]
        assert np.abs(alone - row).max() < 1e-5


def test_program_is_an_encoder(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    model = loaded(described(tmp_path, "Transformer", "Pooling", **POOLINGS["mean"]))
    assert set(model.program.outputs) == {"embedding"}
    assert not model.program.samples
    assert not model.program.states
    assert model.context_length == 12
    assert Program.from_json(model.program.to_json()) == model.program


@pytest.mark.parametrize(
    ("steps", "pooling", "message"),
    [
        (("Transformer", "Pooling", "LSTM"), POOLINGS["mean"], "step 'LSTM'"),
        (("Transformer", "Normalize"), {}, "step 'Normalize'"),
        (("Transformer",), {}, "the steps are Transformer;"),
        (("CLIPModel", "Pooling"), POOLINGS["mean"], "the steps are CLIPModel, Pooling"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_max_tokens": True},
            "pooling by max",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pooling by max",
        ),
    ],
)
def test_steps_not_implemented_are_refused_by_name(
    steps: tuple[str, ...], pooling: dict[str, bool], message: str, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        loaded(described(tmp_path, *steps, **pooling))


@pytest.mark.parametrize(
    "content", ["[", "{}", '[{"path": "../x", "type": "a.Pooling"}]', '[{"path": "", "type": 3}]']
)
def test_damaged_steps_are_named(content: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(FormatError, match=r"modules\.json"):
        loaded(tmp_path)


def test_missing_pooling_file_is_named(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    described(tmp_path, "Transformer", "Pooling", **POOLINGS["mean"])
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FormatError, match=r"1_Pooling.config\.json: this file is missing"):
        loaded(tmp_path)


def test_positions_of_roberta(tmp_path: Path) -> None:
    tiny("RobertaModel", **ROBERTA).save_pretrained(tmp_path)
    assert loaded(tmp_path).context_length == 40
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    with pytest.raises(UnsupportedError, match="max_position_embeddings = 2"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("position_embedding_type", "relative_key", "position_embedding_type = 'relative_key'"),
        ("is_decoder", True, "is_decoder = True"),
        ("hidden_act", "quick_gelu", "hidden_act = 'quick_gelu'"),
        ("num_attention_heads", 5, "5 heads"),
        ("num_hidden_layers", 2**40, "num_hidden_layers is"),
        ("max_position_embeddings", 41, r"position_embeddings\.weight has shape \[40, 48\]"),
        ("type_vocab_size", 3, r"token_type_embeddings\.weight has shape \[2, 48\]"),
        ("num_hidden_layers", 2, r"no place for: encoder\.layer\.2\."),
    ],
)
def test_configurations_that_do_not_fit(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(SartorError, match=message):
        loaded(tmp_path)


# GGUF ---------------------------------------------------------------------------------

Extra = Callable[[gguf.GGUFWriter], None]


def write_gguf(model: Any, path: Path, extra: Extra, quantize: bool = False) -> Path:
    """As llama.cpp's converter: names by the package's own map, no pooler."""
    config = model.config
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.startswith("pooler."):
            continue
        data = tensor.numpy()
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        if quantize and ".layer." in name and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "pool"),
    [(gguf.PoolingType.MEAN, "mean"), (gguf.PoolingType.CLS, "cls"), (None, "mean")],
)
def test_gguf_vectors_equal_transformers(
    kind: gguf.PoolingType | None, pool: str, backend: str, tmp_path: Path
) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_pooling_type(kind)

    oracle = tiny()
    model = loaded(write_gguf(oracle, tmp_path / "tiny.gguf", extra))
    assert ("pooling_type does not say" in " ".join(model.notes)) == (kind is None)
    found = embed(model, backend, SEQUENCES)
    wanted = expected(oracle, SEQUENCES, pool, True)
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


def test_quantised_gguf_is_near(tmp_path: Path) -> None:
    oracle = tiny(hidden_size=64, intermediate_size=96)
    model = loaded(write_gguf(oracle, tmp_path / "tiny.gguf", lambda writer: None, quantize=True))
    found = embed(model, "reference", SEQUENCES)
    wanted = expected(oracle, SEQUENCES, "mean", True)
    assert (found * wanted).sum(axis=1).min() > 0.999


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_pooling_type(gguf.PoolingType.RANK), "bert.pooling_type = 4"),
        (lambda w: w.add_head_count_kv(2), "bert.attention.head_count_kv = 2"),
        (lambda w: w.add_uint32("bert.something_new", 3), "bert.something_new = 3"),
    ],
)
def test_gguf_options_not_implemented_are_refused_by_name(
    add: Extra, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message.replace(".", r"\.")):
        loaded(write_gguf(tiny(), tmp_path / "tiny.gguf", add))


# A real model --------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over a lazy dog, while Zürich's 42 trams run late again. " * 4
SENTENCES = [TEXT[i : 2 * i + i * i // 2 + 5] for i in range(20)]


def test_real_sentences_equal_transformers(minilm: Path) -> None:
    tokenizer = tokenizer_from_folder(minilm)
    sequences = [tokenizer.encode(text) for text in SENTENCES]
    assert len({len(tokens) for tokens in sequences}) > 15
    oracle = transformers.BertModel.from_pretrained(minilm).eval()
    library = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    library.no_padding()
    library.no_truncation()
    assert sequences == [library.encode(text).ids for text in SENTENCES]
    model = loaded(minilm)
    found = embed(model, "reference", sequences)
    wanted = expected(oracle, sequences, "mean", True)
    assert (found * wanted).sum(axis=1).min() > 0.9999
    assert np.abs(found - wanted).max() < 1e-5
    assert model.context_length == 256
    assert model.config.vectors is not None
    assert [step.kind for step in model.config.vectors.steps] == ["normalize"]
    assert model.config.vectors.limit == "max_seq_length of sentence_bert_config.json"
    assert not model.notes


def test_real_meaning(minilm: Path) -> None:
    texts = ("A cat sits on the mat.", "A kitten is on a rug.", "Interest rates rose sharply.")
    tokenizer = tokenizer_from_folder(minilm)
    a, b, c = embed(loaded(minilm), "reference", [tokenizer.encode(text) for text in texts])
    assert a @ b > 0.5 > 0.2 > a @ c


def test_float16_checkpoint(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    whole = embed(loaded(tmp_path), "reference", SEQUENCES)
    path = tmp_path / "model.safetensors"
    halves = {k: v.astype(np.float16) for k, v in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(halves, path)
    assert np.abs(embed(loaded(tmp_path), "reference", SEQUENCES) - whole).max() < 0.05


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel"])
def test_any_configuration_loads_or_is_an_error_for_users(kind: str, tmp_path: Path) -> None:
    """Every option in turn takes absurd values: a model or a SartorError, never a crash."""
    tiny(kind, **(ROBERTA if kind == "RobertaModel" else {})).save_pretrained(tmp_path)
    assert absurd_values_refused(tmp_path) > 60


def test_missing_gguf_tables_are_named(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        for tensors in writer.tensors:
            tensors.pop("token_types.weight")

    with pytest.raises(FormatError, match=r"token_types\.weight"):
        loaded(write_gguf(tiny(), tmp_path / "tiny.gguf", extra))
