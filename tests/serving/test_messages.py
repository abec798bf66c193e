from __future__ import annotations

import msgspec

from sartor.engine.request import Chunk, Request, TokenLogprob
from sartor.graph import SamplingParams
from sartor.plan import ExecutionPlan
from sartor.serving.messages import (
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


def test_messages_survive_encoding() -> None:
    submit = Submit("m", REQUEST)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=ToWorker) == submit
    chunks = Chunks("m", [Chunk("r", 0, "é", (1,), (LOGPROB,), "stop", None, 2, 1, 0)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(chunks), type=FromWorker) == chunks
    plan = ExecutionPlan(backend="null", max_context=64)
    config = WorkerConfig((ModelSpec("m", "/m", plan),), (7, b"\x00"), 1.0)
    assert msgspec.json.decode(msgspec.json.encode(config), type=WorkerConfig) == config
