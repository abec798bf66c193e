"""The tokenizer inside a GGUF's metadata (``tokenizer.ggml.*``).

Key names and defaults: the GGUF specification and llama.cpp (``src/llama-vocab.cpp``).

Built anew at every start. Keeping the built tokenizer in a file was measured: the library takes
longer to read its JSON than to be given vocabulary and merges, where there are merges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sartor.errors import FormatError, UnsupportedError
from sartor.text import wordpiece
from sartor.text.byte_level import TokenizersEncoder, unspell
from sartor.text.pretokenizers import pre_tokenizer
from sartor.text.sentencepiece import (
    SPACE,
    SentencePieceBPE,
    TokenType,
    TokenTypes,
    byte_value,
    ids_of_type,
)
from sartor.text.tokenizer import Tokenizer, end_of_generation

PREFIX = "tokenizer.ggml."
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@runtime_checkable
class _Pairs(Protocol):
    """Metadata that can give strings of two words as pairs, which is quicker."""

    def pairs(self, key: str) -> list[tuple[str, str]] | None: ...


class Keys:
    """Typed access to the metadata; every complaint names the key."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def __contains__(self, name: str) -> bool:
        return PREFIX + name in self._metadata

    def text(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(PREFIX + name, default)
        if value is None:
            raise FormatError(f"{PREFIX}{name} is missing from the GGUF; convert the model again")
        if not isinstance(value, str):
            raise _mistyped(name, "a string", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = _plain(self._metadata.get(PREFIX + name, default))
        if not isinstance(value, int) or value not in (0, 1):
            raise _mistyped(name, "a boolean", value)
        return bool(value)

    def token(self, name: str, vocab_size: int) -> int | None:
        value = _plain(self._metadata.get(PREFIX + name))
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise _mistyped(name, "a token id", value)
        if not 0 <= value < vocab_size:
            raise FormatError(
                f"{PREFIX}{name} is {value}, but the vocabulary has {vocab_size} tokens; "
                "the file is damaged or was converted wrongly"
            )
        return value

    def strings(self, name: str) -> list[str]:
        return self._array(name, {str}, "strings")

    def pairs(self, name: str) -> Sequence[Any]:
        """Strings, each as the tuple of its parts before and after the first space."""
        if isinstance(self._metadata, _Pairs):
            pairs = self._metadata.pairs(PREFIX + name)
            if pairs is not None:
                return pairs
        return [tuple(string.split(" ", 1)) for string in self.strings(name)]

    def numbers(self, name: str, length: int) -> NDArray[Any]:
        """Numbers, one for each token: more are tolerated as padding, fewer are not."""
        values = self._metadata.get(PREFIX + name)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            values = np.asarray(self._array(name, {int, float}, "numbers"))
        if len(values) < length:
            raise FormatError(
                f"{PREFIX}{name} has {len(values)} entries for {length} tokens; the file is "
                "damaged or was converted wrongly"
            )
        return values[:length]

    def types(self, length: int) -> TokenTypes:
        """The type of each token."""
        return self.numbers("token_type", length).astype(np.int64)

    def codes(self, name: str) -> bytes:
        """Bytes stored as an array of (signed or unsigned) 8-bit integers."""
        return bytes(value & 0xFF for value in self._array(name, {int}, "integers"))

    def _array(self, name: str, types: set[type], what: str) -> list[Any]:
        values = self._metadata.get(PREFIX + name)
        if values is None:
            raise FormatError(f"{PREFIX}{name} is missing from the GGUF; convert the model again")
        values = _plain(values)
        if isinstance(values, tuple):
            values = list(values)
        if not isinstance(values, list) or not set(map(type, values)) <= types:
            raise _mistyped(name, f"an array of {what}", values)
        return values


def build_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """See ``tokenizer_from_gguf``."""
    keys = Keys(metadata)
    model = keys.text("model")
    builder = _BUILDERS.get(model)
    if builder is None:
        raise UnsupportedError(
            f"{PREFIX}model is {model!r}, which is not supported; supported: "
            f"{', '.join(sorted(_BUILDERS))}"
        )
    tokens = keys.strings("tokens")
    if "" in tokens:
        tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
    if not tokens:
        raise FormatError(f"{PREFIX}tokens is empty; the file is damaged")
    return builder(keys, tokens)


def _byte_level(keys: Keys, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, models, normalizers
    from tokenizers import Tokenizer as Backend

    rule = pre_tokenizer(keys.text("pre", "default"))
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    _check_distinct(tokens, vocab)
    merges = keys.pairs("merges")
    try:
        model = models.BPE(vocab, merges, ignore_merges=rule.whole_words)
    except Exception as error:  # the library raises plain Exception for merges of unknown tokens
        raise FormatError(f"{PREFIX}merges does not fit {PREFIX}tokens: {error}") from None
    backend = Backend(model)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.build()

    control: list[int] = []
    user: list[int] = []
    if "token_type" in keys:
        types = keys.types(len(tokens))
        control = ids_of_type(types, TokenType.CONTROL)
        user = ids_of_type(types, TokenType.USER_DEFINED)
    stops = {keys.token(name, len(tokens)) for name in _STOP_KEYS}
    special = frozenset(control) | _named_stops(tokens, user)
    backend.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)]
    )
    backend.add_tokens([AddedToken(tokens[i], normalized=False) for i in user if i not in special])
    added = {*control, *user}

    def bytes_of(token: int) -> bytes:
        text = tokens[token]
        return text.encode("utf-8", "replace") if token in added else unspell(text)

    bos = keys.token("bos_token_id", len(tokens))
    return Tokenizer(
        encoder=TokenizersEncoder(backend),
        bytes_of=bytes_of,
        vocab_size=len(tokens),
        special_ids=special,
        bos_id=bos,
        eos_ids=end_of_generation(((tokens[i], i) for i in special), stops),
        prefix=_bos(keys, bos, rule.add_bos),
        suffix=_eos(keys, len(tokens)),
        strips_leading_space=False,
    )


def _sentencepiece(keys: Keys, tokens: list[str]) -> Tokenizer:
    size = len(tokens)
    types = keys.types(size)
    scores = keys.numbers("scores", size).tolist()  # Python's own are quicker to compare
    _check_distinct(tokens, set(tokens))
    # SentencePiece's own default ids, for files from before the keys were mandatory.
    bos = keys.token("bos_token_id", size) if "bos_token_id" in keys else _control_at(types, 1)
    eos = keys.token("eos_token_id", size) if "eos_token_id" in keys else _control_at(types, 2)
    charsmap = keys.codes("precompiled_charsmap") if "precompiled_charsmap" in keys else b""
    return sentencepiece_tokenizer(
        tokens,
        scores,
        types,
        bos_id=bos,
        stop_ids=[eos, *(keys.token(name, size) for name in _STOP_KEYS)],
        unknown_id=keys.token("unknown_token_id", size),
        prefix=_bos(keys, bos, bos is not None),
        suffix=_eos(keys, size),
        space_prefix=keys.flag("add_space_prefix", True),
        remove_extra_spaces=keys.flag("remove_extra_whitespaces", False),
        charsmap=charsmap,
    )


def _wordpiece(keys: Keys, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken

    size = len(tokens)
    named = {text: i for i, text in enumerate(tokens) if wordpiece.is_named(text)}

    def one_of(keyed: Sequence[str], name: str) -> int | None:
        ids = (keys.token(key, size) for key in keyed)
        return next((i for i in ids if i is not None), named.get(name))

    first = one_of(("cls_token_id", "bos_token_id"), "[CLS]")
    last = one_of(("seperator_token_id", "eos_token_id"), "[SEP]")
    unknown = one_of(("unknown_token_id",), "[UNK]")
    if first is None or last is None or unknown is None:
        raise FormatError(
            f"{PREFIX}tokens has no [CLS], [SEP] or [UNK], and no key names them; convert the "
            "model again"
        )
    backend = wordpiece.backend([wordpiece.from_gguf(text) for text in tokens], tokens[unknown])
    control = {first, last, unknown}
    for other in ("padding_token_id", "mask_token_id"):
        found = keys.token(other, size)
        control |= set() if found is None else {found}
    if "token_type" in keys:
        control |= set(ids_of_type(keys.types(size), TokenType.CONTROL))
    special = frozenset(control)
    backend.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)]
    )

    def bytes_of(token: int) -> bytes:
        if token in special:
            return tokens[token].encode("utf-8", "replace")
        return wordpiece.unspell(wordpiece.from_gguf(tokens[token]))

    return Tokenizer(
        encoder=TokenizersEncoder(backend),
        bytes_of=bytes_of,
        vocab_size=size,
        special_ids=special,
        bos_id=None,
        eos_ids=frozenset(),
        prefix=[first] if keys.flag("add_bos_token", True) else [],
        suffix=[last] if keys.flag("add_eos_token", True) else [],
        strips_leading_space=True,
    )


_BUILDERS: dict[str, Callable[[Keys, list[str]], Tokenizer]] = {
    "bert": _wordpiece,
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def sentencepiece_tokenizer(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: TokenTypes,
    *,
    bos_id: int | None,
    stop_ids: Sequence[int | None],
    unknown_id: int | None,
    prefix: Sequence[int],
    suffix: Sequence[int],
    space_prefix: bool,
    remove_extra_spaces: bool,
    charsmap: bytes,
) -> Tokenizer:
    """A tokenizer over SentencePiece BPE pieces; ``charsmap``: the compiled normaliser, if any."""
    normalize = None
    if charsmap:
        from tokenizers import normalizers

        try:
            normalize = normalizers.Precompiled(charsmap).normalize_str
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{PREFIX}precompiled_charsmap is damaged: {error}") from None
    if unknown_id is None:
        unknown_id = next(iter(ids_of_type(types, TokenType.UNKNOWN)), None)
    stops = _named_stops(tokens, ids_of_type(types, TokenType.USER_DEFINED))
    special = stops.union(ids_of_type(types, TokenType.CONTROL))
    if stops:
        types = types.copy()
        types[list(stops)] = TokenType.CONTROL
    byte_tokens = frozenset(ids_of_type(types, TokenType.BYTE))

    def bytes_of(token: int) -> bytes:
        text = tokens[token]
        if token in byte_tokens and (byte := byte_value(text)) is not None:
            return bytes([byte])
        return text.replace(SPACE, " ").encode("utf-8", "replace")

    return Tokenizer(
        encoder=SentencePieceBPE(
            tokens,
            scores,
            types,
            unknown_id=unknown_id,
            space_prefix=space_prefix,
            remove_extra_spaces=remove_extra_spaces,
            normalize=normalize,
        ),
        bytes_of=bytes_of,
        vocab_size=len(tokens),
        special_ids=special | ({unknown_id} if unknown_id is not None else frozenset()),
        bos_id=bos_id,
        eos_ids=end_of_generation(((tokens[i], i) for i in special), stop_ids),
        prefix=prefix,
        suffix=suffix,
        strips_leading_space=space_prefix,
    )


def _bos(keys: Keys, bos: int | None, default: bool) -> list[int]:
    if not keys.flag("add_bos_token", default):
        return []
    if bos is not None:
        return [bos]
    if "add_bos_token" not in keys:
        return []
    raise FormatError(f"{PREFIX}add_bos_token is set, but {PREFIX}bos_token_id is missing")


def _eos(keys: Keys, vocab_size: int) -> list[int]:
    if not keys.flag("add_eos_token", False):
        return []
    eos = keys.token("eos_token_id", vocab_size)
    if eos is None:
        raise FormatError(f"{PREFIX}add_eos_token is set, but {PREFIX}eos_token_id is missing")
    return [eos]


def _named_stops(tokens: Sequence[str], user: Sequence[int]) -> frozenset[int]:
    """Some files mark <|im_end|> and its like as user-defined: they are control tokens."""
    from sartor.text.tokenizer import END_OF_GENERATION

    return frozenset(i for i in user if tokens[i] in END_OF_GENERATION)


def _control_at(types: TokenTypes, token: int) -> int | None:
    return token if token < len(types) and types[token] == TokenType.CONTROL else None


def _check_distinct(tokens: Sequence[str], distinct: Collection[str]) -> None:
    """Refuses a token that is there twice; ``distinct`` has each of them once."""
    if len(distinct) == len(tokens):
        return
    seen: set[str] = set()
    for i, token in enumerate(tokens):
        if token in seen:
            raise FormatError(f"{PREFIX}tokens holds {token!r} twice, again at id {i}")
        seen.add(token)


def _plain(value: object) -> Any:
    """A numpy array or scalar as Python values."""
    return value.tolist() if hasattr(value, "tolist") else value


def _mistyped(name: str, expected: str, value: object) -> FormatError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return FormatError(f"{PREFIX}{name} must be {expected}, but is {shown}")
