"""GET /metrics of a server that has seen something, and what is built on it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess, kill_hard, wait_until
from test_crash import Stream, say
from tiny_encoder import write_tiny_encoder
from tiny_model import write_tiny_model

from sartor.serving.metrics import METRICS, table

ROOT = Path(__file__).parents[2]
TOKENS = 30
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: ServerProcess) -> Samples:
    page = server.http.get("/metrics")
    assert page.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }


class Shown:
    """One scrape, asked by name and some labels: the sum of what fits."""

    def __init__(self, server: ServerProcess) -> None:
        self.samples = scrape(server)

    def __call__(self, name: str, **labels: str) -> float:
        found = [
            value
            for (sample, own), value in self.samples.items()
            if sample == name and own >= frozenset(labels.items())
        ]
        assert found, f"no sample {name} {labels}"
        return sum(found)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    """One that has answered, refused, lost a client, and lost its worker amid a stream."""
    with ServerProcess([tiny_model], device="null-20ms", timing={"beat": 0.2}) as server:
        body = {"model": server.name, "prompt": "x" * 70, "max_tokens": 5, "ignore_eos": True}
        for _ in range(2):
            assert server.post("/v1/completions", {**body, "n": 2}).status_code == 200
        assert server.post("/v1/completions", {**body, "model": "nobody"}).status_code == 404
        assert server.post("/v1/completions", {**body, "prompt": "x" * 5000}).status_code == 400
        assert server.http.get("/v1/models").status_code == 200
        leaving = {**body, "stream": True, "max_tokens": 400}  # seconds: it is gone long before
        with server.http.stream("POST", "/v1/completions", json=leaving) as r:
            next(r.iter_lines())
        stream = Stream(server, messages=say("hello"), max_tokens=TOKENS)
        wait_until(lambda: len(stream.pieces) > 5)
        kill_hard(server.worker())
        assert stream.finish()[3] == TOKENS
        # What the engine did last is told when it rests.
        wait_until(lambda: Shown(server)("sartor_engine_sequences") == 0)
        yield server


def test_requests_and_their_tokens(server: ServerProcess) -> None:
    shown, name = Shown(server), server.name
    counted = {
        (dict(labels)["outcome"], dict(labels)["code"], dict(labels)["model"]): value
        for (sample, labels), value in shown.samples.items()
        if sample == "sartor_requests_total"
    }
    assert counted == {
        ("length", "", name): 3,
        ("abort", "", name): 1,
        ("rejected", "model_not_found", ""): 1,
        # Found out while its body was taken in, before anybody looked for the model.
        ("rejected", "context_length_exceeded", ""): 1,
    }
    assert shown("sartor_prompt_tokens_total", model=name) == 3 * 70 + 23
    assert shown("sartor_cached_prompt_tokens_total") == 64 + 64  # the second and the third time
    assert 20 + 1 + TOKENS <= shown("sartor_completion_tokens_total") <= 20 + 5 + TOKENS
    assert shown("sartor_requests_in_flight") == shown("sartor_requests_waiting") == 0


def test_times(server: ServerProcess) -> None:
    shown = Shown(server)
    assert shown("sartor_time_to_first_token_seconds_count") == 4
    assert shown("sartor_time_to_first_token_seconds_bucket", le="0.015") == 0  # steps of 20 ms
    assert shown("sartor_request_queue_seconds_count") == 4
    assert shown("sartor_request_duration_seconds_count") == 3
    gaps = shown("sartor_completion_tokens_total") - 2 * 2 - 2
    assert shown("sartor_inter_token_seconds_count") == gaps
    assert shown("sartor_inter_token_seconds_bucket", le="+Inf") == gaps
    assert shown("sartor_inter_token_seconds_sum") > gaps * 0.015


def test_the_engine_and_its_state(server: ServerProcess) -> None:
    shown = Shown(server)
    steps = shown("sartor_engine_step_seconds_count")
    # A worker that is killed takes what it did in its last second with it.
    assert steps >= 2 * 5
    assert shown("sartor_engine_step_seconds_sum") == pytest.approx(
        shown("sartor_engine_phase_seconds_total")
    )
    assert shown("sartor_engine_phase_seconds_total", phase="execute") > steps * 0.019
    assert shown("sartor_engine_output_tokens_total") >= 20
    assert shown("sartor_state_blocks", state="held") == 0
    blocks = shown("sartor_state_blocks")
    block_bytes = shown("sartor_memory_bytes", owner="state") / blocks
    assert shown("sartor_state_bytes", state="free") == block_bytes * shown(
        "sartor_state_blocks", state="free"
    )


def test_the_worker(server: ServerProcess) -> None:
    shown = Shown(server)
    assert shown("sartor_worker_up") == shown("sartor_model_up", model=server.name) == 1
    deaths = {
        dict(labels)["cause"]: value
        for (sample, labels), value in shown.samples.items()
        if sample == "sartor_worker_deaths_total"
    }
    assert deaths == {"signal": 1, "hang": 0, "start": 0, "memory": 0, "error": 0}
    assert 0 <= shown("sartor_worker_heartbeat_age_seconds") < 5
    assert shown("process_resident_memory_bytes") > 1e7
    assert shown("sartor_worker_process_resident_memory_bytes") > 1e7
    assert shown("process_cpu_seconds_total") > 0


def test_counters_never_fall(server: ServerProcess) -> None:
    counters = {m.name for m in METRICS if m.kind == "counter"}
    stream = Stream(server, messages=say("hello again"), max_tokens=60)
    wait_until(lambda: len(stream.pieces) > 3)
    before = scrape(server)
    down = False
    kill_hard(server.worker())
    while stream.is_alive():
        now = scrape(server)
        for key, value in before.items():
            if key[0] in counters or key[0].endswith(("_count", "_sum", "_bucket")):
                assert now[key] >= value, key
        down = down or now["sartor_worker_up", frozenset()] == 0
        before = now
        time.sleep(0.01)
    assert down
    assert stream.finish()[3] == 60


def test_what_is_under_way_shows(server: ServerProcess) -> None:
    stream = Stream(server, messages=say("long"), max_tokens=100)
    wait_until(lambda: len(stream.pieces) > 3)
    shown = Shown(server)
    assert shown("sartor_requests_in_flight", model=server.name) == 1
    assert shown("sartor_requests_waiting", model=server.name) == 0
    wait_until(lambda: Shown(server)("sartor_engine_sequences", state="running") == 1)
    assert Shown(server)("sartor_state_blocks", state="held") > 0
    stream.finish()


def test_a_worker_that_never_starts_again_is_told(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    with ServerProcess([model], timing={"starts": 2}) as server:
        model.write_bytes(b"GGUF, and no more of it")
        server.worker().kill()
        wait_until(lambda: "could not be started" in server.health().text, 30)
        shown = Shown(server)
        assert shown("sartor_worker_up") == shown("sartor_model_up") == 0
        assert shown("sartor_worker_deaths_total", cause="start") == 2
        server.post("/v1/completions", {"model": server.name, "prompt": "x"})
        labels = {"outcome": "rejected", "code": "service_unavailable", "model": server.name}
        assert Shown(server)("sartor_requests_total", **labels) == 1


def test_embeddings_count_their_texts(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path / "bert")
    with ServerProcess([folder], backend="reference", device="reference") as server:
        answer = server.client.embeddings.create(model=server.name, input=["the cat", "dog"])
        tokens = answer.usage.prompt_tokens
        shown = Shown(server)
        assert shown("sartor_requests_total", outcome="stop", model=server.name) == 1
        assert shown("sartor_prompt_tokens_total") == tokens
        assert shown("sartor_completion_tokens_total") == 0
        assert shown("sartor_time_to_first_token_seconds_count") == 0
        wait_until(lambda: Shown(server)("sartor_engine_prompt_tokens_total") == tokens)


def test_all_is_described_in_both_formats(server: ServerProcess) -> None:
    page = server.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(page.text)}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{metric.name} shows nothing"
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels)
    assert all(family.documentation for family in families.values())
    described = {m.name.removesuffix("_total") for m in METRICS}
    others = families.keys() - described
    assert all(name.startswith(("process_", "sartor_worker_process_")) for name in others)
    open_page = server.http.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert open_page.headers["content-type"].startswith("application/openmetrics-text")
    names = {f.name for f in openmetrics_families(open_page.text)}
    assert described <= names


# What stands in the repository -------------------------------------------------------------


def expressions(part: Any) -> Iterator[str]:
    """All queries of a dashboard."""
    if isinstance(part, dict):
        if "expr" in part:
            yield part["expr"]
        for value in part.values():
            yield from expressions(value)
    elif isinstance(part, list):
        for value in part:
            yield from expressions(value)


def test_the_dashboard_asks_for_what_there_is(server: ServerProcess) -> None:
    # Prometheus adds the label of the job, histogram_quantile needs the bound.
    labels: dict[str, set[str]] = {}
    for name, own in scrape(server):
        labels.setdefault(name, {"job"}).update(dict(own))
    text = (ROOT / "deploy/grafana/sartor.json").read_text(encoding="utf-8")
    board = json.loads(text)
    queries = list(expressions(board["panels"]))
    assert len(queries) >= 25
    for query in queries:
        asked = re.findall(r"\b((?:sartor|process)_\w+)(?:\{([^}]*)\})?", query)
        assert asked, query
        for name, selector in asked:
            assert name in labels, f"{name} of {query}"
            selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert selected <= labels[name], query
            for clause in re.findall(r"by \(([^)]*)\)", query):
                assert {label.strip() for label in clause.split(",")} <= labels[name], query
    for variable in board["templating"]["list"]:
        for name, label in re.findall(
            r"label_values\((\w+), (\w+)\)", variable.get("definition", "")
        ):
            assert label in labels[name]
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"sartor_\w+", text)}
    missing = {m.name for m in METRICS} - shown
    assert missing == {"sartor_engine_decode_tokens_total"}


def test_the_table_of_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    written = [line for line in page.splitlines() if line.startswith("| `sartor_")]
    assert written == [line for line in table() if line.startswith("| `sartor_")]


def test_the_example_of_a_scrape_names_the_route() -> None:
    text = (ROOT / "deploy/prometheus.yml").read_text(encoding="utf-8")
    assert "metrics_path: /metrics" in text
    assert "localhost:8000" in text


def test_books_of_two_servers_in_one_process_are_apart(tiny_model: Path) -> None:
    import asyncio

    from sartor.plan import ExecutionPlan
    from sartor.serving.app import create_app
    from sartor.serving.frontend import open_served_model
    from sartor.serving.gateway import Gateway
    from sartor.serving.intake import Intake
    from sartor.serving.limits import ServerLimits

    async def check() -> None:
        model = open_served_model("m", tiny_model, ExecutionPlan(backend="null"))
        gateways = [Gateway([model]) for _ in range(2)]
        intakes = [Intake(g.models, ServerLimits()) for g in gateways]
        apps = [create_app(g, i) for g, i in zip(gateways, intakes, strict=True)]
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s")
            for app in apps
        ]
        await clients[0].post("/v1/completions", json={"model": "nobody", "prompt": "x"})
        pages = [(await client.get("/metrics")).text for client in clients]
        assert ["model_not_found" in page for page in pages] == [True, False]
        for gateway, intake in zip(gateways, intakes, strict=True):
            await intake.close()
            await gateway.close()

    asyncio.run(check())
