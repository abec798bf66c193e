"""What one hostile key does to the first tokens of ten honest ones.

A server with eleven keys gets requests of ten of them at half of what it can do (measured first),
and in turns without and with an eleventh that sends the worst it may at full speed, from another
loopback address and a process of its own. Prints, for each kind of attack, the median and the 99th
percentile of the honest first tokens, their ratio to those without it, and what was refused.

    python benchmarks/hostile_key.py MODEL.gguf [--seconds 20] [--rounds 3] [--step-ms 20]

With ``--step-ms`` the null backend takes that time for a step, whatever is in it, so that what is
shown is the server's doing; 0 computes the model, beside which the attacker and the clients take
processor time of their own on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from load import Target, run_round
from load_report import Outcome
from traffic import Lengths, Prompts, Traffic, plan_calls

HONEST = 10
ATTACKER = "127.0.0.2"
_STREAMS = 16  # of clients that wait for their answers, to find what the server can do


def _body(model: str, **more: object) -> bytes:
    return json.dumps({"model": model, "max_tokens": 64, "ignore_eos": True, **more}).encode()


ATTACKS: dict[str, tuple[int, Callable[[str], bytes]]] = {
    "long answers": (64, lambda m: _body(m, prompt="x", max_tokens=1000, stream=True)),
    "long prompts": (16, lambda m: _body(m, prompt="some words " * 700, max_tokens=1)),
    "many prompts": (4, lambda m: _body(m, prompt=["some words"] * 200)),
    "choices": (4, lambda m: _body(m, prompt="x", n=64, logprobs=20, stream=True)),
    "8 MB refused": (
        16,
        lambda m: _body(m, prompt=[*["some words and more of them " * 280] * 1000, [10**9]]),
    ),
    "8 MB of one text": (16, lambda m: _body(m, prompt="word, " * 1_390_000)),
}
"""Connections at once, and the body that each sends again and again."""


@dataclass(frozen=True)
class Row:
    """First tokens in milliseconds of the honest keys, those without the attack first."""

    attack: str
    median: tuple[float, float]
    p99: tuple[float, float]
    refused: int
    answers: int
    statuses: dict[str, int]

    def line(self) -> str:
        ratio = self.p99[1] / self.p99[0]
        return (
            f"{self.attack:17} median {self.median[0]:6.1f} -> {self.median[1]:6.1f} ms, p99 "
            f"{self.p99[0]:6.1f} -> {self.p99[1]:6.1f} ms: {ratio:.2f}; {self.refused} of "
            f"{self.answers} not answered; attacker {self.statuses}"
        )


@contextlib.contextmanager
def server(model: Path, step_ms: float, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address, and the keys; the last one is the attacker's."""
    from sartor.serving.keys import ApiKey, add_key

    path = folder / "keys.toml"

    def add(name: str) -> str:
        return add_key(path, lambda sha256: ApiKey(name=name, sha256=sha256))

    keys = [add(f"key{i}") for i in range(HONEST + 1)]
    command = [sys.executable, "-m", "sartor.cli.main", "serve", str(model), "--port", "0"]
    command += ["--keys", str(path), "--no-tune"]
    if step_ms:
        command += ["--backend", "null", "--device", f"null-{step_ms:g}ms"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().partition("http://")[2].partition("/")[0]
            yield f"http://{url}", keys
        finally:
            process.terminate()


def attack(url: str, key: str, model: str, kind: str, stop: Event, found: object) -> None:
    """Sends the bodies of one kind until it shall stop; a process of its own."""
    connections, make = ATTACKS[kind]
    body = make(model)
    parts = urlsplit(url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    statuses: Counter[str] = Counter()

    def again_and_again() -> None:
        while not stop.is_set():
            status = "closed"
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.bind((ATTACKER, 0))
                sock.settimeout(5)
                sock.connect((parts.hostname, parts.port))
                with contextlib.suppress(ConnectionError):
                    sock.sendall(head + body)
                answer = sock.recv(65536)
                status = answer[9:12].decode() or status
                while answer and not stop.is_set():
                    answer = sock.recv(65536)
            statuses[status] += 1

    threads = [threading.Thread(target=again_and_again) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put(dict(statuses))  # type: ignore[attr-defined]


def honest(
    url: str, keys: Sequence[str], model: str, rate: float, seconds: float, seed: int
) -> list[Outcome]:
    """The outcomes of ten keys that ask ``rate`` times a second together."""
    traffic = Traffic(
        requests=max(1, round(rate * seconds / HONEST)),
        input=Lengths("uniform", 16, 64),
        output=Lengths("uniform", 8, 24),
        rate=rate / HONEST,
    )

    async def all_of_them() -> list[Outcome]:
        rounds = await asyncio.gather(
            *(
                run_round(
                    Target(url, model, endpoint="completions", api_key=key, timeout=60),
                    plan_calls(traffic, Prompts.common(), [seed, i]),
                    0,
                )
                for i, key in enumerate(keys)
            )
        )
        return [outcome for found in rounds for outcome in found.outcomes]

    return asyncio.run(all_of_them())


def capacity(url: str, key: str, model: str) -> float:
    """Requests a second where clients wait for their answers."""
    traffic = Traffic(
        requests=10 * _STREAMS,
        input=Lengths("uniform", 16, 64),
        output=Lengths("uniform", 8, 24),
        streams=_STREAMS,
    )
    target = Target(url, model, endpoint="completions", api_key=key)
    found = asyncio.run(run_round(target, plan_calls(traffic, Prompts.common(), [0]), _STREAMS))
    return traffic.requests / found.seconds


def measure(
    url: str, keys: list[str], model: str, kind: str, rate: float, seconds: float, rounds: int
) -> Row:
    """Rounds without and with one attack, in turns."""
    first: tuple[list[float], list[float]] = ([], [])
    refused = answers = 0
    statuses: Counter[str] = Counter()
    for number in range(rounds):
        for attacked in (False, True):
            context = multiprocessing.get_context("spawn")
            stop, queue = context.Event(), context.Queue()
            args = (url, keys[-1], model, kind, stop, queue)
            attacker = context.Process(target=attack, args=args)
            if attacked:
                attacker.start()
            outcomes = honest(url, keys[:-1], model, rate, seconds, number)
            if attacked:
                stop.set()
                statuses.update(queue.get())
                attacker.join()
                refused += sum(outcome.error is not None for outcome in outcomes)
                answers += len(outcomes)
            good = [o for o in outcomes if o.error is None and o.pieces]
            first[attacked].extend((o.pieces[0] - o.due) * 1e3 for o in good)
    quiet, busy = (np.array(times) for times in first)
    return Row(
        kind,
        (float(np.median(quiet)), float(np.median(busy))),
        (float(np.quantile(quiet, 0.99)), float(np.quantile(busy, 0.99))),
        refused,
        answers,
        dict(sorted(statuses.items())),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0, help="0 computes the model")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, with commas between")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(options.model, options.step_ms, Path(folder)) as (url, keys),
    ):
        model = str(options.model)
        rate = capacity(url, keys[0], model) / 2
        print(f"half of what it can do: {rate:.1f} requests a second of ten keys", flush=True)
        for kind in options.attacks.split(","):
            rows.append(measure(url, keys, model, kind, rate, options.seconds, options.rounds))
            print(rows[-1].line(), flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
