"""Targets in every form, HEAD, and help where there is nothing at a path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from raw_client import RawClient
from server_process import ServerProcess

from sartor.serving.targets import nearest, not_found, printable, take_target

PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
]


def answer(server: ServerProcess, request: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and all bytes after them, read until the server closes."""
    with RawClient(server) as client:
        client.send(f"{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, rest = client.read_to_end().partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines[1:])}
    return int(lines[0].split()[1]), fields, rest


@pytest.mark.parametrize(
    "path",
    ["/health", "/v1/models", "/v1/models/{model}", "/openapi.json", "/metrics", "/nowhere", "/v1"],
)
def test_head_is_get_without_the_body(api_server: ServerProcess, path: str) -> None:
    path = path.replace("{model}", api_server.name)
    status, fields, body = answer(api_server, f"GET {path}")
    head_status, head_fields, nothing = answer(api_server, f"HEAD {path}")
    assert nothing == b""
    assert head_status == status
    assert head_fields.keys() == fields.keys()
    assert int(fields["content-length"]) == len(body) > 0
    for name in fields.keys() - {"date", "x-request-id"}:
        if path != "/metrics" or name != "content-length":  # its numbers change in between
            assert head_fields[name] == fields[name], name


def test_a_connection_goes_on_after_head(api_server: ServerProcess) -> None:
    with RawClient(api_server) as client:
        client.send(
            b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        client.socket.settimeout(5)
        while b'"ok"' not in client.received:
            client.received += client.socket.recv(65536)
        assert client.received.count(b"HTTP/1.1 200 OK") == 2
        assert b'"list"' not in client.received


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://other/health", 200),
        ("http://localhost:8000/v1/models?x=1", 200),
        ("http://other:8000/v1/models?x=1", 421),
        ("HTTP://127.0.0.1/health", 200),
        ("http://[::1]:80/health", 200),
        ("http://localhost/v1/models/", 200),
        ("http://localhost/nowhere", 404),
        ("http://other/nowhere", 421),
        ("http://localhost", 404),
        ("http://other", 421),
        ("http://localhost?x", 404),
        ("http://other?x", 421),
        ("https://other/health", 421),
        ("ftp://other/health", 400),
        ("http:///health", 400),
        ("http://user@other/health", 400),
        ("*", 404),
        ("other", 404),
    ],
)
def test_absolute_targets(api_server: ServerProcess, target: str, status: int) -> None:
    found, _, body = answer(api_server, f"GET {target}")
    assert found == status, body
    if status >= 400:
        assert json.loads(body)["error"]["message"]


def test_an_absolute_target_takes_a_body(api_server: ServerProcess) -> None:
    body = json.dumps({"model": api_server.name, "prompt": "x", "max_tokens": 2}).encode()
    with RawClient(api_server) as client:
        status, found = client.post(body, "http://localhost/v1/completions").answer()
    assert (status, found["usage"]["completion_tokens"]) == (200, 2)


def test_the_host_of_the_target_counts() -> None:
    scope: dict[str, Any] = {
        "method": "GET",
        "path": "http://real:1/a b",
        "raw_path": b"http://real:1/a%20b",
        "headers": [(b"host", b"other"), (b"x", b"y")],
    }
    assert take_target(scope, ()) is None
    assert (scope["path"], scope["raw_path"]) == ("/a b", b"/a%20b")
    assert scope["headers"] == [(b"host", b"real:1"), (b"x", b"y")]


@pytest.mark.parametrize("target", ["*", "http://localhost"])
def test_options_of_the_whole_server(api_server: ServerProcess, target: str) -> None:
    status, fields, body = answer(api_server, f"OPTIONS {target}")
    assert (status, body) == (204, b"")
    assert fields["allow"] == "GET, HEAD, OPTIONS, POST"


def test_a_slash_at_the_end_changes_nothing(api_server: ServerProcess) -> None:
    body = {"model": api_server.name, "prompt": "x", "max_tokens": 1}
    response = api_server.http.post("/v1/completions/", json=body, follow_redirects=False)
    assert response.status_code == 200
    assert api_server.http.get("/v1/models/").json()["object"] == "list"
    assert api_server.http.get("/health/").status_code == 200
    assert api_server.http.get(f"/v1/models/{api_server.name}/").status_code == 404


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/chat/completions/x", "/v1/chat/completions"),
        ("/v1/chat_completions", "/v1/chat/completions"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v1//models", "/v1/models"),
        ("//v1/models/", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("/v1/v1/v1/embeddings", "/v1/embeddings"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/embeddings/", "/v1/embeddings"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/healthz", "/health"),
        ("/v1/health", "/health"),
        ("/", ""),
        ("/v1", ""),
        ("/api/generate", ""),
        ("/favicon.ico", ""),
        ("/" + "a" * 10**6, ""),
    ],
)
def test_what_a_path_was_meant_to_be(path: str, near: str) -> None:
    assert nearest(path, PATHS) == near
    error = not_found(path, PATHS, near)
    assert error.status == 404
    assert len(error.message) < 500
    assert printable(path) in error.message
    if near:
        assert near in error.message
    else:
        assert all(known in error.message for known in PATHS)


def test_common_mistakes_are_named(api_server: ServerProcess) -> None:
    for path, says in (
        ("/v1/v1/models", "twice"),
        ("/chat/completions", "must end in /v1"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/api/tags", "/v1/models"),
    ):
        response = api_server.http.post(path, json={})
        assert response.status_code == 404
        message = response.json()["error"]["message"]
        assert path in message
        assert says in message


def test_what_is_shown_of_a_path_does_no_more_than_show() -> None:
    assert printable("/a\x1b[31m\n\u202e") == "/a\\x1b[31m\\n\\u202e"
    assert printable("/" + "é" * 500) == "/" + "é" * 119 + "..."
