"""Long time slices for threads that compute."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from sartor.serving import time_slice

SCRIPT = """
import json, os, threading
from sartor.serving.time_slice import lengthen_time_slice, time_slice
os.nice(3)
lengthen_time_slice(0.05)
got = [time_slice()]
thread = threading.Thread(target=lambda: got.append(time_slice()))
thread.start()
thread.join()
print(json.dumps({"slices": got, "nice": os.nice(0), "policy": os.sched_getscheduler(0)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets threads choose")
def test_the_slice_grows_and_nothing_else_changes() -> None:
    answer = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    found = json.loads(answer.stdout)
    nice = min(19, os.nice(0) + 3)
    assert (found["nice"], found["policy"]) == (nice, os.sched_getscheduler(0))
    version = tuple(int(part) for part in platform.release().split(".")[:2])
    if version >= (6, 12):
        assert found["slices"] == [0.05, 0.05]


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    time_slice.lengthen_time_slice()
    assert time_slice.time_slice() == 0.0
