"""Clients that people use beside the official one; each test needs its package."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess
from tiny_encoder import write_tiny_encoder

from sartor.serving.keys import ApiKey, add_key


@pytest.fixture(scope="module")
def keyed(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, str]]:
    folder = tmp_path_factory.mktemp("clients")
    token = add_key(folder / "keys.toml", lambda sha: ApiKey(name="a", sha256=sha))
    with ServerProcess(
        [tiny_model, write_tiny_encoder(folder / "bert")],
        backend="reference",
        device="reference",
        keys=str(folder / "keys.toml"),
    ) as server:
        yield server, token


class TestLangChain:
    @pytest.fixture
    def chat(self, keyed: tuple[ServerProcess, str]) -> Any:
        pytest.importorskip("langchain_openai")
        from langchain_openai import ChatOpenAI

        server, token = keyed
        return ChatOpenAI(
            base_url=f"{server.url}/v1",
            api_key=token,
            model=server.name,
            max_tokens=12,
            seed=1,
            temperature=0.5,
        )

    def test_messages(self, chat: Any) -> None:
        answer = chat.invoke([("system", "be brief"), ("human", "hello")])
        assert answer.content
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
        usage = answer.usage_metadata
        assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] > 0

    def test_a_stream_is_the_answer(self, chat: Any) -> None:
        whole = chat.invoke("hello").content
        chunks = list(chat.stream("hello"))
        assert "".join(chunk.content for chunk in chunks) == whole
        assert len(chunks) > 2

    def test_many_at_once(self, chat: Any) -> None:
        answers = asyncio.run(chat.abatch(["a", "b", "a"]))
        assert answers[0].content == answers[2].content

    def test_logprobs_and_stop(self, chat: Any) -> None:
        answer = chat.bind(logprobs=True, top_logprobs=2, stop=["e"]).invoke("hello")
        assert "e" not in answer.content
        assert answer.response_metadata["logprobs"]["content"]

    def test_a_wrong_key_is_an_error_of_the_client(self, chat: Any) -> None:
        import openai
        from langchain_openai import ChatOpenAI

        wrong = ChatOpenAI(base_url=chat.openai_api_base, api_key="no", model=chat.model_name)
        with pytest.raises(openai.AuthenticationError):
            wrong.invoke("hello")

    def test_embeddings(self, keyed: tuple[ServerProcess, str]) -> None:
        """Without ``check_embedding_ctx_length=False`` the client sends ids of OpenAI's own
        vocabulary, which mean other words to other models."""
        pytest.importorskip("langchain_openai")
        from langchain_openai import OpenAIEmbeddings

        server, token = keyed
        embeddings = OpenAIEmbeddings(
            base_url=f"{server.url}/v1",
            api_key=token,
            model=server.names[1],
            check_embedding_ctx_length=False,
        )
        first, second = embeddings.embed_documents(["the cat", "the dog"])
        assert embeddings.embed_query("the cat") == pytest.approx(first, abs=1e-5)
        assert first != second


class TestLiteLLM:
    @pytest.fixture
    def ask(self, keyed: tuple[ServerProcess, str], monkeypatch: pytest.MonkeyPatch) -> Any:
        # It would otherwise fetch a table of prices when it is imported.
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm = pytest.importorskip("litellm")
        server, token = keyed

        def ask(call: str = "completion", **more: Any) -> Any:
            return getattr(litellm, call)(
                **{"model": f"openai/{server.name}", "api_key": token, "max_retries": 0, **more},
                api_base=f"{server.url}/v1",
            )

        return ask

    MESSAGES = [{"role": "user", "content": "hello"}]  # noqa: RUF012

    def test_messages(self, ask: Any) -> None:
        answer = ask(messages=self.MESSAGES, max_tokens=8, seed=1)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens <= 8

    def test_a_stream_is_the_answer(self, ask: Any) -> None:
        body = {"messages": self.MESSAGES, "max_tokens": 12, "seed": 1}
        whole = ask(**body).choices[0].message.content
        chunks = ask(**body, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole

    def test_text_completion(self, ask: Any, keyed: tuple[ServerProcess, str]) -> None:
        model = f"text-completion-openai/{keyed[0].name}"
        answer = ask("text_completion", model=model, prompt="hello", max_tokens=4)
        assert answer.choices[0].text

    def test_embedding(self, ask: Any, keyed: tuple[ServerProcess, str]) -> None:
        answer = ask("embedding", model=f"openai/{keyed[0].names[1]}", input=["the cat"])
        assert len(answer.data[0]["embedding"]) == 32

    def test_errors_are_of_its_kinds(self, ask: Any) -> None:
        import litellm

        with pytest.raises(litellm.AuthenticationError):
            ask(messages=self.MESSAGES, api_key="no")
        with pytest.raises(litellm.NotFoundError):
            ask(messages=self.MESSAGES, model="openai/other")
        with pytest.raises(litellm.BadRequestError):
            ask(messages=self.MESSAGES, temperature=9)
        with pytest.raises(litellm.ContextWindowExceededError):
            ask(messages=[{"role": "user", "content": "x" * 5000}])
