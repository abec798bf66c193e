"""The gate: who gets in, and how much of the server is theirs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import ServerProcess, wait_until
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from sartor.graph import SamplingParams
from sartor.serving import server
from sartor.serving.access import Access
from sartor.serving.errors import ApiError, respond
from sartor.serving.keys import ANYONE, ApiKey, KeyFile, add_key, revoke_key
from sartor.serving.openai_api import make_requests
from sartor.serving.openai_types import CompletionRequest
from sartor.serving.prepare import Prepared
from sartor.serving.request_record import RequestRecord

LONG = "a prompt of several blocks, " * 8


class Guarded:
    """A server with keys."""

    def __init__(self, server: ServerProcess, path: Path, tokens: dict[str, str]) -> None:
        self.server, self.path, self.tokens = server, path, tokens

    def post(self, name: str | None, body: dict[str, Any], **more: Any) -> httpx.Response:
        return self.server.http.post(
            "/v1/completions",
            json={"model": self.server.name, "prompt": "x", **body},
            headers=self.headers(name),
            **more,
        )

    def headers(self, name: str | None) -> dict[str, str]:
        return {} if name is None else {"Authorization": f"Bearer {self.tokens[name]}"}


KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other": {},
    "friend1": {"group": "friends"},
    "friend2": {"group": "friends"},
    "narrow": {"max_streams": 2},
    "rare": {"requests_per_minute": 2},
    "thrifty": {"tokens_per_minute": 100},
    "elsewhere": {"models": ("another",)},
    "admin": {"admin": True},
}


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    tokens = {
        name: add_key(path, lambda sha, n=name, f=fields: ApiKey(name=n, sha256=sha, **f))
        for name, fields in KEYS.items()
    }
    with ServerProcess(
        [tiny_model],
        device="null-4ms",
        keys=str(path),
        cors_origins=["https://page.example"],
        adapter_folder=str(path.parent),
    ) as process:
        yield Guarded(process, path, tokens)


@pytest.mark.parametrize(
    ("authorization", "code", "challenge"),
    [
        (None, "missing_api_key", 'Bearer realm="sartor"'),
        ("", "missing_api_key", 'Bearer realm="sartor"'),
        ("Bearer", "missing_api_key", 'Bearer realm="sartor"'),
        ("Basic YTpi", "missing_api_key", 'Bearer realm="sartor"'),
        ("Bearer wrong", "invalid_api_key", 'Bearer realm="sartor", error="invalid_token"'),
        ("Bearer \xff", "invalid_api_key", 'Bearer realm="sartor", error="invalid_token"'),
    ],
)
def test_without_a_key_nothing_is_told(
    guarded: Guarded, authorization: str | None, code: str, challenge: str
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
    ):
        response = guarded.server.http.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == code
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == challenge


def test_health_is_open(guarded: Guarded) -> None:
    assert guarded.server.health().status_code == 200


def test_the_official_client_gets_in_and_knows_a_refusal(guarded: Guarded) -> None:
    def client(token: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{guarded.server.url}/v1",
            api_key=token,
            max_retries=0,
            http_client=httpx.Client(verify=False),
        )

    assert client(guarded.tokens["plain"]).models.list().data[0].id == guarded.server.name
    with pytest.raises(openai.AuthenticationError) as error:
        client("wrong").models.list()
    assert error.value.code == "invalid_api_key"


def test_the_scheme_is_read_as_the_standard_says(guarded: Guarded) -> None:
    for scheme in ("bearer", "BEARER"):
        headers = {"Authorization": f"{scheme}  {guarded.tokens['plain']}"}
        assert guarded.server.http.get("/v1/models", headers=headers).status_code == 200


def test_a_revoked_key_stops_working(guarded: Guarded) -> None:
    token = add_key(guarded.path, lambda sha: ApiKey(name="brief", sha256=sha))
    guarded.tokens["brief"] = token
    assert guarded.post("brief", {}).status_code == 200
    revoke_key(guarded.path, "brief")
    assert guarded.post("brief", {}).status_code == 401


def test_models_that_a_key_may_not_use_do_not_exist_for_it(guarded: Guarded) -> None:
    response = guarded.post("elsewhere", {})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert "no model is" in error["message"]
    headers = guarded.headers("elsewhere")
    assert guarded.server.http.get("/v1/models", headers=headers).json()["data"] == []


@contextlib.contextmanager
def streaming(guarded: Guarded, name: str, **body: Any) -> Iterator[httpx.Response]:
    """A stream that goes on until it is closed."""
    with guarded.server.http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": guarded.server.name,
            "prompt": "x",
            "stream": True,
            "max_tokens": 2000,
            "ignore_eos": True,
            **body,
        },
        headers=guarded.headers(name),
    ) as response:
        assert response.status_code == 200
        yield response


def test_answers_at_once(guarded: Guarded) -> None:
    with streaming(guarded, "narrow"), streaming(guarded, "narrow"):
        refused = guarded.post("narrow", {})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_streams"
        assert guarded.post("plain", {}).status_code == 200, "the limit is the key's own"
    too_many = guarded.post("narrow", {"prompt": ["a", "b", "c"]})
    assert too_many.status_code == 400, "waiting would not help"
    assert "narrow" in too_many.json()["error"]["message"]


def test_clients_that_go_give_back_what_they_held(guarded: Guarded) -> None:
    for _ in range(10):
        # Not at the end of the answers of those who have gone, which would be seconds later.
        wait_until(lambda: guarded.post("narrow", {"n": 2}).status_code == 200, 4)
        with streaming(guarded, "narrow", n=2) as response:
            pieces = response.iter_raw()
            next(pieces)
            assert guarded.post("narrow", {}).status_code == 429
    wait_until(lambda: guarded.post("narrow", {"n": 2}).status_code == 200, 4)


def test_who_has_the_end_of_an_answer_may_ask_again_at_once(tmp_path: Path) -> None:
    token = add_key(tmp_path / "keys.toml", lambda sha: ApiKey(name="a", sha256=sha, max_streams=1))
    headers = [(b"authorization", f"Bearer {token}".encode())]
    ends: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope["state"]["visit"].hold(1)
        except ApiError as error:
            await respond(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b", "more_body": False})

    access = Access(app, KeyFile(tmp_path / "keys.toml"))

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    async def ask(again: bool) -> int:
        """The status; ``again``: the next request comes with the last bytes of this answer."""
        status = 0

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.body" and again:
                ends.append(message["more_body"])
                assert await ask(again=False) == (429 if message["more_body"] else 200)

        scope: Any = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        scope["state"] = {"record": RequestRecord.of({**scope, "client": None})}
        await access(scope, receive, send)
        return status

    assert asyncio.run(ask(again=True)) == 200
    assert ends == [True, False]


def test_requests_a_minute(guarded: Guarded) -> None:
    codes = [guarded.post("rare", {}).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    refused = guarded.post("rare", {})
    assert 1 <= int(refused.headers["retry-after"]) <= 31
    assert refused.json()["error"]["code"] == "requests_per_minute"


def test_tokens_a_minute(guarded: Guarded) -> None:
    body = {"max_tokens": 150, "ignore_eos": True}
    assert guarded.post("thrifty", body).status_code == 200
    refused = guarded.post("thrifty", {"max_tokens": 1})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "tokens_per_minute"
    assert int(refused.headers["retry-after"]) > 20


def test_only_admins_change_adapters(guarded: Guarded) -> None:
    def drop(name: str) -> int:
        return guarded.server.http.post(
            "/v1/unload_lora_adapter", json={"lora_name": "a"}, headers=guarded.headers(name)
        ).status_code

    assert (drop("plain"), drop("admin")) == (403, 404)


def cached(guarded: Guarded, name: str, prompt: str, **more: Any) -> int:
    response = guarded.post(name, {"prompt": prompt, "max_tokens": 1, **more})
    tokens: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_no_key_learns_what_another_has_asked(guarded: Guarded) -> None:
    assert cached(guarded, "plain", LONG) == 0
    assert cached(guarded, "plain", LONG) > 0
    assert cached(guarded, "other", LONG) == 0
    assert cached(guarded, "friend1", LONG) == 0
    assert cached(guarded, "friend2", LONG) > 0


def test_a_salt_isolates_within_a_key(guarded: Guarded) -> None:
    prompt = "salted " + LONG
    assert cached(guarded, "plain", prompt, cache_salt="a") == 0
    assert cached(guarded, "plain", prompt, cache_salt="b") == 0
    assert cached(guarded, "plain", prompt) == 0
    assert cached(guarded, "plain", prompt, cache_salt="a") > 0
    assert cached(guarded, "other", prompt, cache_salt="a") == 0


def test_a_request_can_only_step_back(guarded: Guarded) -> None:
    assert guarded.post("plain", {"priority": 3}).status_code == 200
    refused = guarded.post("plain", {"priority": -1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"


def test_the_engine_is_told_who_asks() -> None:
    body = CompletionRequest(model="m", prompt="x", priority=2, cache_salt="s")
    prepared = Prepared(body, "m", "m", "", SamplingParams(seed=1), ((1,), (2,)))
    key = ApiKey(name="alice", sha256="", share=3.0, priority=5)
    for request in make_requests(prepared, key):
        assert (request.tenant, request.share, request.priority) == ("alice", 3.0, 3)
        assert request.salt == "key alice\ns"
    plain = Prepared(
        CompletionRequest(model="m", prompt="x"), "m", "m", "", SamplingParams(), ((1,),)
    )
    (request,) = make_requests(plain, ANYONE)
    assert (request.tenant, request.share, request.priority, request.salt) == ("", 1.0, 0, "")


def test_pages_of_listed_origins_may_ask(guarded: Guarded) -> None:
    http = guarded.server.http
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    known = http.options("/v1/completions", headers={"Origin": "https://page.example", **asks})
    assert known.status_code == 200
    assert known.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in known.headers["access-control-allow-headers"]
    other = http.options("/v1/completions", headers={"Origin": "https://evil.example", **asks})
    assert "access-control-allow-origin" not in other.headers
    refused = http.get("/v1/models", headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://page.example", 403),
        ("http://192.0.2.7:8000", 403),
        ("null", 403),
        ("http://[", 403),
        ("", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
    ],
)
def test_pages_of_strangers_may_not_ask(
    api_server: ServerProcess, origin: str, status: int
) -> None:
    response = api_server.http.get("/v1/models", headers={"Origin": origin})
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    if status == 403:
        assert "--cors-origin" in response.json()["error"]["message"]
    # A page can send this one without asking first.
    simple = {"Origin": origin, "Content-Type": "text/plain"}
    body = {"model": api_server.name, "prompt": "x", "max_tokens": 1}
    answer = api_server.http.post("/v1/completions", headers=simple, content=json.dumps(body))
    assert (answer.status_code == 403) == (status == 403)


def test_no_page_may_ask_first_unless_told_otherwise(api_server: ServerProcess) -> None:
    preflight = api_server.http.options(
        "/v1/completions",
        headers={"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 405


def test_listed_pages_are_welcome_without_keys(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(cors_origins=["https://page.example"])
    for origin, status in (("https://page.example", 200), ("https://evil.example", 403)):
        response = server.http.get("/v1/models", headers={"Origin": origin})
        assert response.status_code == status
    server = start_server(cors_origins=["*"])
    response = server.http.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 1), 200),
        (("::1", 1), 200),
        (("192.0.2.7", 1), 403),
        (None, 403),
        (("name", 1), 403),
    ],
)
def test_metrics_without_keys_stay_on_the_machine(
    client: tuple[str, int] | None, status: int
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("metrics")(scope, receive, send)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": [], "client": client}
    scope["state"] = {"record": RequestRecord.of(scope)}
    asyncio.run(Access(app)(scope, receive, send))
    assert sent[0]["status"] == status


def test_a_public_address_without_keys_is_warned_about(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Far:
        """Stands for a listener that other machines can reach; opening one is not for tests."""

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.1", 8000

        def close(self) -> None: ...

    def run(keys: Path | None) -> None:
        async def nothing(*_: object) -> int:
            return 0

        monkeypatch.setattr(server, "bind", lambda *_: Far())
        monkeypatch.setattr(server, "listen", lambda _: None)
        monkeypatch.setattr(server, "_serve", nothing)
        assert server.serve([str(tiny_model)], host="192.0.2.1", keys=keys) == 0

    path = tmp_path / "keys.toml"
    add_key(path, lambda sha: ApiKey(name="a", sha256=sha))
    for keys, warned in ((None, True), (path, False)):
        run(keys)
        assert ("--keys FILE" in capsys.readouterr().err) is warned
