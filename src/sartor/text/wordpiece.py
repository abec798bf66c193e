"""WordPiece (arXiv:1609.08144, as in BERT): words cut into pieces of which all but the first carry
a mark.

The vocabulary holds no spaces, so the text of a sequence is its words with one space between
them: decoding does not give the original back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.errors import FormatError

PREFIX = "##"
_GGUF_SPACE = "\u2581"


def unspell(token: str, prefix: str = PREFIX) -> bytes:
    """The bytes of a piece: those of a word's first piece begin with a space."""
    inner = token.removeprefix(prefix)
    text = inner if inner != token else " " + token
    return text.encode("utf-8", "replace")


def is_named(token: str) -> bool:
    """Whether a token is spelled like BERT's control tokens: ``[CLS]``."""
    return len(token) > 2 and token.startswith("[") and token.endswith("]")


def from_gguf(token: str) -> str:
    """GGUF marks the first piece of a word instead of the others (llama.cpp's converter)."""
    if is_named(token):
        return token
    inner = token.removeprefix(_GGUF_SPACE)
    # A mark alone is a piece that continues a word: no word is empty.
    return inner if inner not in ("", token) else PREFIX + token


def has_capitals(tokens: Sequence[str]) -> bool:
    """Whether any piece of a word has a letter that lower-casing changes."""
    return any(token != token.lower() and not is_named(token) for token in tokens)


def backend(
    tokens: Sequence[str], unknown: str, *, lowercase: bool = True, strip_accents: bool = True
) -> Any:
    """A ``tokenizers.Tokenizer`` over these pieces, with BERT's cleaning of the text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError("tokenizer.ggml.tokens holds a WordPiece token twice; convert it again")
    built = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100))
    built.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return built
