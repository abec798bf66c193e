from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sartor.engine.request import Chunk, Request, TokenLogprob
from sartor.graph import SamplingParams
from sartor.plan import ExecutionPlan
from sartor.serving.channel import Receiver, Sender, socket_folder
from sartor.serving.messages import (
    Abort,
    Chunks,
    FromWorker,
    ModelSpec,
    Submit,
    ToWorker,
    WorkerConfig,
)

REQUEST = Request(
    "r",
    (1, 2),
    SamplingParams(n=2, stop=("a", "b"), logit_bias={3: -1.5}, stop_token_ids=(9,), logprobs=2),
    seed=2**63 - 1,
    emitted=((4,), ()),
)
LOGPROB = TokenLogprob(1, "\ufffd", b"\xff", -0.5, (TokenLogprob(2, "b", b"b", -1.0),))


@pytest.mark.parametrize("ipc", [True, False])
def test_messages_arrive_as_they_were_sent(ipc: bool) -> None:
    folder = socket_folder() if ipc else None
    receiver: Receiver[Any] = Receiver(folder, "key", ToWorker)
    sender: Sender[Any] = Sender(receiver.address, "key")
    stranger: Sender[Any] = Sender(receiver.address, "guess")
    messages = [Submit("m", REQUEST), Abort("m", "r")]
    stranger.send(Abort("m", "x"))
    for message in messages:
        sender.send(message)
    received: list[Any] = []
    while len(received) < 2:
        received += receiver.receive(2.0)
    received += receiver.receive(0.1)
    assert received == messages
    for end in (receiver, sender, stranger):
        end.close()
    if folder is not None:
        shutil.rmtree(folder)


def test_long_folders_fall_back_to_tcp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert socket_folder() is None
    assert not list(long.iterdir())


def test_chunks_and_configuration_survive_encoding() -> None:
    chunks = Chunks("m", [Chunk("r", 0, "é", (1,), (LOGPROB,), "stop", None, 2, 1, 0)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(chunks), type=FromWorker) == chunks
    plan = ExecutionPlan(backend="null", max_context=64)
    config = WorkerConfig((ModelSpec("m", "/m", plan),), "ipc://x", None, "k", 1.0)
    assert msgspec.json.decode(msgspec.json.encode(config), type=WorkerConfig) == config
