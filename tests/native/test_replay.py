"""Recorded cases, replayed without Python on this machine's paths."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from replaying import build_beside_module, replay, right_paths

from sartor.backends import conformance, record
from sartor.backends.cpu import _native, custom
from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.graph import Batch, LowRank

pytestmark = pytest.mark.timeout(900)  # a build, on a machine that may be busy


@pytest.fixture(scope="module")
def runner() -> Path:
    return build_beside_module()


def case_of(operator: str) -> conformance.Case:
    return next(case for case in conformance.cases() if case.operator == operator)


def test_every_path_is_right_in_every_case(runner: Path, recorded: Path) -> None:
    assert right_paths(replay(runner, recorded)) == _native.usable_paths()


def test_a_wrong_result_is_seen(runner: Path, tmp_path: Path) -> None:
    right = case_of("rms_norm")
    wrong = dataclasses.replace(right, tolerance=0.0)
    cases = tmp_path / "cases.bin"
    cases.write_bytes(b"".join(record.recordings([right, wrong])))
    done = replay(runner, cases)
    best = _native.usable_paths()[0]
    first, second, end = done.stdout.splitlines()[:3]
    assert first.split()[:3] == [best, "right", "rms_norm"]
    assert second.split()[:3] == [best, "WRONG", "rms_norm"]
    assert end == f"{best}: 1 of 2 right"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        (slice(0), "has no cases"),
        (slice(7), "not a whole recording"),
        (slice(-64), "not a whole recording"),
        (slice(64, None), "not a recording of this version"),
    ],
)
def test_what_is_no_recording_is_refused(
    runner: Path, tmp_path: Path, kept: slice, problem: str
) -> None:
    cases = tmp_path / "cases.bin"
    cases.write_bytes(b"".join(record.recordings([case_of("rms_norm")]))[kept])
    done = replay(runner, cases)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {cases}: {problem}")


def prepared(operator: str) -> tuple[CpuExecutable, Batch]:
    executable, batch = conformance.prepare(CpuBackend(), case_of(operator), "cpu")
    assert isinstance(executable, CpuExecutable)
    return executable, batch


def test_adapters_are_not_recorded() -> None:
    executable, batch = prepared("linear/fp32")
    low_rank = LowRank(np.ones((1, conformance.WIDTH), np.float32), np.ones((80, 1), np.float32))
    executable.load_adapter(3, {"op.weight": low_rank})
    batch = dataclasses.replace(batch, adapters=np.array([-1, 3], np.int32))
    with pytest.raises(ValueError, match="adapters cannot be recorded"):
        executable.record(batch, "adapted", 0.0, np.zeros(1, np.float32))


def test_kernels_of_other_packages_are_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    custom.override_kernel("rms_norm", "other", 1)  # never called
    try:
        assert record.main([str(tmp_path / "cases.bin")]) == 1
    finally:
        custom.restore_kernel("rms_norm")
    assert "runs a kernel of another package" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: ")
