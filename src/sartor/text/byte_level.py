"""Byte-level BPE on the ``tokenizers`` library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sartor.errors import CapacityError, FormatError, SartorError


class TokenizersEncoder:
    """Adapts a ``tokenizers.Tokenizer``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids without bos and eos. CapacityError where the system gives the library no
        threads, SartorError where it fails otherwise."""
        # The library keeps this choice as state of the tokenizer, hence the lock.
        with self._lock:
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
