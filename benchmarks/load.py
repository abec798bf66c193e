"""Puts load on any OpenAI-compatible server and says how it bears it.

    python benchmarks/load.py --url http://127.0.0.1:8000 --streams 16 --requests 64
    python benchmarks/load.py --url ... --rate 4 --requests 200 --input lognormal:200,0.8
    python benchmarks/load.py --url ... --burst 200 --slo-first 5 --slo-token 0.1 --json out.json

Requests come at given times whatever the server does (--rate), from clients that each wait for
their answer (--streams), or all at once (--burst). Answers are streamed. Times are taken when
bytes arrive: first token, the gaps between pieces of text, seconds a token, and the whole
answer, all from the moment a request was due. Exit code 1 where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from http_stream import Client, EventReader, Exchange, ExchangeError
from load_report import Objective, Outcome, Report, Round
from traffic import Call, Endpoint, Lengths, Prompts, Traffic, plan_calls

from sartor.errors import SartorError, UsageError

PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Logprobs(msgspec.Struct):
    tokens: list[str] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True)
class Target:
    """A server, and how it is asked. ``ignore_eos``: answers have the length that was asked for,
    on servers that know this parameter; ``more``: further fields of every body."""

    url: str
    model: str
    endpoint: Endpoint = "chat"
    ignore_eos: bool = True
    timeout: float = 600.0
    api_key: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def client(self) -> Client:
        return Client(self.url, _authorization(self.api_key))

    def body(self, call: Call) -> bytes:
        prompt: dict[str, Any] = {"prompt": call.prompt}
        if self.endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": call.prompt}]}
        body = {
            "model": self.model,
            **prompt,
            "max_tokens": call.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.more,
        }
        return msgspec.json.encode(body)


class Recorder:
    """Reads the events of one answer into its outcome."""

    def __init__(self, outcome: Outcome, leave_after: int | None) -> None:
        self.exchange: Exchange | None = None
        self._outcome, self._leave_after = outcome, leave_after
        self._events = EventReader()
        self._raw = b""
        self._closed = False
        self._tokens = 0  # that came since the last piece of text

    def on_body(self, status: int, body: bytes) -> None:
        now = time.perf_counter()
        if status != 200:
            self._raw += body
            return
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self._closed = True
            else:
                self._event(_decode(data), now)

    def check(self) -> None:
        """Sets the error of an answer that came, but was none."""
        outcome, exchange = self._outcome, self.exchange
        assert exchange is not None
        if outcome.left or outcome.error is not None:
            return
        if exchange.response.status != 200:
            outcome.error = f"status {exchange.response.status}"
        elif outcome.finish_reason is None or not self._closed:
            outcome.error = "answer without an end"

    def _event(self, event: _Event, now: float) -> None:
        outcome = self._outcome
        if event.error is not None:
            outcome.error = "error in the stream"
        if event.usage is not None:
            outcome.prompt_tokens = event.usage.prompt_tokens
            outcome.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            outcome.cached_tokens = (details and details.cached_tokens) or 0
        for choice in event.choices:
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            delta = choice.delta or _Delta()
            self._tokens += len((choice.logprobs and choice.logprobs.tokens) or ())
            if choice.text or delta.content or delta.reasoning_content:
                outcome.pieces.append(now)
                outcome.piece_tokens.append(self._tokens or 1)
                self._tokens = 0
                if len(outcome.pieces) == self._leave_after and self.exchange is not None:
                    outcome.left = True
                    self.exchange.leave()


async def send(
    client: Client,
    target: Target,
    body: bytes,
    call: Call,
    due: float,
    outcome: Outcome | None = None,
) -> Outcome:
    """One request to its end, however it ends. ``outcome``: where to note what comes, for those
    who look before."""
    outcome = outcome or Outcome(due, call.output_tokens)
    recorder = Recorder(outcome, call.leave_after)
    exchange = client.exchange("POST", PATHS[target.endpoint], body, recorder.on_body)
    recorder.exchange = exchange
    try:
        await client.run(exchange, target.timeout)
        recorder.check()
    except ExchangeError as error:
        outcome.error = error.kind
    outcome.end = time.perf_counter()
    return outcome


async def run_round(target: Target, calls: Sequence[Call], streams: int) -> Round:
    """All requests at their times, or from ``streams`` clients where they have none."""
    bodies = [target.body(call) for call in calls]
    client = target.client()
    work = iter(zip(calls, bodies, strict=True))
    started, used = time.perf_counter(), time.process_time()

    async def later(call: Call, body: bytes, due: float) -> Outcome:
        await asyncio.sleep(due - time.perf_counter())
        return await send(client, target, body, call, due)

    async def stream(work: Iterator[tuple[Call, bytes]]) -> list[Outcome]:
        return [await send(client, target, body, call, time.perf_counter()) for call, body in work]

    try:
        if streams:
            found = await asyncio.gather(*(stream(work) for _ in range(streams)))
            outcomes = [outcome for part in found for outcome in part]
        else:
            outcomes = await asyncio.gather(
                *(later(call, body, started + (call.at or 0.0)) for call, body in work)
            )
    finally:
        client.close()
    end = max(outcome.end for outcome in outcomes)
    begin = min(outcome.due for outcome in outcomes)
    return Round(end - begin, time.process_time() - used, outcomes)


def run(
    target: Target,
    traffic: Traffic,
    prompts: Prompts,
    *,
    rounds: int,
    warm_up: int,
    seed: int,
    as_ids: bool = False,
    objective: Objective | None = None,
) -> Report:
    """``warm_up`` requests from a few streams, then the rounds. ExchangeError: no server."""
    found = []
    if warm_up:
        first = dataclasses.replace(
            traffic, requests=warm_up, rate=0.0, burst=0, streams=min(warm_up, 4), leave=0.0
        )
        calls = plan_calls(first, prompts, [seed, 0], as_ids=as_ids, common_seed=seed)
        asyncio.run(run_round(target, calls, first.streams))
    for number in range(1, rounds + 1):
        calls = plan_calls(traffic, prompts, [seed, number], as_ids=as_ids, common_seed=seed)
        found.append(asyncio.run(run_round(target, calls, traffic.streams)))
    return Report(found, objective or Objective())


def first_model(url: str, api_key: str | None) -> str:
    """The first model that a server names. SartorError where there is none."""

    async def ask() -> tuple[int, bytes]:
        client = Client(url, _authorization(api_key))
        try:
            return await client.call("GET", "/v1/models")
        finally:
            client.close()

    try:
        _, body = asyncio.run(ask())
        return str(json.loads(body)["data"][0]["id"])
    except (ExchangeError, ValueError, LookupError) as error:
        raise SartorError(
            f"{url}/v1/models names no model ({error}); say it with --model"
        ) from None


def _authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


@dataclass(frozen=True)
class Options:
    target: Target
    traffic: Traffic
    tokenizer: Path | None
    as_ids: bool
    rounds: int
    warm_up: int
    seed: int
    objective: Objective
    json: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line; UsageError for values that mean nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="http://HOST:PORT, without /v1")
    add("--model", help="name; else the first that the server has")
    add("--endpoint", choices=tuple(PATHS), default="chat")
    add("--api-key")
    add("--rate", type=float, default=0.0, help="requests a second, Poisson arrivals")
    add("--streams", type=int, default=0, help="clients, each with one request at a time")
    add("--burst", type=int, default=0, help="requests at once")
    add("--requests", type=int, help="of one round (64, or those of the burst)")
    add("--input", default="128", help="tokens: 128, 64-512 or lognormal:128,0.8 (its median)")
    add("--output", default="64", help="tokens, likewise")
    add("--share", type=float, default=0.0, help="part of the requests with a shared prefix")
    add("--groups", type=int, default=1, help="of shared prefixes")
    add("--prefix", type=int, default=64, help="tokens of a shared prefix")
    add("--leave", type=float, default=0.0, help="part of the clients that go away")
    add("--leave-after", type=int, default=8, help="pieces of the answer before they go")
    add("--tokenizer", type=Path, help="model file whose tokenizer makes input lengths exact")
    add("--ids", action="store_true", help="prompts as token ids (completions, with --tokenizer)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    add("--warm-up", type=int, default=4, help="requests before, which do not count")
    add("--rounds", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600.0, help="seconds of one answer")
    add("--slo-first", type=float, default=float("inf"), help="seconds to the first token")
    add("--slo-token", type=float, default=float("inf"), help="mean seconds of the others")
    add("--json", type=Path, metavar="FILE", help="- for standard output, which has nothing else")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.warm_up < 0 or given.seed < 0:
        raise UsageError("rounds must be at least 1, warm-up and seed at least 0")
    if given.ids and (given.endpoint != "completions" or given.tokenizer is None):
        raise UsageError("--ids needs --endpoint completions and --tokenizer")
    traffic = Traffic(
        requests=given.burst or 64 if given.requests is None else given.requests,
        input=Lengths.parse(given.input),
        output=Lengths.parse(given.output),
        rate=given.rate,
        streams=given.streams,
        burst=given.burst,
        share=given.share,
        groups=given.groups,
        prefix=given.prefix,
        leave=given.leave,
        leave_after=given.leave_after,
    )
    model = given.model or first_model(given.url, given.api_key)
    return Options(
        Target(given.url, model, given.endpoint, given.ignore_eos, given.timeout, given.api_key),
        traffic,
        given.tokenizer,
        given.ids,
        given.rounds,
        given.warm_up,
        given.seed,
        Objective(given.slo_first, given.slo_token),
        given.json,
    )


def main() -> int:
    try:
        options = parse()
        prompts = Prompts.common()
        if options.tokenizer is not None:
            prompts = Prompts.of_model(options.tokenizer, options.target.endpoint)
        report = run(
            options.target,
            options.traffic,
            prompts,
            rounds=options.rounds,
            warm_up=options.warm_up,
            seed=options.seed,
            as_ids=options.as_ids,
            objective=options.objective,
        )
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(report.to_json_dict(), indent=1)
    if str(options.json) == "-":
        print(text)
    else:
        print("\n".join(report.lines()))
        if options.json is not None:
            options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if report.errors() else 0


if __name__ == "__main__":
    sys.exit(main())
