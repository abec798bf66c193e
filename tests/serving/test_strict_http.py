"""Requests that two readers could understand in two ways are refused, and their connection closed."""

from __future__ import annotations

import json

import pytest
from raw_client import RawClient
from server_process import ServerProcess

NEXT = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "Content-Length beside Transfer-Encoding",
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: localhost\r\n"
            b"content-length: 5\r\n\r\n0\r\n\r\n",
            "Content-Length beside Transfer-Encoding",
        ),
        (
            b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\n",
            "Transfer-Encoding in HTTP/1.0",
        ),
        (b"GET /health HTTP/1.1\nHost: localhost\n\n", "ends with LF"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", "ends with LF"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n", "ends with LF"),
        (b"\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", "ends with LF"),
    ],
)
def test_two_meanings(api_server: ServerProcess, request_bytes: bytes, reason: str) -> None:
    with RawClient(api_server) as client:
        client.send(request_bytes + NEXT)
        received = client.read_to_end()
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    assert reason in json.loads(body)["error"]["message"], "one answer, and nothing behind it"


def test_a_line_end_that_comes_in_two_pieces_is_one(api_server: ServerProcess) -> None:
    with RawClient(api_server) as client:
        for piece in (b"GET /health HTTP/1.1\r", b"\nHost: localhost\r", b"\n\r", b"\n"):
            client.send(piece)
        assert client.answer()[0] == 200
        assert client.send(NEXT).answer()[0] == 200


def test_line_ends_of_a_body_are_its_own(api_server: ServerProcess) -> None:
    body = json.dumps({"model": api_server.name, "prompt": "x", "max_tokens": 1}, indent=1).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    with RawClient(api_server) as client:
        assert client.send((head + body) * 2).answer()[0] == 200
        assert client.answer()[0] == 200
