"""Packed bodies: what comes out, what is refused, and that a bomb is cut off early."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import time
import zlib
from typing import Any

import httpx
import psutil
import pytest
from raw_client import RawClient
from server_process import ServerProcess

from sartor.serving.content_coding import CODINGS, SLICE_BYTES, codings_of, unfold
from sartor.serving.errors import ApiError

LIMIT = 2**20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": [gzip.compress, lambda d: gzip.compress(d[:7]) + gzip.compress(d[7:])],
    "deflate": [zlib.compress, raw_deflate],
}


def unpacked(body: bytes, coding: str, limit: int = LIMIT) -> bytes:
    return b"".join(unfold(body, coding, limit))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [0, 1, 9, SLICE_BYTES, SLICE_BYTES + 1, LIMIT])
def test_what_comes_out_is_what_went_in(coding: str, size: int) -> None:
    for data in (b"\0" * size, random.Random(size).randbytes(size)):
        for pack in PACKERS[coding]:
            slices = list(unfold(pack(data), coding, LIMIT))
            assert b"".join(slices) == data
            assert max(map(len, slices)) <= SLICE_BYTES


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_damaged_or_cut_short_is_a_400(coding: str) -> None:
    for pack in PACKERS[coding]:
        whole = pack(os.urandom(3000))
        broken = [whole[:end] for end in (0, 1, 5, len(whole) // 2, len(whole) - 1)]
        broken += [whole + b"x", b"{}", bz2.compress(b"{}"), whole[:-4] + b"\0\0\0\0"]
        if pack is raw_deflate:  # has no checksum
            broken.pop()
        for body in broken:
            with pytest.raises(ApiError) as error:
                unpacked(body, coding)
            assert error.value.status == 400
            assert coding in str(error.value)
            assert "Error -" not in str(error.value)


def test_a_bomb_is_cut_off_early() -> None:
    bomb = gzip.compress(bytes(2**28), 1)
    begin = time.process_time()
    with pytest.raises(ApiError) as error:
        unpacked(bomb, "gzip")
    assert (error.value.status, error.value.code) == (413, "body_too_large")
    assert str(LIMIT) in str(error.value)
    assert time.process_time() - begin < 0.1  # all of it takes a second
    assert len(unpacked(gzip.compress(bytes(LIMIT)), "gzip")) == LIMIT


def test_members_without_end_are_no_work_without_end() -> None:
    begin = time.process_time()
    with pytest.raises(ApiError, match="more than 1024 gzip members"):
        unpacked(gzip.compress(b"") * 400_000, "gzip")
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize(
    ("lines", "codings"),
    [
        ([], []),
        ([""], []),
        (["identity"], []),
        (["gzip"], ["gzip"]),
        (["X-GZIP"], ["gzip"]),
        ([" Deflate , identity,gzip"], ["deflate", "gzip"]),
        (["gzip", "deflate"], ["gzip", "deflate"]),
    ],
)
def test_codings_are_read_from_headers(lines: list[str], codings: list[str]) -> None:
    assert codings_of(lines) == codings


@pytest.mark.parametrize("name", ["br", "zstd", "compress", "aes128gcm", "gzip;q=1", "gzip br"])
def test_an_unknown_coding_is_named(name: str) -> None:
    for lines in ([name], ["gzip, " + name], ["gzip", name]):
        with pytest.raises(ApiError, match=name) as error:
            codings_of(lines)
        assert error.value.status == 415
        assert error.value.headers()["Accept-Encoding"] == "gzip, deflate"


def test_too_many_codings() -> None:
    with pytest.raises(ApiError, match="3 times over") as error:
        codings_of(["gzip, gzip, gzip"])
    assert error.value.status == 415


def ask(server: ServerProcess, body: bytes, coding: str) -> httpx.Response:
    return server.http.post(
        "/v1/completions",
        content=body,
        headers={"Content-Type": "application/json", "Content-Encoding": coding},
    )


def completion(server: ServerProcess, **more: Any) -> bytes:
    body = {"model": server.name, "prompt": "hello", "max_tokens": 4, "seed": 1, **more}
    return json.dumps(body).encode()


def test_packed_requests_are_answered_like_plain_ones(api_server: ServerProcess) -> None:
    body = completion(api_server)
    long = completion(api_server, metadata={"a": "b" * 200_000})  # by the intake's process
    plain = ask(api_server, body, "identity").json()["choices"]
    for packed, coding in (
        (gzip.compress(body), "gzip"),
        (gzip.compress(long), "x-gzip"),
        (zlib.compress(body), "deflate"),
        (raw_deflate(body), "deflate"),
        (gzip.compress(zlib.compress(body)), "deflate, gzip"),
        (body, "identity"),
        (body, ""),
    ):
        response = ask(api_server, packed, coding)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain, coding


def test_what_cannot_be_unpacked_is_told(api_server: ServerProcess) -> None:
    body = completion(api_server)
    for packed, coding, status in (
        (body, "br", 415),
        (body, "zstd", 415),
        (body, "gzip", 400),
        (gzip.compress(body)[:-5], "gzip", 400),
        (gzip.compress(b" " * 2**24), "gzip", 413),
        (gzip.compress(gzip.compress(bytes(2**28), 9), 9), "gzip, gzip", 413),
        (gzip.compress(b"{"), "gzip", 400),
    ):
        response = ask(api_server, packed, coding)
        assert response.status_code == status, response.text
        assert len(response.content) < 1000
        assert ("accept-encoding" in response.headers) == (status == 415)
    assert "'br'" in ask(api_server, body, "br").json()["error"]["message"]
    assert ask(api_server, gzip.compress(body), "gzip").status_code == 200


def test_a_packed_body_in_chunks_after_a_word(api_server: ServerProcess) -> None:
    packed = gzip.compress(completion(api_server))
    with RawClient(api_server) as client:
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Encoding: gzip\r\nExpect: 100-continue\r\n\r\n"
        )
        assert client.socket.recv(100).startswith(b"HTTP/1.1 100 ")
        for byte in packed:
            client.send(b"1\r\n%c\r\n" % byte)
        status, body = client.send(b"0\r\n\r\n").answer()
    assert (status, body["usage"]["completion_tokens"]) == (200, 4)


def test_bombs_take_no_memory(api_server: ServerProcess) -> None:
    bomb = gzip.compress(bytes(2**29), 9)
    assert len(bomb) < 2**20
    process = psutil.Process(api_server.process.pid)
    ask(api_server, bomb, "gzip")
    before = process.memory_info().rss
    for _ in range(8):
        assert ask(api_server, bomb, "gzip").status_code == 413
    assert process.memory_info().rss - before < 2**26
