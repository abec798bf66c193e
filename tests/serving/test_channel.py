"""Messages between two processes arrive whole and in order, whatever the other side does."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from sartor.serving.channel import Channel, End, Splitter, connected_ends, open_end
from sartor.serving.loop_channel import LoopChannel

Plain = Channel[str, str]
SEVERAL_BUFFERS = "x" * (5 << 20)


@pytest.fixture
def channels() -> Iterator[tuple[Plain, Plain]]:
    pair = tuple(Plain(end, str) for end in connected_ends())
    assert len(pair) == 2
    yield pair
    for channel in pair:
        channel.close()


def all_of(channel: Plain, count: int) -> list[str]:
    messages: list[str] = []
    end = time.monotonic() + 10
    while len(messages) < count and time.monotonic() < end:
        messages += channel.receive(0.1)
    return messages


def test_messages_go_both_ways_in_order(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    for i in range(100):
        one.send(f"to {i}")
        other.send(f"back {i}")
    assert other.receive(1.0) == [f"to {i}" for i in range(100)]
    assert one.receive(0.0) == [f"back {i}" for i in range(100)]
    assert one.receive(0.0) == []


def test_waiting_ends_when_something_comes(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    threading.Timer(0.1, one.send, ("now",)).start()
    begin = time.monotonic()
    assert other.receive(30.0) == ["now"]
    assert time.monotonic() - begin < 10


def test_sending_does_not_wait_for_the_reader(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    messages = [SEVERAL_BUFFERS, "", "last"]
    for message in messages:
        one.send(message)  # nobody reads: a blocking socket would stop here for good
    received: list[str] = []
    end = time.monotonic() + 10
    while len(received) < 3 and time.monotonic() < end:
        received += other.receive(0.0)
        one.receive(0.0)  # any call takes along what had no room
    assert received == messages


def test_several_threads_send(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    names = "abcd"

    def say(name: str) -> None:
        for i in range(200):
            one.send(f"{name} {i}")

    threads = [threading.Thread(target=say, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    received = all_of(other, 800)
    for thread in threads:
        thread.join()
    for name in names:
        assert [m for m in received if m[0] == name] == [f"{name} {i}" for i in range(200)]


def test_closing_lets_the_last_words_leave(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    one.send(SEVERAL_BUFFERS)
    one.send("last")
    closing = threading.Thread(target=one.close, args=(10.0,))
    closing.start()
    assert all_of(other, 2) == [SEVERAL_BUFFERS, "last"]
    closing.join()


def test_a_side_that_has_closed(channels: tuple[Plain, Plain]) -> None:
    one, other = channels
    one.send("before")
    one.close()
    for _ in range(3):
        other.send("nobody reads this")
    assert other.receive(1.0) == ["before"]
    begin = time.monotonic()
    assert other.receive(0.2) == []
    assert time.monotonic() - begin >= 0.19, "or a loop that waits here would spin"


def test_a_system_that_is_out_of_memory_tears_no_message(channels: tuple[Plain, Plain]) -> None:
    one, other = channels

    class Reluctant:
        """Takes three bytes, then none for a while."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.fileno, self.close = sock.fileno, sock.close
            self.calls = 0

        def send(self, data: bytes) -> int:
            self.calls += 1
            if self.calls < 4:
                if self.calls > 1:
                    raise OSError(errno.ENOBUFS, "no buffer space available")
                return self.sock.send(data[:3])
            return self.sock.send(data)

    one._end = End(one._end.incoming, Reluctant(one._end.outgoing))  # type: ignore[arg-type]
    for i in range(3):
        one.send(f"message {i}")
    one.receive(0.0)
    assert other.receive(1.0) == [f"message {i}" for i in range(3)]


def test_any_pieces_make_the_messages() -> None:
    here, there = connected_ends()
    sender: Channel[str, list[int]] = Channel(here, str)
    for i in range(5):
        sender.send(list(range(i)))
    data = there.incoming.recv(1 << 16)
    for size in (1, 3, 7, len(data)):
        splitter: Splitter[list[int]] = Splitter(list[int])
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert [m for piece in pieces for m in splitter.split(piece)] == [
            list(range(i)) for i in range(5)
        ]
    with pytest.raises(msgspec.ValidationError):
        Splitter[str](str).split(data)
    sender.close()
    there.close()


CHILD = """
import json, subprocess, sys
from sartor.serving.channel import Channel, open_end
channel = Channel(open_end(tuple(json.loads(sys.stdin.readline()))), str)
(message,) = channel.receive(10.0)
# A process that it starts must not keep the sockets open.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], close_fds=False,
                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for i in range(100):
    channel.send(f"{message} {i}")
channel.close(10.0)
"""


def start_child(end: End) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, pass_fds=end.descriptors()
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(end.tickets(child.pid)) + b"\n")
    child.stdin.close()
    end.close()
    return child


def test_the_end_of_a_process_is_seen_and_nothing_lost_before_it() -> None:
    async def scenario() -> tuple[list[str], Exception | None]:
        received: list[str] = []
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        here, there = connected_ends()
        channel: LoopChannel[str, str] = await LoopChannel.open(
            here, str, received.append, ended.set_result
        )
        child = start_child(there)
        channel.send("heard")
        assert child.wait(30) == 0  # the loop does not turn meanwhile
        for _ in range(3):
            channel.send("too late")  # what it said before must not be lost by this
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            error = await ended
        channel.close()
        channel.send("no error")
        return received, error

    received, error = asyncio.run(scenario())
    assert received == [f"heard {i}" for i in range(100)]
    assert error is None


def test_what_is_no_message_ends_the_reading() -> None:
    async def scenario() -> Exception | None:
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        here, there = connected_ends()
        channel: LoopChannel[str, str] = await LoopChannel.open(
            here, str, lambda _: None, ended.set_result
        )
        there.outgoing.sendall(b"\x01\0\0\0\xc0")
        async with asyncio.timeout(10):
            error = await ended
        channel.close()
        there.close()
        return error

    assert isinstance(asyncio.run(scenario()), msgspec.ValidationError)


def test_tickets_open_in_the_same_process() -> None:
    here, there = connected_ends()
    again = open_end(there.tickets(0))
    there.incoming.detach()
    there.outgoing.detach()
    one, other = Plain(here, str), Plain(again, str)
    one.send("x")
    assert other.receive(1.0) == ["x"]
    one.close()
    other.close()
