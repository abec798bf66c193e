"""What others feel of chats whose template takes all that it may: `pytest -s` shows the figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from server_process import ServerProcess
from tiny_model import write_tiny_model

TEMPLATES = {
    "time": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "memory": "{{ 'x'.ljust(200000000)|length }}{{ range(99999)|join('x' * 100000)|length }}",
    "output": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
}
STEP = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("templates")
    models = [write_tiny_model(folder / "good.gguf")]
    models += [
        write_tiny_model(folder / f"{kind}.gguf", template=template)
        for kind, template in TEMPLATES.items()
    ]
    with ServerProcess(models, device=f"null-{1000 * STEP:g}ms") as process:
        yield process


def gaps(server: ServerProcess, tokens: int) -> list[float]:
    """Seconds between the tokens of one stream; with log probabilities each has an event, also
    where it ends in the midst of a character."""
    body: dict[str, object] = {"model": "good.gguf", "prompt": "x", "max_tokens": tokens}
    body |= {"ignore_eos": True, "logprobs": 0}
    times = []
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return list(np.diff(times[1:]))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_others_hardly_notice(server: ServerProcess, kind: str) -> None:
    over = threading.Event()
    statuses: list[int] = []
    health: list[float] = []

    def chat() -> None:
        body = {"model": f"{kind}.gguf", "messages": [{"role": "user", "content": "x"}]}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set():
                answer = client.post("/v1/chat/completions", json=body)
                statuses.append(answer.status_code)
                assert "template" in answer.json()["error"]["message"]

    def look() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.wait(0.05):
                begin = time.perf_counter()
                assert client.get("/health").status_code == 200
                health.append(time.perf_counter() - begin)

    quiet = gaps(server, 150)
    threads = [threading.Thread(target=chat) for _ in range(3)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    busy = gaps(server, 300)
    over.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {400}
    before, after = (float(np.quantile(values, 0.99)) for values in (quiet, busy))
    print(
        f"\n{kind}: p99 between tokens {before * 1e3:.1f} -> {after * 1e3:.1f} ms: "
        f"{after / before:.2f}; /health median {np.median(health) * 1e3:.1f} ms, p99 "
        f"{np.quantile(health, 0.99) * 1e3:.1f} ms; {len(statuses)} chats"
    )
    # The goal is 1.2, as printed. The test allows what a busy machine adds, and no standstill.
    assert after < 1.2 * before + 0.05
    assert float(np.median(health)) < 0.05
