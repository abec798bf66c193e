"""/v1/embeddings as the official client sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from server_process import ServerProcess, kill_hard
from tiny_encoder import CONTEXT, HIDDEN, write_tiny_encoder

from sartor.engine.llm import LLM

TEXTS = ["the cat sat on the mat", "the dogs ran", "cat"]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "bert")
    with ServerProcess([folder, tiny_model], backend="reference", device="reference") as server:
        yield server


def _vectors(server: ServerProcess, texts: Any, **options: Any) -> np.ndarray:
    answer = server.client.embeddings.create(model=server.names[0], input=texts, **options)
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return np.array([entry.embedding for entry in answer.data], np.float32)


def test_vectors_of_several_texts(server: ServerProcess) -> None:
    answer = server.client.embeddings.create(
        model=server.names[0], input=TEXTS, encoding_format="float"
    )
    assert answer.model == server.names[0]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8 + 6 + 3
    vectors = np.array([entry.embedding for entry in answer.data], np.float32)
    assert vectors.shape == (3, HIDDEN)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors @ vectors.T)[0, 1] < 0.9999  # one layer of random weights


def test_the_client_asks_for_base64_by_itself_and_gets_the_same(server: ServerProcess) -> None:
    for text in TEXTS:
        plain = _vectors(server, text, encoding_format="float")
        assert np.array_equal(_vectors(server, text), plain)


def test_a_text_alone_and_as_token_ids(server: ServerProcess) -> None:
    whole = _vectors(server, TEXTS)
    np.testing.assert_allclose(_vectors(server, TEXTS[2])[0], whole[2], atol=1e-6)
    np.testing.assert_allclose(_vectors(server, [2, 5, 3])[0], whole[2], atol=1e-6)
    np.testing.assert_allclose(_vectors(server, [[2, 5, 3], [2, 4, 3]])[0], whole[2], atol=1e-6)


def test_bad_requests_name_what_is_wrong(server: ServerProcess) -> None:
    for body, words in (
        ({"input": []}, "the list is empty"),
        (
            {"input": "cat " * CONTEXT},
            f"the text has {CONTEXT + 2} tokens, but this model's maximum context length is {CONTEXT} "
            "tokens (the positions that it has); shorten the text",
        ),
        ({"input": [2, 999, 3]}, "999 is not a token id"),
        ({"input": "cat", "dimensions": HIDDEN + 1}, f"this model's vectors have {HIDDEN}"),
        ({"input": "cat", "dimensions": 0}, "dimensions"),
        ({"input": "cat", "prompt_name": "passage"}, "prompt_name 'passage' is unknown"),
        ({"input": [2, 5, 3], "prompt_name": "query"}, "token ids take none"),
        ({"input": "cat", "encoding_format": "int8"}, "encoding_format"),
        ({"input": {"text": "cat"}}, "input must be"),
        ({"input": "cat", "truncate": True}, "'truncate' is unknown"),
        ({}, "'input' is missing"),
    ):
        response = server.http.post("/v1/embeddings", json={"model": server.names[0], **body})
        assert response.status_code == 400, body
        assert words in response.json()["error"]["message"]


def test_dimensions_are_the_first_numbers(server: ServerProcess) -> None:
    whole = _vectors(server, TEXTS)
    for count in (1, 8, HIDDEN):
        assert np.array_equal(_vectors(server, TEXTS, dimensions=count), whole[:, :count])
        plain = _vectors(server, TEXTS, dimensions=count, encoding_format="float")
        assert np.array_equal(plain, whole[:, :count])


def test_what_a_folder_states_holds_here_too(tmp_path: Path) -> None:
    """Prompts, their place in the pooling, dimensions and lengths, as LLM.embed has them."""
    folder = write_tiny_encoder(tmp_path / "stated")
    for name, values in (
        (
            "1_Pooling/config.json",
            {"pooling_mode": ["mean", "weightedmean"], "include_prompt": False},
        ),
        ("sentence_bert_config.json", {"max_seq_length": 12}),
        (
            "config_sentence_transformers.json",
            {
                "prompts": {"query": "the dog ", "on": "on "},
                "default_prompt_name": "on",
                "truncate_dim": 40,
            },
        ),
    ):
        (folder / name).write_text(json.dumps(values))
    plan: dict[str, Any] = {"backend": "reference", "device": "reference"}
    with LLM(folder, **plan) as llm, ServerProcess([folder], **plan) as server:
        for options in ({}, {"prompt_name": "query"}, {"prompt_name": "document"}):
            found = _vectors(server, TEXTS, extra_body=options)
            assert found.shape == (len(TEXTS), 40)
            np.testing.assert_allclose(found, llm.embed(TEXTS, **options), atol=1e-6)
        assert _vectors(server, TEXTS, dimensions=64).shape == (len(TEXTS), 64)
        np.testing.assert_allclose(_vectors(server, [[2, 5, 3]]), llm.embed([[2, 5, 3]]), atol=1e-6)
        body = {"model": server.name, "input": "cat " * 12}
        message = server.http.post("/v1/embeddings", json=body).json()["error"]["message"]
        assert "maximum context length is 12 tokens (max_seq_length of sentence_bert_c" in message


def test_each_model_at_its_own_route(server: ServerProcess) -> None:
    encoder, writer = server.names
    with pytest.raises(openai.BadRequestError, match=r"makes text, not embeddings.*v1/chat"):
        server.client.embeddings.create(model=writer, input="cat")
    with pytest.raises(openai.BadRequestError, match=r"makes embeddings, not text.*v1/embeddings"):
        server.client.completions.create(model=encoder, prompt="cat")
    cards = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
    assert cards[encoder]["makes"] == "embeddings"
    assert cards[writer]["makes"] == "text"


def test_a_longest_text_fits(server: ServerProcess) -> None:
    assert _vectors(server, "cat " * (CONTEXT - 2)).shape == (1, HIDDEN)


def test_a_killed_worker_loses_no_text(server: ServerProcess) -> None:
    # One by one: the last bits of several depend on which of them were computed together.
    before = [_vectors(server, text) for text in TEXTS]
    kill_hard(server.worker())
    several = _vectors(server, TEXTS)
    np.testing.assert_allclose(several, np.concatenate(before), atol=1e-6)
    kill_hard(server.worker())
    assert np.array_equal([_vectors(server, text) for text in TEXTS], before)
