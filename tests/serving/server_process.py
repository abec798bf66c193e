"""A real server in a process of its own, on a free port of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

_SCRIPT = """
import json, sys
from pathlib import Path
from sartor.engine.preset import Preset
from sartor.errors import SartorError
from sartor.graph import SamplingDefaults
from sartor.plan import ExecutionPlan
from sartor.serving.lifecycle import Timing
from sartor.serving.limits import ServerLimits
from sartor.serving.server import serve
from sartor.serving.telemetry import Telemetry
o = json.loads(sys.argv[1])
more = o["more"]
for name in ("adapter_folder", "keys"):
    if name in more:
        more[name] = Path(more[name])
if "limits" in more:
    more["limits"] = ServerLimits(**more["limits"])
if "adapters" in more:
    more["adapters"] = {name: Path(path) for name, path in more["adapters"].items()}
if "presets" in more:
    more["presets"] = [
        Preset(**{**p, "sampling": SamplingDefaults(**p.get("sampling", {}))}) for p in more["presets"]
    ]
if "telemetry" in more:
    more["telemetry"] = Telemetry(**more["telemetry"])
try:
    code = serve(o["models"], port=more.pop("port", 0), plan=ExecutionPlan(**o["plan"]), timing=Timing(**o["timing"]),
                 **more)
except SartorError as error:
    sys.exit(f"error: {error}")
sys.exit(code)
"""


class ServerProcess:
    """Options beside these go to ``serve``. The server is ready when the constructor returns."""

    def __init__(
        self,
        models: Sequence[Path],
        *,
        device: str = "null",
        backend: str = "null",
        timing: dict[str, float] | None = None,
        plan: dict[str, Any] | None = None,
        wait: bool = True,
        environment: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        options = {
            "models": [str(model) for model in models],
            "plan": {"backend": backend, "device": device, **(plan or {})},
            "timing": {"delay": 0.1, **(timing or {})},
            "more": more,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not wait else None,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.backend = backend
        self.names = [Path(model).name for model in models]
        self.url = ""
        if wait:
            self.read_ready_line()

    def read_ready_line(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://[^/ ]+", line)
        assert found, f"no ready line, but {line!r}"
        self.url = found[0]
        self.ready_line = line

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def name(self) -> str:
        return self.names[0]

    @cached_property
    def http(self) -> httpx.Client:
        # verify=False: setting up TLS that nobody uses takes longer than most tests.
        return httpx.Client(base_url=self.url, timeout=20, verify=False)

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def health(self) -> httpx.Response:
        return self.http.get("/health")

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "sartor.serving.worker" in child.cmdline():
                    found.append(child)
        return found

    def worker(self) -> psutil.Process:
        (worker,) = self.workers()
        return worker

    def wait_healthy(self, seconds: float = 10.0) -> None:
        wait_until(lambda: self.health().status_code == 200, seconds)

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        """Kills the worker, and waits for the next one to have the requests."""
        old = self.worker()
        old.send_signal(number)
        # /health is a moment late: a worker that is not the old one, and that is well.
        wait_until(lambda: [w.pid for w in self.workers()] not in ([], [old.pid]), 30)
        self.wait_healthy(30)

    def stop(self, seconds: float = 10.0) -> int:
        """Ends it as a user would; whatever is left afterwards is killed and an error."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                    raise
            finally:
                _, left = psutil.wait_procs(family, 5)
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            assert not left, f"processes left over: {left}"
        if self.url:
            self.http.close()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return self.process.returncode


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def kill_hard(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
