"""Clients that ask for much and read nothing: they cost little, and not for long."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from reading import Reading
from server_process import ServerProcess, wait_until
from test_leaving import held, shown

READERS = 24


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess([tiny_model], device="null-4ms", timing={"stall": 1.0}) as server:
        yield server


def test_readers_that_read_nothing_are_cut_off(server: ServerProcess) -> None:
    """Each answer has 4 x 2,000 tokens, which make 1.5 MB of events."""
    assert Reading(server, prompt="warm up").whole()[1] == 40
    gateway = psutil.Process(server.process.pid)
    before = gateway.memory_info().rss
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": server.name,
            "prompt": "x",
            "n": 4,
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    most = before
    with contextlib.ExitStack() as stack:
        for _ in range(READERS):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(head.encode() + body)
        wait_until(lambda: held(server) > 0)
        # Whoever reads is served all the while, to the end.
        assert Reading(server, prompt="reads", max_tokens=100).whole()[1] == 100

        def cut_off() -> bool:
            nonlocal most
            most = max(most, gateway.memory_info().rss)
            return not shown(server, "sartor_requests_in_flight")

        wait_until(cut_off, 60)
        wait_until(lambda: held(server) == 0)
        ends = [
            line
            for line in server.http.get("/metrics").text.splitlines()
            if line.startswith("sartor_requests_total") and 'outcome="abort"' in line
        ]
        assert sum(float(line.split()[-1]) for line in ends) == READERS
    assert most - before < READERS << 20, "less than 1 MiB a reader"
