"""Clients that go away: what they held is free after one step of the engine at most."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_client import RawClient
from server_process import ServerProcess, wait_until

from sartor.engine.engine import Engine
from sartor.engine.request import Request
from sartor.graph import SamplingParams
from sartor.plan import ExecutionPlan
from sartor.serving.channel import Channel, connected_ends
from sartor.serving.hosting import host
from sartor.serving.idle import IdleTuning
from sartor.serving.messages import (
    Abort,
    Chunks,
    EngineStats,
    FromWorker,
    ModelSpec,
    Submit,
    ToWorker,
)
from sartor.serving.meter import Reporter
from sartor.serving.worker import Pulse, _turn


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    """100 ms a step of 32 tokens; one sequence runs, others wait."""
    plan = {"max_batch_tokens": 32, "max_sequences": 1}
    with ServerProcess([tiny_model], device="null-100ms", plan=plan) as server:
        yield server


def shown(server: ServerProcess, name: str) -> int:
    """The sum of a metric's samples; ``name`` is how their lines begin."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def held(server: ServerProcess) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(
        int(float(line.split()[-1]))
        for line in lines
        if line.startswith("sartor_state_blocks{") and 'state="held"' in line
    )


def ask(server: ServerProcess, prompt: str, *, stream: bool) -> RawClient:
    body = {"prompt": prompt, "stream": stream, "max_tokens": 900, "ignore_eos": True}
    return RawClient(server).post(json.dumps({"model": server.name, **body}).encode())


@pytest.mark.parametrize("when", ["streaming", "prefill", "whole answer"])
def test_whoever_leaves_frees_blocks(server: ServerProcess, when: str) -> None:
    wait_until(lambda: held(server) == 0 and shown(server, "sartor_requests_in_flight") == 0)
    steps_before = shown(server, "sartor_engine_step_seconds_count")
    # A prefill of 1,000 tokens is 32 steps; none of them is cached from another test.
    prompt = f"{when} " * (1000 // (len(when) + 1)) if when == "prefill" else when
    client = ask(server, prompt, stream=when == "streaming")
    if when == "streaming":
        while client.received.count(b"data:") < 5:
            client.received += client.socket.recv(65536)
    wait_until(lambda: held(server) > 0)
    client.socket.close()
    wait_until(lambda: held(server) == 0)
    assert shown(server, "sartor_requests_in_flight") == 0
    # It would have been 900 steps, or 32 before the first token.
    assert shown(server, "sartor_engine_step_seconds_count") - steps_before < 28


def test_whoever_leaves_the_queue_is_gone(server: ServerProcess) -> None:
    wait_until(lambda: held(server) == 0)
    first = ask(server, "first", stream=True)
    wait_until(lambda: held(server) > 0)
    second = ask(server, "second", stream=True)
    waiting = f'sartor_engine_sequences{{model="{server.name}",state="waiting"}}'
    wait_until(lambda: shown(server, waiting) == 1)
    second.socket.close()
    wait_until(lambda: shown(server, waiting) == 0)
    assert held(server) > 0, "the first one goes on"
    first.socket.close()
    wait_until(lambda: held(server) == 0)


@pytest.mark.parametrize("device", ["null-20ms", "null-async-20ms"])
@pytest.mark.parametrize("prompt", [10, 1500])
def test_an_abort_takes_one_step_at_most(tiny_model: Path, device: str, prompt: int) -> None:
    """Inside the worker's loop, step by step: ``prompt`` 1500 is left in the middle of it."""
    plan = ExecutionPlan(backend="null", device=device, max_batch_tokens=32, max_sequences=8)
    hosting = host([ModelSpec("m", str(tiny_model), plan)], None)
    engine = hosting.models["m"].engine
    assert isinstance(engine, Engine)
    ours, theirs = connected_ends()
    gateway: Channel[FromWorker, ToWorker] = Channel(ours, FromWorker)
    channel: Channel[ToWorker, FromWorker] = Channel(theirs, ToWorker)
    pulse = Pulse()
    at_abort: list[int] = []
    abort = engine.abort

    def abort_and_note(request_id: str) -> None:
        abort(request_id)
        at_abort.append(engine.records[-1].index)

    engine.abort = abort_and_note  # type: ignore[method-assign]
    reporter = Reporter({"m": engine}, channel.send)
    tuning = IdleTuning([engine.executable])
    loop = threading.Thread(target=_turn, args=(hosting, channel, pulse, tuning, reporter))
    loop.start()
    try:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        gateway.send(Submit("m", Request("a", tuple(i % 250 for i in range(prompt)), params, 1)))
        wait_until(lambda: len(engine.records) > 5)
        gateway.send(Abort("m", "a"))
        wait_until(lambda: not engine.has_work)
        chunks: list[str | None] = []
        stats: list[EngineStats] = []

        def rest() -> bool:
            for message in gateway.receive(0.1):
                if isinstance(message, Chunks):
                    chunks.extend(chunk.finish_reason for chunk in message.chunks)
                if isinstance(message, EngineStats):
                    stats.append(message)
            return "abort" in chunks and sum(use.held for use in stats[-1].states) == 0

        wait_until(rest)
    finally:
        pulse.stopping.set()
        loop.join(10)
        gateway.close()
        channel.close()
    assert (prompt > 1000) == (chunks == ["abort"]), "it was left where the test says"
    # Its step that was under way on an asynchronous device is the only one after it.
    assert engine.records[-1].index - at_abort[0] <= (1 if "async" in device else 0)
    assert sum(engine.blocks_held()) == 0
