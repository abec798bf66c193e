"""The API's description, read by schemathesis: requests that it allows and requests that it does
not, while other clients read streams, which must not notice.

``SARTOR_FUZZ_CASES=10000`` sends more of them.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from server_process import ServerProcess
from tiny_adapter import write_tiny_adapter
from tiny_encoder import write_tiny_encoder

from sartor.serving.keys import ApiKey, add_key

CASES = int(os.environ.get("SARTOR_FUZZ_CASES", "300"))
LIMITS = {"choices": 3, "prompts": 3, "sequences": 6, "max_tokens": 24, "body_seconds": 5.0}

# Operations, and what part of the cases each gets. Those without anything to vary get one.
SHARES = {
    ("post", "/v1/chat/completions"): 0.2,
    ("post", "/v1/completions"): 0.2,
    ("post", "/v1/embeddings"): 0.04,
    ("post", "/v1/load_lora_adapter"): 0.02,
    ("post", "/v1/unload_lora_adapter"): 0.02,
    ("get", "/v1/models/{name}"): 0.02,
    ("get", "/v1/models"): 0,
    ("get", "/health"): 0,
}
VARIED = [key for key in SHARES if key[0] == "post"]

# What no schema says: how values of one request, or values and the model, go together.
SEMANTIC = re.compile(
    r"only allowed where|is not a token id|has no tokens|is the limit|lone surrogate"
    r"|this model.s prompts are|token ids take none"
    r"|differs from max_completion_tokens|log probabilities of the prompt|cannot be set here"
    r"|context length|this model's vectors have|is no folder|is in use|is being loaded"
    r"|prompts with n|several models"
    # In lists of ids, 1.0 is not taken for 1: looking at each would cost long prompts dearly.
    r"|^(prompt|input) must be a string|^stop_token_ids\[\d+\] is \S+: input should be a valid integer"
)


def in_vocabulary(schema: Any, size: int, ids: bool = False) -> None:
    """Gives lists of token ids, wherever they are in a schema, the range of a vocabulary."""
    if isinstance(schema, dict):
        if ids and schema.get("type") == "integer":
            schema |= {"minimum": 0, "maximum": size - 1}
        for name, part in schema.items():
            in_vocabulary(part, size, name == "items")
    elif isinstance(schema, list):
        for part in schema:
            in_vocabulary(part, size)


class Fuzzed:
    def __init__(self, server: ServerProcess, token: str) -> None:
        self.server = server
        self.headers = {"Authorization": f"Bearer {token}"}
        description = httpx.get(
            f"{server.url}/openapi.json", headers=self.headers, verify=False
        ).json()
        self.paths: dict[str, Any] = description["paths"]
        text, vectors = server.names
        for kind, name in (
            ("ChatRequest", text),
            ("CompletionRequest", text),
            ("EmbeddingRequest", vectors),
        ):
            # A random name would be a 404, and nothing behind that would be tried.
            schema = description["components"]["schemas"][kind]
            schema["properties"]["model"] = {"enum": [name]}
            # Likewise with ids that the vocabulary has not.
            in_vocabulary(schema["properties"], 259 if name == text else 12)
        for methods in self.paths.values():
            for operation in methods.values():
                # Always sent and right here: who gets in is for test_access.
                operation.pop("security", None)
        self.schema = schemathesis.openapi.from_dict(description)
        self.schema.config.update(base_url=server.url)


@pytest.fixture(scope="module")
def fuzzed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzz")
    token = add_key(folder / "keys.toml", lambda sha: ApiKey(name="a", sha256=sha, admin=True))
    write_tiny_adapter(folder / "adapters" / "a", seed=1)
    with ServerProcess(
        [tiny_model, write_tiny_encoder(folder / "bert")],
        backend="reference",
        device="reference",
        keys=str(folder / "keys.toml"),
        adapter_folder=str(folder / "adapters"),
        limits=LIMITS,
    ) as server:
        yield Fuzzed(server, token)


class Readers:
    """Clients that read streams over and over, each the same one, and hold it to the first."""

    def __init__(self, fuzzed: Fuzzed) -> None:
        self._fuzzed = fuzzed
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(seed,)) for seed in range(3)]
        self._alone = [self._ask(seed) for seed in range(3)]
        self.right: Counter[int] = Counter()
        self.wrong: list[object] = []

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> str:
        with openai.OpenAI(
            base_url=f"{self._fuzzed.server.url}/v1",
            api_key=self._fuzzed.headers["Authorization"].removeprefix("Bearer "),
            max_retries=0,
            http_client=httpx.Client(verify=False, timeout=60),
        ) as client:
            stream = client.completions.create(
                model=self._fuzzed.server.name,
                prompt="a stream " * (seed + 1),
                max_tokens=LIMITS["max_tokens"],  # type: ignore[arg-type]
                seed=seed,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return "".join(event.choices[0].text for event in stream if event.choices)

    def _read(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                text = self._ask(seed)
            except Exception as error:
                self.wrong.append(error)
                return
            if text != self._alone[seed]:
                self.wrong.append((self._alone[seed], text))
            self.right[seed] += 1


def send(fuzzed: Fuzzed, path: str, method: str, mode: GenerationMode, cases: int) -> Counter[int]:
    """Sends generated requests and has schemathesis check the answers; statuses by number."""
    statuses: Counter[int] = Counter()
    operation = fuzzed.schema[path][method.upper()]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(headers=fuzzed.headers, timeout=60)
        statuses[response.status_code] += 1
        excluded = []
        if response.status_code == 400 and SEMANTIC.search(response.json()["error"]["message"]):
            excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
        case.validate_response(response, headers=fuzzed.headers, excluded_checks=excluded)

    check()
    return statuses


def test_all_operations_are_fuzzed(fuzzed: Fuzzed) -> None:
    described = {(method, path) for path, methods in fuzzed.paths.items() for method in methods}
    assert described == set(SHARES)


@pytest.mark.parametrize(("method", "path"), SHARES, ids=map(" ".join, SHARES))
def test_what_the_description_allows(fuzzed: Fuzzed, method: str, path: str) -> None:
    cases = max(1, round(CASES * SHARES[method, path]))
    with Readers(fuzzed) as readers:
        statuses = send(fuzzed, path, method, GenerationMode.POSITIVE, cases)
    assert not readers.wrong
    assert sum(statuses.values()) >= cases / 2
    if path.endswith("completions") and cases >= 50:
        assert statuses[200] > cases / 10, f"next to nothing reached the engine: {statuses}"


@pytest.mark.parametrize(("method", "path"), VARIED, ids=map(" ".join, VARIED))
def test_what_the_description_forbids(fuzzed: Fuzzed, method: str, path: str) -> None:
    cases = max(1, round(CASES * SHARES[method, path]))
    with Readers(fuzzed) as readers:
        statuses = send(fuzzed, path, method, GenerationMode.NEGATIVE, cases)
    assert not readers.wrong
    assert sum(statuses.values()) >= cases / 2
    assert not any(200 <= status < 300 for status in statuses)


def test_the_server_is_as_it_was(fuzzed: Fuzzed) -> None:
    """After all of that; the readers alone, and each gets through."""
    with Readers(fuzzed) as readers:
        while len(readers.right) < 3 and not readers.wrong:
            threading.Event().wait(0.05)
    assert not readers.wrong
    assert fuzzed.server.health().json()["status"] == "ok"
