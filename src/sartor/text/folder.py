"""The tokenizer of a checkpoint folder in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sartor.errors import FormatError, UnsupportedError
from sartor.formats import small_files
from sartor.text import wordpiece
from sartor.text.added_tokens import added_pieces
from sartor.text.byte_level import TokenizersEncoder, readable, unspell
from sartor.text.control_tokens import END_OF_GENERATION, end_of_generation
from sartor.text.folder_files import read_json, special_token
from sartor.text.gguf import sentencepiece_tokenizer
from sartor.text.pattern_limits import check_patterns
from sartor.text.sentencepiece import SPACE, AddedPiece, Prefix, Surroundings, byte_value
from sartor.text.sentencepiece_model import read_model
from sartor.text.tokenizer import Tokenizer


def build_tokenizer(
    folder: Path, notes: list[str] | None = None, *, lower_case: bool = False
) -> Tokenizer:
    """See ``tokenizer_from_folder``."""
    folder = Path(folder)
    notes = [] if notes is None else notes
    path = folder / "tokenizer.json"
    if path.is_file():
        with readable(path):
            return _from_json(folder, notes, lower_case)
    if (folder / "tokenizer.model").is_file():
        if lower_case:
            raise UnsupportedError(
                f"{folder / 'tokenizer.model'}: making texts lower case (do_lower_case) is only "
                "implemented for tokenizer.json; save one beside it (transformers writes it)"
            )
        return _from_sentencepiece(folder, notes)
    raise FormatError(
        f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there; "
        "download the checkpoint again with its tokenizer files"
    )


def _from_json(folder: Path, notes: list[str], lower_case: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    try:
        content = small_files.read(path)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    _check_patterns(content, path)
    try:
        backend = Backend.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for everything
        raise FormatError(f"cannot read {path}: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(folder, backend, notes)
    if lower_case:
        from tokenizers import normalizers

        lowering = [normalizers.Lowercase()]
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence(lowering + own)
    added = backend.get_added_tokens_decoder()
    special = {
        i: token.content
        for i, token in added.items()
        if token.special or token.content in END_OF_GENERATION
    }
    size = max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
    unspell_token, strips = _decoder(backend, path)

    def bytes_of(token: int) -> bytes:
        if token in added:
            return str(added[token].content).encode("utf-8", "replace")
        text = backend.id_to_token(token)
        return b"" if text is None else unspell_token(text)

    def lookup(name: str) -> int | None:
        text = special_token(folder, name)
        return None if text is None else backend.token_to_id(text)

    bos, eos = lookup("bos_token"), lookup("eos_token")
    prefix, suffix = _surroundings(folder, backend, bos, eos)
    return Tokenizer(
        encoder=TokenizersEncoder(backend),
        bytes_of=bytes_of,
        vocab_size=size,
        special_ids=frozenset(special),
        bos_id=bos,
        eos_ids=end_of_generation(
            ((text, i) for i, text in special.items()), [eos, *_declared_stops(folder, size, notes)]
        ),
        prefix=prefix,
        suffix=suffix,
        strips_leading_space=strips,
    )


class _Parts(msgspec.Struct):
    """What of a tokenizer.json may hold regular expressions that run."""

    normalizer: object = None
    pre_tokenizer: object = None


def _check_patterns(content: bytes, path: Path) -> None:
    """FormatError for a regular expression that could take too long, before it is compiled."""
    try:
        parts = msgspec.json.decode(content, type=_Parts)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path}: {error}; download the checkpoint again") from None
    check_patterns([parts.normalizer, parts.pre_tokenizer], str(path))


def _add_tokens(folder: Path, backend: Any, notes: list[str]) -> None:
    """What other files of the folder say of added tokens, over what tokenizer.json says."""
    from tokenizers import AddedToken

    known = {
        token.content: AddedPiece(
            i,
            token.special,
            Surroundings(token.lstrip, token.rstrip, token.single_word),
            token.normalized,
        )
        for i, token in backend.get_added_tokens_decoder().items()
    }
    pieces = added_pieces(folder, known, backend.token_to_id, notes)
    changed = [(text, piece) for text, piece in pieces.items() if known.get(text) != piece]
    changed.sort(key=lambda item: item[1].id)  # the library numbers new tokens itself, in order
    for special, group in groupby(changed, key=lambda item: item[1].special):
        tokens = [
            AddedToken(
                text,
                special=piece.special,
                normalized=piece.normalized,
                lstrip=piece.surroundings.lstrip,
                rstrip=piece.surroundings.rstrip,
                single_word=piece.surroundings.single_word,
            )
            for text, piece in group
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    # What ends an answer is a control token, whatever the files say of it.
    ending = [
        token
        for token in backend.get_added_tokens_decoder().values()
        if token.content in END_OF_GENERATION and not token.special
    ]
    for token in ending:
        token.special = True
    backend.add_special_tokens(ending)
    for text, piece in changed:
        if (given := backend.token_to_id(text)) != piece.id:
            notes.append(f"two files give {text!r} the ids {given} and {piece.id}; {given} counts")


def _surroundings(
    folder: Path, backend: Any, bos: int | None, eos: int | None
) -> tuple[list[int], list[int]]:
    """What goes before and behind a text.

    The post-processor of tokenizer.json says it. ``add_bos_token`` and ``add_eos_token`` of
    tokenizer_config.json, each for its side where it is true or false, go before it; transformers
    has read them beside a tokenizer.json until its version 5.
    """
    before, behind = _post_processor(folder, backend)
    config = read_json(folder / "tokenizer_config.json")
    return (
        _with_or_without(bos, before, config.get("add_bos_token"), at=0),
        _with_or_without(eos, behind, config.get("add_eos_token"), at=len(behind)),
    )


def _with_or_without(token: int | None, ids: list[int], wanted: object, at: int) -> list[int]:
    """``ids`` with ``token`` where it is wanted, without it where it is refused."""
    if token is None or not isinstance(wanted, bool) or wanted == (token in ids):
        return ids
    return [*ids[:at], token, *ids[at:]] if wanted else [i for i in ids if i != token]


def _post_processor(folder: Path, backend: Any) -> tuple[list[int], list[int]]:
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UnsupportedError(f"the post-processor of {folder / 'tokenizer.json'} is not supported")


def _decoder(backend: Any, path: Path) -> tuple[Callable[[str], bytes], bool]:
    """How tokens spell bytes, and whether a leading space is dropped."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    stages = state.get("decoders", [state])
    kinds = {stage.get("type"): stage for stage in stages}
    if "ByteLevel" in kinds:
        return unspell, False
    if "Metaspace" in kinds:
        scheme = kinds["Metaspace"].get("prepend_scheme", "always")
        return _unspell_sentencepiece, scheme != "never"
    if "Replace" in kinds and kinds["Replace"].get("pattern") == {"String": SPACE}:
        return _unspell_sentencepiece, kinds.get("Strip", {}).get("start", 0) > 0
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"].get("prefix", wordpiece.PREFIX)
        return lambda token: wordpiece.unspell(token, prefix), True
    names = ", ".join(str(kind) for kind in kinds)
    raise UnsupportedError(
        f"the decoder of {path} ({names}) is not supported; supported: ByteLevel, Metaspace, "
        "SentencePiece with byte fallback, WordPiece"
    )


def _unspell_sentencepiece(token: str) -> bytes:
    byte = byte_value(token)
    if byte is not None:
        return bytes([byte])
    return token.replace(SPACE, " ").encode("utf-8", "replace")


def _declared_stops(folder: Path, vocab_size: int, notes: list[str]) -> list[int]:
    stops: list[int] = []
    for file in ("generation_config.json", "config.json"):
        value = read_json(folder / file).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                notes.append(
                    f"eos_token_id in {file} holds {token!r}, but the vocabulary has "
                    f"{vocab_size} tokens; it is not used"
                )
                continue
            stops.append(token)
    return stops


def _from_sentencepiece(folder: Path, notes: list[str]) -> Tokenizer:
    path = folder / "tokenizer.model"
    model = read_model(path)
    if model.algorithm != "bpe":
        raise UnsupportedError(
            f"{path} is a SentencePiece {model.algorithm} model; only bpe can be used without a "
            "tokenizer.json: save one beside it (transformers writes it)"
        )
    config = read_json(folder / "tokenizer_config.json")
    ids = {token: i for i, token in enumerate(model.tokens)}
    added = added_pieces(folder, {}, ids.get, notes)
    ids |= {text: piece.id for text, piece in added.items()}

    def lookup(name: str, default: int | None) -> int | None:
        text = special_token(folder, name)
        return default if text is None else ids.get(text, default)

    bos, eos = lookup("bos_token", model.bos_id), lookup("eos_token", model.eos_id)
    size = max(ids.values()) + 1
    space_prefix, prefixed = _space_prefix(config, model.space_prefix)
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    return sentencepiece_tokenizer(
        model.tokens,
        model.scores,
        np.asarray(model.types),
        bos_id=bos,
        stop_ids=[eos, *_declared_stops(folder, size, notes)],
        unknown_id=model.unknown_id,
        # SentencePiece has no post-processor: what transformers adds by default.
        prefix=[bos] if add_bos is not False and bos is not None else [],
        suffix=[eos] if add_eos is True and eos is not None else [],
        added=added,
        space_prefix=space_prefix,
        remove_extra_spaces=model.remove_extra_spaces,
        charsmap=model.charsmap,
        prefixed=prefixed,
    )


def _space_prefix(config: Mapping[str, Any], declared: bool) -> tuple[bool, Prefix]:
    """Whether texts get the space prefix, and which of them: as transformers builds it."""
    kind = str(config.get("tokenizer_class", ""))
    llama = kind.startswith(("Llama", "CodeLlama"))
    legacy = config.get("legacy")
    if not isinstance(legacy, bool) or kind.startswith("CodeLlama"):
        legacy = not llama
    wanted = config.get("add_prefix_space")
    if llama and isinstance(wanted, bool):
        declared = wanted
    if not legacy:
        return declared, "first"
    return declared, "spaceless" if llama else "all"
