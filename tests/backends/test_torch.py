"""The torch backend: every operator right, weights kept small, nothing waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from sartor.backends import conformance  # noqa: E402
from sartor.backends.registry import choose, load_backend  # noqa: E402
from sartor.backends.torch import kernels  # noqa: E402
from sartor.backends.torch.attention import attend  # noqa: E402
from sartor.backends.torch.executable import TorchExecutable  # noqa: E402
from sartor.backends.torch.operators import PLAIN  # noqa: E402
from sartor.backends.torch.weights import to_device  # noqa: E402
from sartor.errors import CapacityError, FormatError, UsageError  # noqa: E402
from sartor.graph import Batch, LowRank  # noqa: E402
from sartor.ops import OPERATORS  # noqa: E402
from sartor.ops.weights import dense, quantize_affine  # noqa: E402

BACKEND = load_backend("torch")
DEVICES = [device.name for device in BACKEND.devices()]
CPU = torch.device("cpu")


def case_of(operator: str, form: str = "") -> conformance.Case:
    return next(c for c in conformance.cases() if c.operator == operator and form in ("", c.format))


def compiled(case: conformance.Case, device: str = "torch-cpu") -> tuple[TorchExecutable, Batch]:
    """The program of a case, ready to run, and its batch."""
    program = conformance.case_program(case)
    plan = conformance.ExecutionPlan(backend="torch", device=device, threads=1)
    plan = plan.replace(**case.plan)
    weights = BACKEND.pack(program, conformance.RandomWeights(program, case), plan, None)
    executable = BACKEND.compile(program, weights, plan, device, (case.tap,))
    assert isinstance(executable, TorchExecutable)
    executable.allocate_state([4] * len(program.groups()))
    return executable, conformance.make_batch(program, plan.block_size, case.tap)


@pytest.mark.parametrize("device", DEVICES)
def test_every_cell_is_right(device: str) -> None:
    cases = [dataclasses.replace(c, plan={**c.plan, "threads": 1}) for c in conformance.cases()]
    results = [conformance.run_case(BACKEND, case, device) for case in cases]
    wrong = [result for result in results if not result.right]
    assert not wrong, wrong


def test_every_operator_has_a_handler() -> None:
    assert set(PLAIN) == set(OPERATORS)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_stay_packed(bits: int) -> None:
    values = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)
    weight = quantize_affine("w", values, bits, 32, offset=True)
    packed = to_device(weight, CPU)
    assert packed.data.nbytes == 48 * 64 // (2 if bits <= 4 else 1)
    np.testing.assert_array_equal(packed.floats().numpy(), weight.dequantize())
    rows = torch.tensor([40, 3, 3])
    np.testing.assert_array_equal(packed.floats(rows).numpy(), weight.dequantize()[[40, 3, 3]])
    pieces = [part.numpy() for _, part in packed.pieces(64 * 7)]
    assert len(pieces) == 7
    np.testing.assert_array_equal(np.concatenate(pieces), weight.dequantize())


def test_scales_are_fp16_only_where_that_is_exact() -> None:
    values = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    weight = quantize_affine("w", values, 4, 32)
    assert weight.scale is not None
    rounded = weight.scale.astype(np.float16).astype(np.float32)
    assert to_device(weight, CPU).scale.dtype == torch.float32
    exact = dataclasses.replace(weight, scale=rounded)
    assert to_device(exact, CPU).scale.dtype == torch.float16


def test_dense_weights_keep_their_type() -> None:
    values = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert to_device(dense("w", values, name), CPU).data.dtype == kind


def test_a_misshapen_weight_is_named() -> None:
    case = case_of("linear/fp32", "fp32")
    program = conformance.case_program(case)
    source = conformance.RandomWeights(program, case)
    source._weights["op.weight"] = dense("op.weight", np.zeros((3, 3), np.float32))
    with pytest.raises(FormatError, match=r"op\.weight"):
        BACKEND.pack(program, source, conformance.ExecutionPlan(), None)


# Devices ------------------------------------------------------------------------------


def test_an_unknown_device_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"no device 'npu'.*torch-cpu"):
        BACKEND.capabilities("npu")
    case = case_of("add")
    program = conformance.case_program(case)
    source = conformance.RandomWeights(program, case)
    weights = BACKEND.pack(program, source, conformance.ExecutionPlan(device="torch-cpu"), None)
    with pytest.raises(UsageError, match="torch-cpu"):
        BACKEND.compile(program, weights, conformance.ExecutionPlan(), "cuda:99")


def test_torch_can_be_asked_for() -> None:
    backend, device = choose("torch", "torch-cpu")
    assert (backend.name, device.name) == ("torch", "torch-cpu")
    assert device.memory_bytes > 0


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_automatic_choice_imports_torch_only_for_a_gpu() -> None:
    code = """
import sys
from sartor.backends import registry
registry._DRIVERS = ()
registry.choose()
print("torch" in sys.modules)
"""
    pytest.importorskip("sartor.backends.cpu._native")
    assert run_python(code) == "False"


def test_torch_takes_over_where_the_native_module_is_missing() -> None:
    code = """
import sys
sys.modules["sartor.backends.cpu._native"] = None
from sartor.backends.registry import choose
print(choose(device="torch-cpu")[0].name, choose()[0].name)
sys.modules["torch"] = None
from sartor.backends import registry
registry._DRIVERS = ()
registry.load_backend.cache_clear()
for name in [n for n in sys.modules if n.startswith("sartor.backends.torch")]:
    del sys.modules[name]
print(choose()[0].name)
"""
    assert run_python(code).split() == ["torch", "torch", "reference"]


# State, adapters, taps ----------------------------------------------------------------


def test_state_that_does_not_fit_is_refused() -> None:
    executable, _ = compiled(case_of("attention"))
    with pytest.raises(CapacityError, match="state_bytes"):
        executable.allocate_state([1 << 40])
    assert not executable.state.allocated


def test_memory_is_counted() -> None:
    executable, batch = compiled(case_of("attention"))
    before = executable.memory()
    # One block more than asked for, the scratch block.
    assert before.state == 5 * executable.block_bytes(0)
    assert before.weights == executable._weights.nbytes > 0
    executable.collect(executable.submit(batch))
    assert executable.memory().scratch > before.scratch == 0
    layers = {"q.weight": LowRank(np.zeros((2, 96), np.float32), np.zeros((144, 2), np.float32))}
    executable.load_adapter(3, layers)
    assert executable.memory().weights == before.weights + 4 * 2 * (96 + 144)
    executable.drop_adapter(3)
    assert executable.memory().weights == before.weights
    executable.close()
    assert executable.memory().state == 0
    with pytest.raises(UsageError, match="allocate_state"):
        executable.submit(batch)


def test_adapters_change_the_rows_of_their_sequences() -> None:
    case = case_of("linear_group")
    reference = load_backend("reference")
    rng = np.random.default_rng(3)
    adapters = [
        {
            f"{name}.weight": LowRank(
                rng.standard_normal((rank, 96)).astype(np.float32),
                rng.standard_normal((64, rank)).astype(np.float32),
            )
            for name in names
        }
        for rank, names in ((2, ("first",)), (5, ("first", "second")))
    ]
    found = []
    for backend, device in ((BACKEND, "torch-cpu"), (reference, "reference")):
        program = conformance.case_program(case)
        plan = conformance.ExecutionPlan(backend=backend.name, device=device, activation="fp32")
        weights = backend.pack(program, conformance.RandomWeights(program, case), plan, None)
        executable = backend.compile(program, weights, plan, device, ("op",))
        executable.allocate_state([])
        for index, layers in enumerate(adapters):
            executable.load_adapter(index, layers)
        batch = conformance.make_batch(program, plan.block_size, "op")
        for chosen in ([-1, -1], [1, -1], [0, 1]):
            named = dataclasses.replace(batch, adapters=np.array(chosen, np.int32))
            found.append(executable.collect(executable.submit(named)).taps["op"])
    for got, expected in zip(found[:3], found[3:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(found[0], found[1])
    unknown = dataclasses.replace(batch, adapters=np.array([7, -1], np.int32))
    executable, _ = compiled(case)
    with pytest.raises(UsageError, match=r"adapters \[7\]"):
        executable.submit(unknown)


def test_bad_batches_are_refused_before_the_device_sees_them() -> None:
    executable, batch = compiled(case_of("attention"))
    for field, change, words in (
        ("tokens", np.full_like(batch.tokens, 5000), "vocabulary"),
        ("tokens", np.full_like(batch.tokens, -9), "output row 8"),
        ("block_tables", (np.full((2, 1), -1, np.int32),), "no block"),
        ("taps", ("x",), "compiled"),
    ):
        with pytest.raises(UsageError, match=words):
            executable.submit(dataclasses.replace(batch, **{field: change}))


def test_what_nobody_sees_may_be_infinite() -> None:
    """A stale block of a sequence that overflowed must not reach another."""
    q, k, v = (torch.randn(1, 1, 2, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4))
    visible = torch.tensor([[[True, True, False]]])
    expected = attend(q, k, v, visible, 0.5)
    k[:, 2], v[:, 2] = float("nan"), float("inf")
    assert torch.equal(attend(q, k, v, visible, 0.5), expected)


# Kernels ------------------------------------------------------------------------------


@pytest.fixture
def fast_linear() -> Iterator[list[str]]:
    """A kernel for affine linears on the CPU that remembers where it ran."""
    ran: list[str] = []

    @kernels.register("linear", name="fast", format="affine", device="cpu")
    def run(step: object, node: object) -> object:
        ran.append(node.name)  # type: ignore[attr-defined]
        return PLAIN["linear"](step, node)  # type: ignore[arg-type]

    yield ran
    kernels.unregister("linear", format="affine", device="cpu")


def test_a_registered_kernel_replaces_the_plain_one(fast_linear: list[str]) -> None:
    case = case_of("linear/fp32", "affine4g32o")
    result = conformance.run_case(BACKEND, case, "torch-cpu")
    assert result.right
    assert result.path == "fast fp32 affine4g32o linear"
    assert "op" in fast_linear
    other = conformance.run_case(BACKEND, case_of("linear/fp32", "mxfp4"), "torch-cpu")
    assert other.path.startswith("torch ")


def test_the_most_specific_kernel_is_found(fast_linear: list[str]) -> None:
    form = quantize_affine("w", np.ones((4, 32), np.float32), 4).format
    assert kernels.find("linear", form, "cuda") is None
    assert kernels.find("linear", form, "cpu").name == "fast"  # type: ignore[union-attr]
    kernels.register("linear", name="special", format=form.name)(PLAIN["linear"])
    assert kernels.find("linear", form, "cpu").name == "special"  # type: ignore[union-attr]
    kernels.unregister("linear", format=form.name)
    with pytest.raises(UsageError, match="already"):
        kernels.register("linear", name="again", format="affine", device="cpu")
    with pytest.raises(UsageError, match="unknown"):
        kernels.register("convolve", name="x")


def test_threads_are_the_plan_s_only_while_it_runs() -> None:
    before = torch.get_num_threads()
    executable, batch = compiled(case_of("softcap"))
    seen = []
    run = executable.run
    executable.run = lambda *a, **k: (seen.append(torch.get_num_threads()), run(*a, **k))[1]  # type: ignore[method-assign]
    executable.collect(executable.submit(batch))
    assert (seen, executable.plan.threads, torch.get_num_threads()) == ([1], 1, before)


def test_kernel_paths_tell_arithmetic_and_format() -> None:
    executable, _ = compiled(case_of("linear/int8", "affine4g32o"))
    assert executable.kernel_path("op") == "torch int8 affine4g32o linear"
    assert executable.kernel_path("x") == "torch fp32 fp32 embedding"


# No host synchronisation --------------------------------------------------------------


class ByValue(TorchDispatchMode):
    """Fails on operations whose results' shapes depend on values."""

    WAITING = ("nonzero", "masked_select", "unique", "bincount", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not any(name in str(func) for name in self.WAITING), f"{func} waits for the device"
        if "index.Tensor" in str(func) or "index_put" in str(func):
            given = [i for i in args[1] if i is not None]
            assert all(i.dtype != torch.bool for i in given), f"{func} by a mask waits"
        return func(*args, **(kwargs or {}))


class ByHost(TorchFunctionMode):
    """Fails where the host asks for a value."""

    WAITING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    with ByValue(), ByHost():
        yield


def one_of_each() -> list[conformance.Case]:
    """One linear format stands for the others."""
    return [
        case
        for case in conformance.cases()
        if not case.operator.startswith("linear/") or case.format in ("affine4g32o", "fp32")
    ]


def test_no_operator_waits_for_the_device() -> None:
    for case in one_of_each():
        executable, batch = compiled(case)
        with no_synchronisation():
            executable.submit(batch)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero])
def test_waiting_is_noticed(wait: Callable[[torch.Tensor], object]) -> None:
    with no_synchronisation(), torch.inference_mode(), pytest.raises(AssertionError, match="wait"):
        wait(torch.ones(3))
