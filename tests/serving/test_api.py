"""The API as the official client sees it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from server_process import ServerProcess

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
# <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n, where "he" is one token
PROMPT_TOKENS = 1 + 5 + 4 + 1 + 1 + 1 + 10


@pytest.fixture(scope="module")
def client(api_server: ServerProcess) -> OpenAI:
    return api_server.client


def test_models(client: OpenAI, api_server: ServerProcess) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (api_server.name, "model")
    response = api_server.http.get(f"/v1/models/{api_server.name}")
    assert response.json()["id"] == api_server.name
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert error.value.code == "model_not_found"
    assert api_server.name in str(error.value)
    assert api_server.http.get("/v1/models/other").status_code == 404


def test_health(api_server: ServerProcess) -> None:
    assert api_server.health().json()["status"] == "ok"


def test_chat(client: OpenAI, api_server: ServerProcess) -> None:
    answer = client.chat.completions.create(
        model=api_server.name, messages=MESSAGES, max_tokens=10, seed=1
    )
    assert answer.object == "chat.completion"
    assert answer.model == api_server.name
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    assert answer.usage.completion_tokens == 10
    assert answer.usage.total_tokens == PROMPT_TOKENS + 10


def test_equal_seeds_give_equal_answers(client: OpenAI, api_server: ServerProcess) -> None:
    def ask(seed: int | None) -> str | None:
        answer = client.chat.completions.create(
            model=api_server.name, messages=MESSAGES, max_completion_tokens=20, seed=seed
        )
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert ask(7) != ask(8)
    assert ask(None) != ask(None)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_brings_what_a_whole_answer_brings(
    client: OpenAI, api_server: ServerProcess, n: int
) -> None:
    parameters: dict[str, Any] = {
        "model": api_server.name,
        "messages": MESSAGES,
        "max_tokens": 30,
        "seed": 3,
        "n": n,
        "stop": ["e", "Q"],
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**parameters)
    events = list(
        client.chat.completions.create(
            **parameters, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({event.id for event in events}) == 1
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert events[-1].usage == whole.usage
    assert events[-1].choices == []
    assert all(event.usage is None for event in events[:-1])
    for expected in whole.choices:
        own = [c for event in events for c in event.choices if c.index == expected.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == expected.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [expected.finish_reason]
        assert own[-1].finish_reason == expected.finish_reason
        assert expected.logprobs is not None
        assert [t for c in own if c.logprobs for t in c.logprobs.content or ()] == (
            expected.logprobs.content
        )


def test_stop_strings_are_cut_off(client: OpenAI, api_server: ServerProcess) -> None:
    def ask(**more: Any) -> Any:
        return client.completions.create(
            model=api_server.name,
            prompt="x",
            max_tokens=60,
            temperature=0,
            extra_body={"ignore_eos": True},
            **more,
        )

    full = ask().choices[0]
    stop = full.text[20:22]
    cut = ask(stop=stop)
    assert cut.choices[0].text == full.text[: full.text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 60


def test_stop_tokens_end_the_answer(client: OpenAI, api_server: ServerProcess) -> None:
    def ask(**extra: Any) -> Any:
        return client.completions.create(
            model=api_server.name,
            prompt="x",
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, **extra},
        )

    first = ask()
    assert first.usage.completion_tokens == 16, "the API's default"
    texts = first.choices[0].logprobs.tokens
    stop = next(text for text in texts if len(text) == 1 and text.isascii() and ord(text) > 32)
    stopped = ask(stop_token_ids=[ord(stop)])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == texts.index(stop) + 1


def test_logprobs_of_completions(client: OpenAI, api_server: ServerProcess) -> None:
    answer = client.completions.create(
        model=api_server.name, prompt="x", max_tokens=12, logprobs=3, seed=2
    )
    (choice,) = answer.choices
    chances = choice.logprobs
    assert chances is not None
    assert chances.tokens is not None
    assert len(chances.tokens) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert all(value <= 0 for value in chances.token_logprobs or ())
    # Alternatives and the chosen token, which may be one of them; equal texts count once.
    assert all(1 <= len(top) <= 4 for top in chances.top_logprobs or ())
    assert all(
        top[token] >= value
        for top, token, value in zip(
            chances.top_logprobs or (), chances.tokens, chances.token_logprobs or (), strict=True
        )
    )
    assert chances.text_offset is not None
    assert chances.text_offset == sorted(chances.text_offset)
    assert chances.text_offset[0] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_in_every_form(client: OpenAI, api_server: ServerProcess, stream: bool) -> None:
    def ask(prompt: Any, **more: Any) -> dict[int, str]:
        body = {"model": api_server.name, "prompt": prompt, "temperature": 0, "max_tokens": 6}
        answer = client.completions.create(**body, stream=stream, **more)
        texts: dict[int, str] = {}
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        return texts

    a, b = ask("a")[0], ask("b")[0]
    assert ask([97]) == {0: a}
    assert ask(["a", "b"]) == {0: a, 1: b}
    assert ask([[97], [98]]) == {0: a, 1: b}
    assert ask(["a", "b"], n=2) == {0: a, 1: a, 2: b, 3: b}
    assert ask(["a", [98]][:1], echo=True) == {0: "a" + a}
    assert ask([[97], [98]], echo=True) == {0: "a" + a, 1: "b" + b}


def test_parts_and_roles(client: OpenAI, api_server: ServerProcess) -> None:
    def tokens(*messages: Any) -> int:
        answer = client.chat.completions.create(
            model=api_server.name, messages=list(messages), max_tokens=1
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    parts = [{"type": "text", "text": "hello"}]
    assert tokens({"role": "user", "content": parts}) == PROMPT_TOKENS
    echoed = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None}
    assert tokens(*MESSAGES, echoed, *MESSAGES) > 2 * PROMPT_TOKENS - 12
    system = tokens({"role": "system", "content": "a"}, *MESSAGES)
    assert tokens({"role": "developer", "content": "a"}, *MESSAGES) == system


def test_documented_no_ops_change_nothing(client: OpenAI, api_server: ServerProcess) -> None:
    def ask(**more: Any) -> str | None:
        answer = client.chat.completions.create(
            model=api_server.name, messages=MESSAGES, max_tokens=8, seed=1, **more
        )
        return answer.choices[0].message.content

    assert ask() == ask(
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
    )


def test_the_wire_format_of_a_stream(api_server: ServerProcess) -> None:
    body = {"model": api_server.name, "messages": MESSAGES, "stream": True, "max_tokens": 4}
    response = api_server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    for block in blocks[:-2]:
        event = json.loads(block.removeprefix("data: "))
        assert "usage" not in event
        assert [c["index"] for c in event["choices"]] == [0]


def test_many_at_once(api_server: ServerProcess) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{api_server.url}/v1",
            api_key="x",
            http_client=httpx.AsyncClient(verify=False, timeout=20),
        ) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=api_server.name, messages=MESSAGES, seed=i % 4, max_tokens=10
                    )
                    for i in range(40)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(run())
    assert texts == texts[:4] * 10


def test_a_reader_that_stalls_is_cut_off(api_server: ServerProcess) -> None:
    host, port = api_server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": api_server.name,
            "prompt": "x",
            "n": 32,
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        time.sleep(10)  # a slow machine takes a while to fill the buffers between the two
        received = b""
        with_reset = False
        try:
            while piece := sock.recv(65536):
                received += piece
        except ConnectionResetError:
            with_reset = True
        assert with_reset or b"[DONE]" not in received
    answer = api_server.post("/v1/completions", {"model": api_server.name, "prompt": "x"})
    assert answer.status_code == 200
