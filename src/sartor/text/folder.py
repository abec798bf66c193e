"""The tokenizer of a checkpoint folder in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import FormatError, UnsupportedError
from sartor.text import wordpiece
from sartor.text.byte_level import TokenizersEncoder, unspell
from sartor.text.gguf import sentencepiece_tokenizer
from sartor.text.sentencepiece import SPACE, byte_value
from sartor.text.sentencepiece_model import read_model
from sartor.text.tokenizer import Tokenizer, end_of_generation


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {path}: {error}; download the checkpoint again") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object; download the checkpoint again")
    return content


def special_token(folder: Path, name: str) -> str | None:
    """The text of a token such as ``bos_token``, wherever the folder declares it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_json(folder / file).get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def build_tokenizer(folder: Path, *, lower_case: bool = False) -> Tokenizer:
    """See ``tokenizer_from_folder``."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder, lower_case)
    if (folder / "tokenizer.model").is_file():
        if lower_case:
            raise UnsupportedError(
                f"{folder / 'tokenizer.model'}: making texts lower case (do_lower_case) is only "
                "implemented for tokenizer.json; save one beside it (transformers writes it)"
            )
        return _from_sentencepiece(folder)
    raise FormatError(
        f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there; "
        "download the checkpoint again with its tokenizer files"
    )


def _from_json(folder: Path, lower_case: bool = False) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        raise FormatError(f"cannot read {path}: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    if lower_case:
        from tokenizers import normalizers

        lowering = [normalizers.Lowercase()]
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence(lowering + own)
    added = backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
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
            ((text, i) for i, text in special.items()), [eos, *_declared_stops(folder, size)]
        ),
        prefix=prefix,
        suffix=suffix,
        strips_leading_space=strips,
    )


def _surroundings(
    folder: Path, backend: Any, bos: int | None, eos: int | None
) -> tuple[list[int], list[int]]:
    """What goes before and behind a text: as the configuration says, or the post-processor."""
    config = read_json(folder / "tokenizer_config.json")
    if isinstance(config.get("add_bos_token"), bool) or isinstance(
        config.get("add_eos_token"), bool
    ):
        return (
            [bos] if config.get("add_bos_token") and bos is not None else [],
            [eos] if config.get("add_eos_token") and eos is not None else [],
        )
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


def _declared_stops(folder: Path, vocab_size: int) -> list[int]:
    stops: list[int] = []
    for file in ("generation_config.json", "config.json"):
        value = read_json(folder / file).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise FormatError(
                    f"eos_token_id in {folder / file} holds {token!r}, but the vocabulary has "
                    f"{vocab_size} tokens"
                )
            stops.append(token)
    return stops


def _from_sentencepiece(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    model = read_model(path)
    if model.algorithm != "bpe":
        raise UnsupportedError(
            f"{path} is a SentencePiece {model.algorithm} model; only bpe can be used without a "
            "tokenizer.json: save one beside it (transformers writes it)"
        )
    ids = {token: i for i, token in enumerate(model.tokens)}

    def lookup(name: str, default: int | None) -> int | None:
        text = special_token(folder, name)
        return default if text is None else ids.get(text, default)

    bos, eos = lookup("bos_token", model.bos_id), lookup("eos_token", model.eos_id)
    config = read_json(folder / "tokenizer_config.json")
    return sentencepiece_tokenizer(
        model.tokens,
        model.scores,
        np.asarray(model.types),
        bos_id=bos,
        stop_ids=[eos, *_declared_stops(folder, len(ids))],
        unknown_id=model.unknown_id,
        prefix=[bos] if config.get("add_bos_token", True) and bos is not None else [],
        suffix=[eos] if config.get("add_eos_token", False) and eos is not None else [],
        space_prefix=model.space_prefix,
        remove_extra_spaces=model.remove_extra_spaces,
        charsmap=model.charsmap,
    )
