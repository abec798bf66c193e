"""Bytes of HTTP and of events, however they are cut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
from http_stream import Client, EventReader, Exchange, ExchangeError, ResponseReader
from hypothesis import given
from hypothesis import strategies as st

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\nabcd\r\n1;why=not\r\n\r\r\n6\r\nhij\r\nk\r\n0\r\nTrailer: x\r\n\r\n"
)
SIZED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 5\r\nConnection: close\r\n\r\nhello"
OPEN = b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nhello"


def cut(data: bytes, places: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted(place % len(data) for place in places), len(data)]
    for begin, end in itertools.pairwise(edges):
        yield data[begin:end]


@given(st.lists(st.integers(0, 500), max_size=8))
def test_a_chunked_body_is_found_wherever_it_is_cut(places: list[int]) -> None:
    reader = ResponseReader()
    assert b"".join(reader.feed(part) for part in cut(CHUNKED, places)) == b"abcd\rhij\r\nk"
    assert reader.done
    assert reader.status == 200
    assert reader.keeps_alive


@given(st.lists(st.integers(0, 500), max_size=8))
def test_a_sized_body_is_found_wherever_it_is_cut(places: list[int]) -> None:
    reader = ResponseReader()
    assert b"".join(reader.feed(part) for part in cut(SIZED, places)) == b"hello"
    assert reader.done
    assert reader.status == 429
    assert not reader.keeps_alive


def test_a_body_may_end_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(OPEN) == b"hello"
    assert not reader.done
    reader.end()
    assert reader.done
    assert not reader.keeps_alive


def test_a_chunked_body_that_stops_is_not_done() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED[:-3])
    reader.end()
    assert not reader.done


def test_what_is_no_http_is_an_error() -> None:
    with pytest.raises(ValueError, match="SSH-2"):
        ResponseReader().feed(b"SSH-2.0-OpenSSH\r\n\r\n")


@given(st.lists(st.integers(0, 500), max_size=8))
def test_events_are_found_wherever_they_are_cut(places: list[int]) -> None:
    body = b': keep-alive\n\ndata: {"a":1}\n\nevent: x\r\ndata:two\r\ndata:  lines\r\n\r\ndata: [DONE]\n\n'
    reader = EventReader()
    found = [event for part in cut(body, places) for event in reader.feed(part)]
    assert found == [b'{"a":1}', b"two\n lines", b"[DONE]"]


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_server(handler: Handler, work: Callable[[Client], Awaitable[None]]) -> None:
    """Runs ``work`` beside a server on a free port."""

    async def run() -> None:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}/api")
        try:
            await work(client)
        finally:
            client.close()
            server.close()

    asyncio.run(run())


def test_connections_are_used_again_and_a_stale_one_is_replaced() -> None:
    connections: list[int] = []
    heads: list[bytes] = []

    async def two_answers_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        for _ in range(2):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        # The third request on this connection gets no answer: it was closed when idle.
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def work(client: Client) -> None:
        for _ in range(5):
            assert await client.call("GET", "/x") == (200, b"ok")

    with_server(two_answers_each, work)
    assert len(connections) == 3
    assert heads[0].startswith(b"GET /api/x HTTP/1.1\r\nHost: 127.0.0.1:")


def test_a_broken_answer_is_an_error_of_its_kind() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhalf")
        writer.close()

    async def work(client: Client) -> None:
        with pytest.raises(ExchangeError) as caught:
            await client.call("GET", "/")
        assert caught.value.kind == "connection closed"

    with_server(half, work)


def test_silence_is_a_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def work(client: Client) -> None:
        with pytest.raises(ExchangeError) as caught:
            await client.call("GET", "/", timeout=0.05)
        assert caught.value.kind == "timeout"

    with_server(silent, work)


def test_a_client_that_leaves_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async def work(client: Client) -> None:
        parts: list[bytes] = []

        def on_body(status: int, body: bytes) -> None:
            parts.append(body)
            exchange.leave()

        exchange: Exchange = client.exchange("GET", "/", b"", on_body)
        await client.run(exchange, 10)
        assert parts == [b"one"]
        await asyncio.wait_for(gone.wait(), 10)

    with_server(endless, work)


def test_nobody_there_is_an_error_of_its_kind() -> None:
    async def work() -> None:
        with pytest.raises(ExchangeError) as caught:
            await Client("http://127.0.0.1:1").call("GET", "/")
        assert caught.value.kind == "no connection"

    asyncio.run(work())
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Client("https://example.org")
