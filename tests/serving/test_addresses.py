"""Where a server listens: what is taken, what is refused, and how addresses are written."""

from __future__ import annotations

import contextlib
import socket
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess

from sartor.errors import SartorError, UsageError
from sartor.serving import addresses
from sartor.serving.addresses import bind, is_public, listen, url, urls


def has_ipv6() -> bool:
    try:
        bind("::1", 0).close()
    except SartorError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


@pytest.mark.parametrize("port", [-1, 65536, 70000, 2**32, 10**30])
def test_a_number_that_is_no_port(port: int) -> None:
    with pytest.raises(UsageError, match=f"port {port} is out of range"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["", "nowhere.invalid", "300.1.1.1", "a" * 300, "127.0.0.1:80"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(SartorError, match=r"cannot listen on host .*--host") as error:
        bind(host, 0)
    assert error.value.exit_code == 1
    assert "Errno" not in str(error.value)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(SartorError, match="Cannot assign requested address; choose another"):
        bind("192.0.2.1", 0)


def test_a_port_that_is_taken() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as first:
        # Nobody gets in before it listens, so that nobody waits for models to be loaded.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(first.getsockname())
        listen(first)
        socket.create_connection(first.getsockname()).close()
        with pytest.raises(SartorError, match="Address already in use; choose another"):
            bind("127.0.0.1", first.getsockname()[1])


def test_two_that_begin_at_once() -> None:
    first = bind("127.0.0.1", 0)
    with contextlib.closing(first):
        port = first.getsockname()[1]
        with contextlib.closing(bind("127.0.0.1", port)) as second:
            listen(first)
            with pytest.raises(SartorError, match=f"port {port}: Address already in use"):
                listen(second)


@ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    with contextlib.closing(bind(host, 0)) as sock:
        assert url(sock) == f"http://[::1]:{sock.getsockname()[1]}"
        assert urls(sock) == [url(sock)]
        assert not is_public(sock)


def test_every_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    address = namedtuple("address", "family address")
    found = {
        "lo": [address(socket.AF_INET, "127.0.0.1"), address(socket.AF_INET6, "::1")],
        "eth0": [address(socket.AF_INET, "192.0.2.7"), address(socket.AF_INET6, "2001:db8::7")],
        "eth1": [address(socket.AF_INET, "169.254.0.1"), address(socket.AF_INET6, "fe80::1%eth1")],
        "bridge": [address(socket.AF_INET, "192.0.2.7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    with contextlib.closing(bind("0.0.0.0", 0)) as sock:
        port = sock.getsockname()[1]
        assert urls(sock) == [f"http://127.0.0.1:{port}", f"http://192.0.2.7:{port}"]
        assert is_public(sock)
    if has_ipv6():
        with contextlib.closing(bind("::", 0)) as sock:
            port = sock.getsockname()[1]
            assert urls(sock) == [f"http://[::1]:{port}", f"http://[2001:db8::7]:{port}"]


def test_the_scope_of_an_address_is_encoded() -> None:
    assert addresses._url("fe80::1%eth0", 80) == "http://[fe80::1%25eth0]:80"


@ipv6
def test_a_server_on_ipv6(tiny_model: Path) -> None:
    with ServerProcess([tiny_model], host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert server.health().status_code == 200
