"""The tokenizer inside a GGUF's metadata (``tokenizer.ggml.*``).

Key names and defaults: the GGUF specification and llama.cpp (``src/llama-vocab.cpp``).

Built anew at every start. Keeping the built tokenizer in a file was measured: the library takes
longer to read its JSON than to be given vocabulary and merges, where there are merges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sartor.errors import FormatError, UnsupportedError
from sartor.text import wordpiece
from sartor.text.byte_level import TokenizersEncoder, on_texts, unspell
from sartor.text.control_tokens import (
    end_of_generation,
    misnamed_control,
    with_control,
)
from sartor.text.gguf_surroundings import surroundings_of
from sartor.text.pretokenizers import pre_tokenizer
from sartor.text.sentencepiece import (
    SPACE,
    AddedPiece,
    Prefix,
    SentencePieceBPE,
    Surroundings,
    TokenType,
    TokenTypes,
    byte_value,
    ids_of_type,
)
from sartor.text.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NEEDED_KEYS = ("bos_token_id", *_STOP_KEYS)
_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
    "eos": ("</s>", "<eos>"),
}


@runtime_checkable
class _Pairs(Protocol):
    """Metadata that can give strings of two words as pairs, which is quicker."""

    def pairs(self, key: str) -> list[tuple[str, str]] | None: ...


class Keys:
    """Typed access to the metadata; every complaint names the key.

    ``notes`` gets a line for each fact that is wrong and that the model can do without.
    """

    def __init__(self, metadata: Mapping[str, object], notes: list[str] | None = None) -> None:
        self._metadata = metadata
        self.notes = [] if notes is None else notes

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
            fault = _mistyped(name, "a token id", value)
            if name in _NEEDED_KEYS:
                raise fault
            self.note(f"{fault}; it is not used")
            return None
        if not 0 <= value < vocab_size:
            # -1 and 4294967295 are how converters say "none".
            self.note(
                f"{PREFIX}{name} is {value}, but the vocabulary has {vocab_size} tokens; "
                "it is not used"
            )
            return None
        return value

    def note(self, line: str) -> None:
        """Keeps a line for people, once."""
        if line not in self.notes:
            self.notes.append(line)

    def general(self, name: str) -> str:
        """A string of the file's ``general.*`` keys; empty where it has none."""
        value = self._metadata.get(f"general.{name}")
        return value if isinstance(value, str) else ""

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


def build_tokenizer(metadata: Mapping[str, object], notes: list[str] | None = None) -> Tokenizer:
    """See ``tokenizer_from_gguf``."""
    keys = Keys(metadata, notes)
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
    built = builder(keys, tokens)
    if not built.eos_ids and "eos_token_id" in keys and model != "bert":
        keys.note("no token is known that ends an answer: answers end at their longest length")
    return built


def named_token(
    keys: Keys, tokens: Sequence[str], name: str, types: TokenTypes | None = None
) -> int | None:
    """The id that the key of ``name`` ("bos", "eos", ...) gives.

    Where it gives one that is none, the control token with a usual name. SentencePiece files may be
    from before the keys were mandatory: there also without a key, and last at the usual place.
    """
    key = f"{name}_token_id"
    token = keys.token(key, len(tokens))
    pieces = keys.text("model", "") == "llama"
    if token is not None or name not in _USUAL or not (pieces or key in keys):
        return token
    if types is None:
        if "token_type" not in keys:
            return None
        types = keys.types(len(tokens))
        types = with_control(types, misnamed_control(tokens, types))
    control = ids_of_type(types, TokenType.CONTROL)
    found = next((i for i in control if tokens[i] in _USUAL[name]), None)
    place = 1 if name == "bos" else 2
    return place if found is None and pieces and place in control else found


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

    types: TokenTypes = np.full(len(tokens), TokenType.NORMAL, np.int64)
    if "token_type" in keys:
        types = keys.types(len(tokens))
    types = _repaired(keys, tokens, types, merges)
    special = frozenset(ids_of_type(types, TokenType.CONTROL))
    user = ids_of_type(types, TokenType.USER_DEFINED)
    stops = {keys.token(name, len(tokens)) for name in _STOP_KEYS}
    takes = surroundings_of(keys, tokens, types)

    def added_token(token: int) -> AddedToken:
        how = takes.get(token, Surroundings())
        return AddedToken(
            tokens[token],
            special=token in special,
            normalized=False,
            lstrip=how.lstrip,
            rstrip=how.rstrip,
            single_word=how.single_word,
        )

    backend.add_special_tokens([added_token(i) for i in sorted(special)])
    backend.add_tokens([added_token(i) for i in user])
    added = {*special, *user}

    def bytes_of(token: int) -> bytes:
        text = tokens[token]
        return text.encode("utf-8", "replace") if token in added else unspell(text)

    bos = named_token(keys, tokens, "bos", types)
    return Tokenizer(
        encoder=TokenizersEncoder(backend),
        bytes_of=bytes_of,
        vocab_size=len(tokens),
        special_ids=special,
        bos_id=bos,
        eos_ids=end_of_generation(((tokens[i], i) for i in special), stops),
        prefix=_bos(keys, bos, rule.add_bos),
        suffix=_eos(keys, keys.token("eos_token_id", len(tokens))),
        strips_leading_space=False,
    )


def _sentencepiece(keys: Keys, tokens: list[str]) -> Tokenizer:
    size = len(tokens)
    types = keys.types(size)
    scores = keys.numbers("scores", size).tolist()  # Python's own are quicker to compare
    _check_distinct(tokens, set(tokens))
    types = _repaired(keys, tokens, types)
    bos, eos = (named_token(keys, tokens, name, types) for name in ("bos", "eos"))
    takes = surroundings_of(keys, tokens, types)
    charsmap = keys.codes("precompiled_charsmap") if "precompiled_charsmap" in keys else b""
    return sentencepiece_tokenizer(
        tokens,
        scores,
        types,
        bos_id=bos,
        stop_ids=[eos, *(keys.token(name, size) for name in _STOP_KEYS)],
        unknown_id=keys.token("unknown_token_id", size),
        prefix=_bos(keys, bos, bos is not None),
        suffix=_eos(keys, eos),
        added={
            tokens[i]: AddedPiece(i, types[i] != TokenType.USER_DEFINED, how)
            for i, how in takes.items()
        },
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
    pieces = [wordpiece.from_gguf(text) for text in tokens]
    # The models whose vocabulary has capital letters are those that tell them apart.
    lowercase = keys.flag("normalizer.lowercase", not wordpiece.has_capitals(pieces))
    strip_accents = keys.flag("normalizer.strip_accents", lowercase)
    backend = wordpiece.backend(
        pieces, tokens[unknown], lowercase=lowercase, strip_accents=strip_accents
    )
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
    added: Mapping[str, AddedPiece],
    space_prefix: bool,
    remove_extra_spaces: bool,
    charsmap: bytes,
    prefixed: Prefix = "all",
) -> Tokenizer:
    """A tokenizer over SentencePiece BPE pieces; ``charsmap``: the compiled normaliser, if any.

    ``added`` and ``prefixed``: see ``SentencePieceBPE``.
    """
    normalize = None
    if charsmap:
        from tokenizers import normalizers

        try:
            compiled = normalizers.Precompiled(charsmap)
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{PREFIX}precompiled_charsmap is damaged: {error}") from None

        def normalize(text: str) -> str:
            with on_texts():  # a damaged map may lead anywhere in its own text
                normalized: str = compiled.normalize_str(text)
            return normalized

    if unknown_id is None:
        unknown_id = next(iter(ids_of_type(types, TokenType.UNKNOWN)), None)
    control = {tokens[i]: i for i in ids_of_type(types, TokenType.CONTROL)}
    control |= {text: piece.id for text, piece in added.items() if piece.special}
    special = frozenset(control.values())
    added_texts = {piece.id: text for text, piece in added.items()}
    byte_tokens = frozenset(ids_of_type(types, TokenType.BYTE))

    def bytes_of(token: int) -> bytes:
        if token in added_texts:
            return added_texts[token].encode("utf-8", "replace")
        if token >= len(tokens):
            return b""
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
            added=added,
            prefix=prefixed,
        ),
        bytes_of=bytes_of,
        vocab_size=max([len(tokens), *(i + 1 for i in added_texts)]),
        special_ids=special | ({unknown_id} if unknown_id is not None else frozenset()),
        bos_id=bos_id,
        eos_ids=end_of_generation(control.items(), stop_ids),
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


def _eos(keys: Keys, eos: int | None) -> list[int]:
    if not keys.flag("add_eos_token", False):
        return []
    if eos is None:
        raise FormatError(f"{PREFIX}add_eos_token is set, but {PREFIX}eos_token_id is missing")
    return [eos]


def _repaired(
    keys: Keys, tokens: Sequence[str], types: TokenTypes, merges: Iterable[Sequence[str]] = ()
) -> TokenTypes:
    """The types, with control tokens that the file marks as something else put right."""
    wrong = misnamed_control(tokens, types, merges)
    # Converters mark what a tokenizer adds as user-defined; that is no news.
    shown = [repr(tokens[i]) for i in wrong if types[i] != TokenType.USER_DEFINED]
    if shown:
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        keys.note(
            f"{PREFIX}token_type marks {', '.join(shown[:3])}{more} as plain text; read as "
            "control tokens"
        )
    return with_control(types, wrong)


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
