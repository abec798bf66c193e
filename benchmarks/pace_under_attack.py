"""The pace of a stream while other clients send the server the worst that they may.

The null backend takes a fixed time a step, so whatever the stream shows beyond that is the
server's own doing. Prints, for each kind of body, the time between two events of the stream.

    python benchmarks/pace_under_attack.py MODEL.gguf [--seconds 10] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

STEP_MS = 20
_COMMAND = [sys.executable, "-m", "sartor.cli.main", "serve"]


def _repeat(piece: str, size: int) -> str:
    return ",".join([piece] * (size // (len(piece) + 1)))


BODIES: dict[str, Callable[[str, int], str]] = {
    "one long string": lambda m, size: json.dumps({"model": m, "prompt": "word, " * (size // 6)}),
    "one letter": lambda m, size: json.dumps({"model": m, "prompt": "a" * size}),
    "token ids": lambda m, size: f'{{"model":"{m}","prompt":[{_repeat("1", size)}]}}',
    "numbers": lambda m, size: f'{{"model":"{m}","prompt":[{_repeat("1.5", size)}]}}',
    "many prompts": lambda m, size: f'{{"model":"{m}","prompt":[{_repeat(chr(34) * 2, size)}]}}',
    "stop strings": lambda m, size: (
        f'{{"model":"{m}","prompt":"a","stop":[{_repeat(chr(34) * 2, size)}]}}'
    ),
    "nested lists": lambda m, size: (
        f'{{"model":"{m}","prompt":"a","metadata":{{"a":[{_repeat("[]", size)}]}}}}'
    ),
    "depth": lambda m, size: f'{{"model":"{m}","prompt":{"[" * size}',
}


@dataclass(frozen=True)
class Pace:
    """Milliseconds between events; ``bodies`` that were answered meanwhile, with what."""

    body: str
    median: float
    p99: float
    longest: float
    bodies: int
    statuses: dict[str, int]


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, int]]:
    command = [*_COMMAND, model, "--port", "0", "--backend", "null", "--no-tune"]
    with subprocess.Popen(
        [*command, "--device", f"null-{STEP_MS}ms"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().partition("http://")[2].partition("/")[0]
            host, _, port = url.rpartition(":")
            yield host, int(port)
        finally:
            process.terminate()


def post(address: tuple[str, int], body: bytes) -> socket.socket:
    sock = socket.create_connection(address, 120)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    with contextlib.suppress(ConnectionError):
        sock.sendall(body)
    return sock


def attack(
    address: tuple[str, int], body: bytes, stop: threading.Event, statuses: list[str]
) -> None:
    while not stop.is_set():
        with post(address, body) as sock, contextlib.suppress(ConnectionError):
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
            statuses.append(answer[9:12].decode())


def pace(address: tuple[str, int], model: str, name: str, body: bytes, seconds: float) -> Pace:
    """Reads a stream for some seconds while two clients send bodies."""
    stop = threading.Event()
    statuses: list[str] = []
    attackers = [
        threading.Thread(target=attack, args=(address, body, stop, statuses))
        for _ in range(2 if body else 0)
    ]
    request = {"model": model, "prompt": "x", "stream": True, "ignore_eos": True}
    tokens = int(seconds * 1000 / STEP_MS)
    times = []
    with post(address, json.dumps({**request, "max_tokens": tokens}).encode()) as sock:
        sock.recv(65536)
        for attacker in attackers:
            attacker.start()
        while sock.recv(65536):
            times.append(time.perf_counter())
        stop.set()
    for attacker in attackers:
        attacker.join()
    gaps = np.diff(times) * 1000
    kinds = {status: statuses.count(status) for status in sorted(set(statuses))}
    return Pace(
        name,
        float(np.median(gaps)),
        float(np.quantile(gaps, 0.99)),
        float(gaps.max()),
        len(statuses),
        kinds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind of body")
    parser.add_argument("--bytes", type=int, default=8 * 2**20 - 1024, help="of each body")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = str(options.model)
    found = []
    with server(model) as address:
        for name, make in {"(none)": lambda *_: "", **BODIES}.items():
            body = make(model, options.bytes - len(model) - 64).encode()
            found.append(pace(address, model, name, body, options.seconds))
            if not options.json:
                row = found[-1]
                print(
                    f"{row.body:16} median {row.median:6.1f} ms, p99 {row.p99:6.1f} ms, longest "
                    f"{row.longest:6.1f} ms; {row.bodies} bodies answered {row.statuses or ''}",
                    flush=True,
                )
    if options.json:
        print(json.dumps([asdict(row) for row in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
