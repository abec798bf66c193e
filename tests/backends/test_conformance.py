"""Every backend and every instruction-set path against the numpy meaning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sartor.backends import conformance
from sartor.backends.cpu import _native
from sartor.backends.registry import load_backend
from sartor.ops import OPERATORS


@pytest.mark.parametrize("isa", _native.usable_paths())
def test_cpu_path_is_right_in_every_cell(isa: str) -> None:
    report = conformance.run("cpu", isa)
    wrong = [r for r in report.results if not r.right]
    assert not wrong, wrong
    assert all(isa in r.path for r in report.results)


@pytest.mark.skipif("amx" not in _native.usable_paths(), reason="no AMX on this machine")
def test_tiles_give_the_same_bits_as_avx512() -> None:
    backend = load_backend("cpu")
    for case in conformance.cases():
        if case.operator.startswith("linear"):
            tiles, plain = (
                conformance.execute(backend, case, "cpu", isa)[0] for isa in ("amx", "avx512")
            )
            np.testing.assert_array_equal(tiles, plain, err_msg=f"{case.operator} {case.format}")


def test_the_reference_agrees_with_itself() -> None:
    assert conformance.run("reference").right


def test_every_operator_has_a_case() -> None:
    covered = {case.operator.partition("/")[0] for case in conformance.cases()}
    # kv_write shows in attention; sample has tests of its own; gather_rows is in every case.
    assert covered | {"kv_write", "sample", "gather_rows"} == set(OPERATORS)


def test_a_wrong_result_is_seen() -> None:
    case = next(c for c in conformance.cases() if c.operator == "rms_norm")
    result = conformance.run_case(
        load_backend("cpu"), dataclasses.replace(case, tolerance=0.0), "cpu"
    )
    assert not result.right
    assert result.message == "wrong result"


def test_a_path_that_fell_back_is_seen() -> None:
    case = next(c for c in conformance.cases() if c.format == "affine4g32")
    result = conformance.run_case(
        load_backend("cpu"), dataclasses.replace(case, expected_path="affine5g32"), "cpu"
    )
    assert not result.right
    assert "not as" in result.message
