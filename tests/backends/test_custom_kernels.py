"""Kernels of other packages through the public C interface, written here with ctypes and C."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.backends import conformance
from sartor.backends.cpu import custom
from sartor.backends.registry import load_backend
from sartor.errors import UsageError

SOURCE = r"""
#include <math.h>
#include "sartor/kernel.h"

/* The root mean square norm, and how often it was called, as the context counts it. */
void norm(const sartor_kernel_call* call, void* context) {
  const sartor_vector weight = call->weight[0];
  for (int64_t r = call->row_begin; r < call->row_end; ++r) {
    const int64_t width = call->input[0].width;
    const float* x = call->input[0].data + r * width;
    float* y = call->output[0].data + r * width;
    for (int64_t start = 0; start < width; start += call->run) {
      double sum = 0;
      for (int64_t i = start; i < start + call->run; ++i) sum += (double)x[i] * x[i];
      const float scale = (float)(1.0 / sqrt(sum / (double)call->run + call->eps));
      for (int64_t i = 0; i < call->run; ++i)
        y[start + i] = x[start + i] * scale * (weight.data[i] + call->weight_offset);
    }
  }
  __sync_fetch_and_add((int*)context, call->abi == SARTOR_KERNEL_ABI);
}

void wrong_norm(const sartor_kernel_call* call, void* context) {
  (void)context;
  for (int64_t i = call->row_begin * call->output[0].width;
       i < call->row_end * call->output[0].width; ++i)
    call->output[0].data[i] = 1.0f;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the native core was built, so there is a compiler"
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.c").write_text(SOURCE)
    flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{custom.include_dir()}"]
    target = folder / "kernel.so"
    subprocess.run(
        [compiler, *flags, str(folder / "kernel.c"), "-o", str(target), "-lm"], check=True
    )
    return ctypes.CDLL(str(target))


@pytest.fixture(autouse=True)
def own_kernels_afterwards() -> Iterator[None]:
    yield
    for op in custom.OVERRIDABLE:
        custom.restore_kernel(op)


def _results() -> list[conformance.Result]:
    backend = load_backend("cpu")
    cases = [c for c in conformance.cases() if c.operator.startswith(("rms_norm", "add_rms_norm"))]
    return [conformance.run_case(backend, case, "cpu") for case in cases]


def test_an_overriding_kernel_runs_and_is_named(library: ctypes.CDLL) -> None:
    calls = ctypes.c_int(0)
    custom.override_kernel("rms_norm", "double-sum", library.norm, ctypes.addressof(calls))
    results = _results()
    assert all(result.right for result in results)
    assert {result.path for result in results} == {"double-sum rms_norm"}
    assert calls.value >= len(results)
    custom.restore_kernel("rms_norm")
    assert not any("double-sum" in result.path for result in _results())


def test_conformance_finds_a_wrong_kernel(library: ctypes.CDLL) -> None:
    custom.override_kernel("rms_norm", "wrong", library.wrong_norm)
    assert not any(result.right for result in _results())


def test_only_row_operators_can_be_overridden(library: ctypes.CDLL) -> None:
    with pytest.raises(UsageError, match=r"'attention' cannot be overridden.*rms_norm"):
        custom.override_kernel("attention", "mine", library.norm)
    with pytest.raises(UsageError, match="null pointer"):
        custom.override_kernel("add", "mine", 0)


def test_the_header_lies_where_a_compiler_can_be_sent() -> None:
    assert Path(custom.include_dir(), "sartor", "kernel.h").is_file()
