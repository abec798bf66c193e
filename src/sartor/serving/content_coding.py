"""Bodies that clients have packed: ``Content-Encoding`` (RFC 9110, section 8.4), undone within
bounds.

A few kilobytes can unfold to gigabytes, so what comes out is counted while it comes, and the work
is done in slices: the caller decides where each of them runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from sartor.serving.errors import ApiError, invalid

CODINGS = ("gzip", "deflate")
"""Those that are undone. zstd and br would each need a library, and few clients pack requests."""

SLICE_BYTES = 2**18
"""What one slice of the work unfolds at most: less than a millisecond."""

_ALIASES = {"x-gzip": "gzip"}
_MOST = 2
_MEMBERS = 1024
_WINDOW_BYTES = 2**16  # of the body at a time: what is left of it is copied at every turn
_GZIP, _ZLIB, _RAW = 31, 15, -15  # the window bits by which zlib names formats


def codings_of(headers: Iterable[str]) -> list[str]:
    """The codings of a body in the order in which they were applied, from the lines of its
    Content-Encoding. Raises ApiError 415 that names one which is not undone here."""
    named = [name.strip().lower() for line in headers for name in line.split(",")]
    codings = [_ALIASES.get(name, name) for name in named if name not in ("", "identity")]
    for coding in codings:
        if coding not in CODINGS:
            raise _refused(f"the content encoding {coding[:40]!r} is not supported")
    if len(codings) > _MOST:
        raise _refused(f"the body is packed {len(codings)} times over, and the limit is {_MOST}")
    return codings


def unfold(body: bytes, coding: str, limit: int) -> Iterator[bytes]:
    """What a body holds, in slices of up to :data:`SLICE_BYTES`.

    Raises ApiError 400 where it is damaged or incomplete, and 413 as soon as more than ``limit``
    bytes have come out.
    """
    count = 0
    for piece in _slices(body, coding):
        count += len(piece)
        if count > limit:
            raise ApiError(
                413,
                f"the body is larger than {limit} bytes once it is unpacked ({coding}), and that "
                "is the limit; send less",
                code="body_too_large",
            )
        yield piece


def _slices(body: bytes, coding: str) -> Iterator[bytes]:
    bits = _GZIP if coding == "gzip" else _ZLIB if _has_zlib_head(body) else _RAW
    place = 0
    for _ in range(_MEMBERS):
        decoder = zlib.decompressobj(bits)
        window = b""
        while not decoder.eof:
            if not window:
                window = body[place : place + _WINDOW_BYTES]
                place += len(window)
            try:
                piece = decoder.decompress(window, SLICE_BYTES)
            except zlib.error as error:
                reason = str(error).rpartition(": ")[2]  # without the number and the call
                raise invalid(
                    f"the body is not valid {coding}, which its Content-Encoding says it is: "
                    f"{reason}"
                ) from None
            if not window and not piece and not decoder.eof:
                raise invalid(f"the body ends in the middle of its {coding} data; send all of it")
            window = decoder.unconsumed_tail
            yield piece
        place -= len(decoder.unused_data)
        if place == len(body):
            return
        if coding != "gzip":  # a gzip file may have several members (RFC 1952, section 2.2)
            raise invalid(f"the body goes on after the end of its {coding} data")
    raise invalid(f"the body has more than {_MEMBERS} gzip members; send it as one")


def _has_zlib_head(body: bytes) -> bool:
    """Whether deflated data is in the format that RFC 9110 demands (RFC 1950); some clients send
    it bare (RFC 1951)."""
    return len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0


def _refused(problem: str) -> ApiError:
    accepted = ", ".join(CODINGS)
    return ApiError(
        415,
        f"{problem}; send the body as it is, or packed with {' or '.join(CODINGS)}",
        code="unsupported_encoding",
        accept_encoding=accepted,
    )
