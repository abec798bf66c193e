"""Text to token ids and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from sartor.errors import UsageError
from sartor.text.control_spelling import ControlSpelling, Part, SpellingEncoder


class Encoder(Protocol):
    """What a tokenizer needs from an encoding algorithm."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids without bos and eos; special tokens in the text count if asked for."""
        ...


class Tokenizer:
    """One vocabulary: how text becomes token ids, and which bytes each id stands for.

    Decoding is defined on bytes: the text of a sequence is the UTF-8 decoding of its tokens' bytes,
    each maximal invalid part replaced by U+FFFD, and (for SentencePiece models with a space prefix)
    without the one space that the sequence starts with. So incremental decoding and whole decoding
    agree on every sequence, valid or not.

    ``vocab_size``: ids are below it. ``special_ids``: control tokens, which stand for no text.
    ``eos_ids``: every token that ends a generation. ``add_bos``, ``add_eos``: what ``encode`` adds.
    Build one with ``tokenizer_from_gguf`` or ``tokenizer_from_folder``.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        bytes_of: Callable[[int], bytes],
        vocab_size: int,
        special_ids: frozenset[int],
        bos_id: int | None,
        eos_ids: frozenset[int],
        prefix: Sequence[int],
        suffix: Sequence[int],
        strips_leading_space: bool,
    ) -> None:
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.strips_leading_space = strips_leading_space
        self._encoder = encoder
        self._bytes_of = bytes_of
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    @property
    def add_bos(self) -> bool:
        """Whether ``encode`` puts tokens in front (bos, for all known models)."""
        return bool(self._prefix)

    @property
    def add_eos(self) -> bool:
        """Whether ``encode`` puts tokens behind."""
        return bool(self._suffix)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of ``text``.

        ``add_special``: with bos and eos as the model wants them; use False for the output of a
        chat template, which writes them itself. ``parse_special``: control tokens spelled out in
        the text become those tokens; use False for untrusted text outside a template.

        UsageError if the text holds a lone surrogate, which no encoding can represent.
        """
        _check_unicode(text)
        ids = self._encoder.encode(text, parse_special)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    @cached_property
    def spelling(self) -> ControlSpelling:
        """How the control tokens are spelled."""
        encoder = self._encoder
        if not isinstance(encoder, SpellingEncoder):
            return ControlSpelling({}, ())
        return ControlSpelling(encoder.added(), self.special_ids, encoder.normalizer())

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of a text whose control tokens are given: a part is an id, or text in which
        nothing is a control token.

        The text is split and merged as ``encode`` does it with the text that has those tokens
        spelled out; no others are added. UsageError as there.
        """
        for part in parts:
            if isinstance(part, str):
                _check_unicode(part)
        assert isinstance(self._encoder, SpellingEncoder)  # else there are no control tokens
        ids = self._encoder.encode_parts(parts)
        read = Counter(token for token in ids if token in self.special_ids)
        if more := read - Counter(part for part in parts if isinstance(part, int)):
            ids = self._encoder.encode_parts(self.spelling.broken(parts, more))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; control tokens are left out unless ``skip_special`` is False.

        Ids without a token (models often pad their vocabulary) stand for nothing.
        """
        data = b"".join(self.piece(int(i), skip_special) for i in ids)
        if self.strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for in running text; empty for a control token."""
        return self.piece(id, True)

    def token_text(self, id: int) -> str:
        """A token on its own, for display: control tokens by name, broken UTF-8 as U+FFFD."""
        text = self._texts.get(id)
        if text is None:
            text = self._texts[id] = self.piece(id, False).decode("utf-8", "replace")
        return text

    def piece(self, id: int, skip_special: bool) -> bytes:
        """Like ``token_bytes``, but with the name of a control token if not ``skip_special``."""
        if skip_special and id in self.special_ids:
            return b""
        data = self._bytes.get(id)
        if data is None:
            data = self._bytes_of(id) if 0 <= id < self.vocab_size else b""
            self._bytes[id] = data
        return data


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}; remove it or send valid UTF-8"
        ) from None


def tokenizer_from_gguf(
    metadata: Mapping[str, object], notes: list[str] | None = None
) -> Tokenizer:
    """Build the tokenizer that a GGUF's metadata describes (keys ``tokenizer.ggml.*``).

    Array values may be lists or numpy arrays. FormatError names a key that is missing, mistyped or
    contradicts another; UnsupportedError names a tokenizer model or pre-tokenizer that is not
    supported and lists those that are. What is wrong in the file and not needed gives a line in
    ``notes`` instead. Source: the GGUF specification and llama.cpp.
    """
    from sartor.text.gguf import build_tokenizer

    return build_tokenizer(metadata, notes)


def tokenizer_from_folder(
    folder: Path, notes: list[str] | None = None, *, lower_case: bool = False
) -> Tokenizer:
    """Build the tokenizer of a checkpoint folder in the Hugging Face layout.

    Reads ``tokenizer.json``, or else a SentencePiece BPE ``tokenizer.model`` with what was added to
    it (``added_tokens_decoder``, ``added_tokens.json``); special tokens also from
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json`` and
    ``config.json``. FormatError if a file is damaged, UnsupportedError if none can be used. What is
    wrong and not needed gives a line in ``notes`` instead. ``lower_case``: texts are made lower
    case first, whatever these files say.
    """
    from sartor.text.folder import build_tokenizer

    return build_tokenizer(folder, notes, lower_case=lower_case)
