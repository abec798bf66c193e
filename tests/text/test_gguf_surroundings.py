"""White space that belongs to the control tokens of Phi-3, which a GGUF does not say."""

from __future__ import annotations

from typing import Any

import pytest
import sentencepiece as spm
from test_sentencepiece import to_gguf, train
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import generate_merges

from sartor.text.tokenizer import tokenizer_from_gguf

TURNS = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
PROMPT = "<|user|>\nHi<|end|>\n<|assistant|>\n"
LINES = (
    PROMPT,
    "<|system|>\nBe brief.<|end|>\n<|user|>\n Hi  <|end|>\n\n<|assistant|>\n  ",
    "<s><|user|> \t\u00a0\u3000x<|end|>\u200b y<|end|>\x1c z",
    "<s> x <|endoftext|>\n y </s>\n z <unk> w",
    "a <|end|><|end|> \n<|end|>b",
    "no control tokens \n at all",
)


@pytest.fixture(scope="module")
def model(page: str) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(
        model_proto=train(page, control_symbols=["<|endoftext|>", *TURNS])
    )


@pytest.fixture(scope="module")
def metadata(model: spm.SentencePieceProcessor) -> dict[str, Any]:
    return {**to_gguf(model), "general.architecture": "phi3", "general.name": "Phi3"}


@pytest.fixture(scope="module")
def oracle(metadata: dict[str, Any]) -> Backend:
    """As Phi-3's tokenizer.json has it."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    merges = generate_merges(vocab, scores)
    backend = Backend(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=text in ("</s>", *TURNS))
            for text in ("<unk>", "<s>", "</s>", "<|endoftext|>", *TURNS)
        ]
    )
    return backend


def test_phi3_prompt(metadata: dict[str, Any], oracle: Backend) -> None:
    ours = tokenizer_from_gguf(metadata)
    ids = ours.encode(PROMPT, add_special=False)
    assert [ours.token_text(i).strip() for i in ids if i in ours.special_ids] == [
        "<|user|>", "<|end|>", "<|assistant|>",
    ]  # fmt: skip
    assert ours.decode(ids) == "Hi"
    for line in LINES:
        assert ours.encode(line, add_special=False) == oracle.encode(line).ids, line


@pytest.mark.parametrize("name", ["Phi-3-mini-4k-instruct", "phi3", "Phi 3.5 Mini", "My PHI-3"])
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_by_the_name(
    metadata: dict[str, Any], oracle: Backend, name: str, architecture: str
) -> None:
    named = {**metadata, "general.name": name, "general.architecture": architecture}
    ours = tokenizer_from_gguf(named)
    assert ours.encode(PROMPT, add_special=False) == oracle.encode(PROMPT).ids


def test_by_architecture_and_vocabulary(metadata: dict[str, Any], oracle: Backend) -> None:
    for name in ({"general.name": "Kensho"}, {}):
        tuned = {k: v for k, v in metadata.items() if k != "general.name"} | name
        assert tokenizer_from_gguf(tuned).encode(PROMPT, add_special=False) == (
            oracle.encode(PROMPT).ids
        )


def test_other_models_keep_the_white_space(metadata: dict[str, Any], oracle: Backend) -> None:
    other = {**metadata, "general.name": "Llama", "general.architecture": "llama"}
    ours = tokenizer_from_gguf(other)
    assert len(ours.encode(PROMPT, add_special=False)) > len(oracle.encode(PROMPT).ids)


@pytest.mark.parametrize("kind", [1, 4])
def test_whatever_type_the_file_gives_them(
    metadata: dict[str, Any], oracle: Backend, kind: int
) -> None:
    types = metadata["tokenizer.ggml.token_type"].copy()
    for token in ("</s>", *TURNS):
        types[metadata["tokenizer.ggml.tokens"].index(token)] = kind
    ours = tokenizer_from_gguf({**metadata, "tokenizer.ggml.token_type": types})
    for line in LINES:
        assert ours.encode(line, add_special=False) == oracle.encode(line).ids


def test_byte_level_vocabularies_too(page: str) -> None:
    from test_byte_level import to_gguf as byte_level_gguf
    from test_byte_level import train as train_byte_level

    backend = train_byte_level("gpt-2", page)
    metadata = byte_level_gguf(backend, "gpt-2")
    plain, phi3 = (
        tokenizer_from_gguf({**metadata, "general.name": name}) for name in ("x", "phi-3")
    )
    text = "<|im_start|>\n a<|endoftext|>\n b"
    assert phi3.encode(text) == plain.encode("<|im_start|>a<|endoftext|>\n b")
