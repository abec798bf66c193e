"""What a worker loads within the memory that it may take."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess
from tiny_encoder import write_tiny_encoder

from sartor.plan import ExecutionPlan
from sartor.serving.hosting import PROCESS, REQUEST_BYTES, Host, host
from sartor.serving.messages import ModelSpec

PLAN = ExecutionPlan(backend="reference", max_batch_tokens=64)


def spec(model: Path, name: str = "m", plan: ExecutionPlan = PLAN) -> ModelSpec:
    return ModelSpec(name, str(model), plan)


def leases(hosting: Host) -> dict[tuple[str, str], int]:
    return {(lease.owner, lease.purpose): lease.nbytes for lease in hosting.ledger.leases}


def test_state_gets_what_the_others_leave(tiny_model: Path) -> None:
    limit = psutil.Process().memory_info().rss + REQUEST_BYTES + (40 << 20)
    hosting = host([spec(tiny_model, "one"), spec(tiny_model, "two")], limit)
    assert [report.error for report in hosting.reports] == [None, None]
    held = leases(hosting)
    assert set(held) == {
        (name, purpose) for name in ("one", "two") for purpose in ("weights", "scratch", "state")
    } | {(PROCESS, "resident"), (PROCESS, "requests")}
    assert hosting.ledger.used <= limit
    for name in ("one", "two"):
        executable = hosting.models[name].engine.executable
        assert executable.memory().state == held[name, "state"]
    assert hosting.process_bytes == held[PROCESS, "resident"] + REQUEST_BYTES


def test_without_a_limit_leases_are_only_counted(tiny_model: Path) -> None:
    hosting = host([spec(tiny_model)], None)
    assert set(leases(hosting)) == {("m", "weights"), ("m", "scratch"), ("m", "state")}
    assert hosting.process_bytes == 0


def test_what_does_not_fit_is_reported_and_holds_nothing(tiny_model: Path) -> None:
    hosting = host([spec(tiny_model)], 1000)
    assert "m: 1 MB of weights do not fit into the memory limit" in str(hosting.reports[0].error)
    assert not hosting.models
    assert not hosting.ledger.leases


def test_a_limit_below_the_process_itself(tiny_model: Path) -> None:
    hosting = host([spec(tiny_model)], 20 << 20)
    assert "process: " in str(hosting.reports[0].error)
    assert not hosting.models


def test_one_that_is_broken_leaves_room_for_others(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF?")
    limit = psutil.Process().memory_info().rss + REQUEST_BYTES + (40 << 20)
    hosting = host([spec(broken, "broken"), spec(tiny_model, "sound")], limit)
    assert {report.name: report.error is None for report in hosting.reports} == {
        "broken": False,
        "sound": True,
    }
    assert {owner for owner, _ in leases(hosting)} == {PROCESS, "sound"}


def test_an_encoder_has_scratch_and_no_state(tmp_path: Path) -> None:
    limit = psutil.Process().memory_info().rss + REQUEST_BYTES + (40 << 20)
    hosting = host([spec(write_tiny_encoder(tmp_path / "encoder"), "e")], limit)
    assert [report.error for report in hosting.reports] == [None]
    assert {purpose for owner, purpose in leases(hosting) if owner == "e"} == {"weights", "scratch"}


@pytest.mark.parametrize("limit", [600 << 20])
def test_a_server_stays_below_its_limit(tiny_model: Path, limit: int) -> None:
    with ServerProcess([tiny_model], backend="cpu", device="cpu", memory_bytes=limit) as server:
        body = {"model": server.name, "prompt": [5] * 100, "max_tokens": 8}
        assert server.post("/v1/completions", body).status_code == 200
        assert server.worker().memory_info().rss < limit
        metrics = server.http.get("/metrics").text
        found = re.search(r"^sartor_memory_limit_bytes (\S+)$", metrics, re.M)
        assert found is not None
        assert float(found[1]) == limit
        held = [
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("sartor_memory_bytes{")
        ]
        assert len(held) == 4
        assert 0 < sum(held) <= limit
