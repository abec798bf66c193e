"""Bounds by hand; the probes against themselves."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from sartor.backends.base import Probed
from sartor.backends.registry import load_backend
from sartor.hardware import Bound, Ceilings, Peak, Work, bound, physical_cores

INT8 = Peak(ops_per_s=8e12, clock_hz=2e9, width=2048, cores=2)
FP32 = Peak(ops_per_s=1e11, clock_hz=2e9, width=64, cores=2)
CEILINGS = Ceilings(1e10, INT8, FP32, None, 2, "amx")


def test_the_longer_time_binds() -> None:
    assert bound(Work(1e9, {"int8": 8e9}), CEILINGS) == Bound(0.1, "memory")
    assert bound(Work(1e6, {"int8": 8e11}), CEILINGS) == Bound(0.1, "arithmetic")
    both = bound(Work(1e6, {"int8": 8e11, "fp32": 1e10}), CEILINGS)
    assert both == Bound(pytest.approx(0.2), "arithmetic")


def test_without_bf16_there_is_float32() -> None:
    assert CEILINGS.peak("bf16") is FP32
    half = Peak(2e11, 2e9, 128, 2)
    assert Ceilings(1e10, INT8, FP32, half, 2, "amx").peak("bf16") is half


def test_a_peak_by_cycles() -> None:
    assert INT8.ops_per_cycle == 2000
    assert INT8.share_of_width == pytest.approx(2000 / 2048)
    unknown = Peak(1e11, 0.0, 64, 2)
    assert unknown.share_of_width is None
    assert unknown.to_json_dict()["clock_hz"] is None
    assert Peak(1e11, 2e9, 0.0, 2).share_of_width is None


def test_work_adds_up() -> None:
    work = Work(1, {"int8": 2}) + Work(3, {"fp32": 4, "int8": 6})
    assert work == Work(4, {"int8": 8, "fp32": 4})
    assert work / 2 == Work(2, {"int8": 4, "fp32": 2})


def test_no_more_cores_than_threads() -> None:
    assert physical_cores(1) == 1
    assert 1 <= physical_cores(1000) < 1000


def cpu() -> Any:
    if importlib.util.find_spec("sartor.backends.cpu._native") is None:
        pytest.skip("the native CPU backend is not built")
    return load_backend("cpu")


def paths() -> list[str]:
    if importlib.util.find_spec("sartor.backends.cpu._native") is None:
        return []
    from sartor.backends.cpu import _native

    return _native.usable_paths()


@pytest.mark.parametrize("isa", paths())
def test_probes_are_sane_and_fit_together(isa: str) -> None:
    """No processor does more than its width, and none with a known width much less in int8 and
    float32."""
    backend = cpu()
    assert isinstance(backend, Probed)
    found = backend.ceilings("cpu", 0.1, threads=1, isa=isa)
    assert (found.threads, found.isa) == (1, isa)
    assert 1e8 < found.read_bytes_per_s < 1e12
    json.dumps(found.to_json_dict())
    for peak in (found.int8, found.fp32, found.bf16):
        if peak is None:
            assert isa in ("portable", "avx2", "avxvnni", "avx512")
            continue
        assert peak.ops_per_s > 1e8
        if not peak.clock_hz:
            continue
        assert 3e8 < peak.clock_hz < 8e9
        share = peak.share_of_width
        assert share is None or isa not in ("portable", "neon", "i8mm")
        if share is not None:
            assert share < 1.3
            assert peak is found.bf16 or share > 0.6
    clocks = [p.clock_hz for p in (found.int8, found.fp32) if p.clock_hz]
    assert max(clocks, default=1.0) < 3 * min(clocks, default=1.0)


@pytest.mark.skipif("avx512" not in paths(), reason="no AVX-512 on this machine")
def test_wider_instructions_do_as_much_more_as_the_processor_is_wider() -> None:
    """Twice as much where a core starts two of them in a cycle, no more where it is one."""
    wide, narrow = (cpu().ceilings("cpu", 0.1, threads=1, isa=i).int8 for i in ("avx512", "avx2"))
    if not (wide.width and narrow.width):
        pytest.skip("the width of this processor is not known")
    expected = wide.width / narrow.width
    assert 0.75 * expected < wide.ops_per_cycle / narrow.ops_per_cycle < 1.3 * expected
