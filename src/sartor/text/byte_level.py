"""Byte-level BPE on the ``tokenizers`` library."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sartor.errors import CapacityError, FormatError, SartorError
from sartor.text.sentencepiece import AddedPiece, Surroundings


class TokenizersEncoder:
    """Adapts a ``tokenizers.Tokenizer``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._stand_ins: dict[str, int] = {}
        self._texts: dict[tuple[Surroundings, bool], str] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids without bos and eos. CapacityError where the system gives the library no
        threads, SartorError where it fails otherwise."""
        with self._lock:
            return self._encode(text, parse_special)

    def added(self) -> Mapping[str, AddedPiece]:
        """The tokens that are matched in the text, by their spelling."""
        with self._lock:
            decoder = self._tokenizer.get_added_tokens_decoder()
        return {
            token.content: AddedPiece(
                i,
                token.special,
                Surroundings(token.lstrip, token.rstrip, token.single_word),
                token.normalized,
            )
            for i, token in decoder.items()
        }

    def normalizer(self) -> Callable[[str], str] | None:
        """What is done to a text before ``normalized`` tokens are looked for."""
        normalizer = self._tokenizer.normalizer
        return None if normalizer is None else normalizer.normalize_str

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Token ids of a text in parts: ids, of which negative ones stand for nothing, and plain
        text. Errors as those of ``encode``."""
        # One text for the library, so that it treats what is beside a token as it always does. The
        # tokens in it are ones of our own with a name that nobody knows, because its switch is for
        # all special tokens or none.
        added = self.added()
        pieces = {piece.id: piece for piece in added.values()}
        texts = {piece.id: text for text, piece in added.items()}
        with self._lock:
            while True:
                spelled = [
                    part if isinstance(part, str) else self._stand_in(pieces.get(part))
                    for part in parts
                ]
                own = frozenset(self._stand_ins.values())
                text = "".join(spelled)
                found = self._encode(text, parse_special=False)
                given = [part for part in parts if isinstance(part, int)]
                if sum(token in own for token in found) == len(given):
                    break
                # A normaliser keeps some from being read where they stand, and so it does with the
                # tokens that they stand for.
                read = self._read(text, own)
                end, kept = 0, []
                for part, its_text in zip(parts, spelled, strict=True):
                    begin, end = end, end + len(its_text)
                    is_read = isinstance(part, str) or any(a <= begin and end <= b for a, b in read)
                    kept.append(part if is_read else texts.get(int(part), ""))
                if kept == list(parts):
                    raise SartorError("the tokenizer reads more control tokens than there are")
                parts = kept
        order = iter(given)
        ids = [next(order) if token in own else token for token in found]
        return [token for token in ids if token >= 0]

    def _read(self, text: str, own: Collection[int]) -> list[tuple[int, int]]:
        """Where the tokens ``own`` stand in a text, in characters."""
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return [place for token, place in places if token in own]

    def _stand_in(self, piece: AddedPiece | None) -> str:
        """The text of a token that takes of the text around it what another one takes."""
        from tokenizers import AddedToken

        how, normalized = Surroundings(), False
        if piece is not None:
            how, normalized = piece.surroundings, piece.normalized
        text = self._texts.get((how, normalized))
        if text is None:
            text = f"<|{secrets.token_hex(12)}|>"
            token = AddedToken(
                text,
                special=False,
                normalized=normalized,
                lstrip=how.lstrip,
                rstrip=how.rstrip,
                single_word=how.single_word,
            )
            self._tokenizer.add_tokens([token])
            self._stand_ins[text] = self._tokenizer.token_to_id(text)
            self._texts[how, normalized] = text
        return text

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        # The library keeps this choice as state of the tokenizer, hence the lock.
        self._tokenizer.encode_special_tokens = not parse_special
        with on_texts():
            # As a batch: the library lets other threads run meanwhile, and finds no offsets.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids


@contextmanager
def on_texts() -> Iterator[None]:
    """SartorError where the library fails on a text, which it may do in ways that end a process."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise _explained(error) from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """FormatError where the library fails while a tokenizer is made of a file."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{path}: the tokenizer fails: {reason[:200]}; download the checkpoint again"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """What Rust calls a panic is no Exception in Python, and would end the process."""
    return type(error).__name__ == "PanicException"


def _explained(panic: BaseException) -> SartorError:
    reason = " ".join(str(panic).split())
    if "thread pool" in reason:
        return CapacityError(
            "the tokenizer's threads cannot be started; raise this process's limits on memory and "
            "threads (ulimit -v, ulimit -u)"
        )
    return SartorError(f"the tokenizer failed on this text: {reason[:200]}")


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of the GPT-2 alphabet stands for.

    Printable Latin-1 bytes are themselves; the other 68 take the code points from 256 on, in
    order (``bytes_to_unicode`` in GPT-2's ``encoder.py``).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def unspell(token: str) -> bytes:
    """The bytes of a token spelled in the GPT-2 alphabet; UTF-8 if it is not so spelled."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[c] for c in token])
    except KeyError:
        return token.encode("utf-8", "replace")
