"""Every backend and every instruction-set path against the numpy meaning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sartor.backends import conformance
from sartor.backends.cpu import _native
from sartor.backends.reference.backend import ReferenceBackend
from sartor.backends.registry import load_backend
from sartor.graph import Capabilities
from sartor.ops import OPERATORS


@pytest.mark.parametrize("isa", _native.usable_paths())
def test_cpu_path_is_right_in_every_cell(isa: str) -> None:
    report = conformance.run("cpu", isa)
    wrong = [r for r in report.results if not r.right]
    assert not wrong, wrong
    # Some paths multiply only some formats, or none, and leave the others to a narrower one.
    narrower = {"amx": "avx512", "avx512bf16": "avx512", "avxvnni": "avx2"}.get(isa, isa)
    own = narrower if isa == "avx512bf16" else isa
    for result in report.results:
        if result.operator.startswith(("linear/", "grouped_linear", "head_linear")):
            allowed = {own} if "int8 affine4g32" in result.path else {isa, narrower}
        else:
            allowed = {isa}
        assert result.path.split()[0] in allowed, result


@pytest.mark.skipif("amx" not in _native.usable_paths(), reason="no AMX on this machine")
def test_no_matrix_claims_tiles_that_it_does_not_get() -> None:
    paths = [r.path for r in conformance.run("cpu", "amx").results if r.operator == "linear/int8"]
    tiles = {path for path in paths if path.startswith("amx ")}
    assert tiles
    assert all(" int8 " in path and "g16" not in path for path in tiles)
    assert any("g16" in path for path in set(paths) - tiles)


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
    # What a state operator or a router has no result without; sample has tests of its own;
    # gather_rows is in every case.
    within = {"kv_write", "latent_write", "combine_experts", "sample", "gather_rows"}
    assert covered | within == set(OPERATORS)


class _Fewer(ReferenceBackend):
    """The reference as a chip that has less."""

    def capabilities(self, device: str) -> Capabilities:
        return dataclasses.replace(
            super().capabilities(device),
            operators=super().capabilities(device).operators - {"rope"},
            weight_formats=frozenset({"dense"}),
            activations=frozenset({"fp32"}),
            kv_formats=frozenset({"fp16"}),
            block_sizes=(64,),
        )


def test_what_a_backend_does_not_claim_is_not_asked_of_it() -> None:
    capabilities = _Fewer().capabilities("reference")
    lacks = {c.operator: conformance.lacking(c, capabilities) for c in conformance.cases()}
    assert lacks["rope"] == "operator rope"
    assert lacks["linear/int8"] == "activation int8"
    assert lacks["attention"] == "kv int8"  # the last of its cases
    assert lacks["linear/fp32"] == lacks["rms_norm"] == ""


def test_a_case_takes_the_plan_that_a_backend_has(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(
        _Fewer, "pack", lambda self, p, s, plan, c: plans.append(plan) or load_backend("cpu")
    )
    case = next(c for c in conformance.cases() if c.operator == "self_attention")
    assert not conformance.run_case(_Fewer(), case, "reference").right
    assert (plans[0].activation, plans[0].kv, plans[0].block_size) == ("fp32", "fp16", 64)


def test_any_exception_of_a_backend_is_a_wrong_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("rms_norm")

    monkeypatch.setattr(_Fewer, "compile", broken)
    case = next(c for c in conformance.cases() if c.operator == "rms_norm")
    result = conformance.run_case(_Fewer(), case, "reference")
    assert (result.right, result.message) == (False, "NotImplementedError: rms_norm")


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
