"""Starting a worker leaves nothing behind where it does not come to its end."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from typing import Any

import psutil
import pytest

from sartor.serving.supervisor import WorkerProcess


def everything() -> tuple[int, int, int]:
    me = psutil.Process()
    return me.num_fds(), len(me.children()), threading.active_count()


def start(process: WorkerProcess) -> Any:
    return process.start([], 1.0, None)


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


async def a_failed_start(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    process = WorkerProcess(lambda *_: None, lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="can't start"):
            await start(process)
    await asyncio.sleep(0)  # transports close in the next turn


async def a_cancelled_start() -> None:
    task = asyncio.create_task(start(WorkerProcess(lambda *_: None, lambda *_: None)))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)


@pytest.mark.parametrize("what", ["process", "thread", "cancelled"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, what: str, loop: str) -> None:
    async def scenario() -> None:
        if what == "process":
            await a_failed_start(monkeypatch, subprocess, "Popen")
        elif what == "thread":
            await a_failed_start(monkeypatch, threading.Thread, "start")
        else:
            await a_cancelled_start()

    factory = None if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.sleep(0))  # the first one keeps something for those to come
    before = everything()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(scenario())
    assert everything() == before
