"""The conformance suite: the same operator cases for every backend, against the reference.

Each case is a small program over random weights, built to isolate one operator in one format.
The result is the matrix that ``sartor conformance`` prints: right or wrong, the largest
error beside what is allowed, the path that ran and its time. A case that asks for what a
backend's :class:`Capabilities` do not name is not run, and reported as not offered.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sartor.backends.base import Backend, Executable
from sartor.backends.registry import load_backend
from sartor.errors import SartorError
from sartor.graph import SAMPLING_ROW, Batch, Builder, Capabilities, Program, Ragged, Value
from sartor.ops import tolerances
from sartor.ops.functions import ACTIVATIONS, POOLS
from sartor.ops.rope import RopeSpec
from sartor.ops.weights import (
    F32,
    AffineFormat,
    Fp8Format,
    LookupFormat,
    Weight,
    dense,
    quantize_affine,
)
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress, showing

WITHOUT_ARITHMETIC = ("null",)
"""Backends that run no operator, and that nothing can be said of here."""

LENGTHS = (13, 8)  # tokens of the sequences of a step
ROWS = sum(LENGTHS)  # not a multiple of any tile
WIDTH = 96
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
EXPERTS = 5
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

ROUTES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, all": {"normalize": False, "scale": 2.5},
    "groups by maximum": {"groups": 4, "top_groups": 2, "normalize": False},
    "sigmoid, groups by best two": {
        "score": "sigmoid",
        "groups": 3,
        "top_groups": 2,
        "group_score": "top2_sum",
        "bias": "correction",
        "scale": 1.5,
    },
}

Pack = Callable[[str, F32], Weight]
Build = Callable[[Builder, Value], Value]


def _affine(bits: int, group: int, offset: bool) -> Pack:
    def pack(name: str, values: F32) -> Weight:
        rows = values.reshape(-1, values.shape[-1])
        weight = quantize_affine(name, rows, bits, group, offset=offset)
        weight = weight.reshape(*values.shape[:-1])
        return dataclasses.replace(
            weight, scale=_as_fp16(weight.scale), offset=_as_fp16(weight.offset)
        )

    return pack


def _as_fp16(values: F32 | None) -> F32 | None:
    """Scales that fp16 holds exactly, so that packing them cannot hide a wrong kernel."""
    return None if values is None else values.astype(np.float16).astype(np.float32)


def _lookup(name: str, values: F32) -> Weight:
    codes = np.random.default_rng(5).integers(0, 16, values.shape, dtype=np.uint8)
    scale = np.abs(values).reshape(*values.shape[:-1], -1, 32).max(axis=-1) / np.float32(127)
    return Weight(name, LookupFormat(IQ4_NL, 32), codes, _as_fp16(scale))


def _mxfp4(name: str, values: F32) -> Weight:
    codes = np.random.default_rng(6).integers(0, 16, values.shape, dtype=np.uint8)
    scale = np.exp2(
        np.random.default_rng(8).integers(-9, -3, (*values.shape[:-1], values.shape[-1] // 32))
    )
    return Weight(name, LookupFormat(FP4, 32), codes, scale.astype(np.float32))


def _fp8(group: int) -> Pack:
    def pack(name: str, values: F32) -> Weight:
        codes = np.random.default_rng(9).integers(0, 256, values.shape, dtype=np.uint8)
        codes[(codes & 127) == 127] = 0  # not a number
        groups = (*values.shape[:-1], values.shape[-1] // group)
        scale = np.random.default_rng(10).uniform(0.001, 0.01, groups).astype(np.float32)
        return Weight(name, Fp8Format(group), codes, _as_fp16(scale))

    return pack


def _act_order(name: str, values: F32) -> Weight:
    permutation = np.random.default_rng(11).permutation(values.shape[-1]).astype(np.int32)
    return dataclasses.replace(_affine(4, 32, True)(name, values), permutation=permutation)


FORMATS: dict[str, Pack] = {
    "fp32": lambda name, values: dense(name, values),
    "bf16": lambda name, values: dense(name, values, "bf16"),
    "fp16": lambda name, values: dense(name, values, "fp16"),
    **{
        AffineFormat(bits, group, 0, offset).name: _affine(bits, group, offset)
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for group in (16, 32)
        for offset in (False, True)
    },
    "affine4g128o": _affine(4, 128, True),
    "affine4g64": _affine(4, 64, False),
    "lookup4g32": _lookup,
    "mxfp4": _mxfp4,
    "fp8g32": _fp8(32),
    f"fp8g{WIDTH}": _fp8(WIDTH),
    "affine4g32o act-order": _act_order,
}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: an operator, a format, and how to build it."""

    operator: str
    format: str
    build: Build
    tolerance: float
    width: int = WIDTH
    plan: Mapping[str, object] = field(default_factory=dict)
    pack: Pack = FORMATS["fp32"]
    expected_path: str = ""
    head: bool = False  # the operator makes the logits
    tap: str = "op"
    encoder: bool = False  # the operator makes one row a sequence


@dataclass(frozen=True)
class Result:
    """How a backend did on a case. ``error`` and ``tolerance`` are relative."""

    operator: str
    format: str
    right: bool
    error: float
    tolerance: float
    microseconds: float
    path: str
    message: str = ""


@dataclass(frozen=True)
class NotOffered:
    """A case that a backend does not claim to run, and what it lacks for it."""

    operator: str
    format: str
    lacks: str


@dataclass(frozen=True)
class Report:
    backend: str
    device: str
    results: tuple[Result, ...]
    not_offered: tuple[NotOffered, ...] = ()

    @property
    def right(self) -> bool:
        return all(result.right for result in self.results)


def _linear(b: Builder, x: Value) -> Value:
    return b.linear(x, "op", 80, bias=True)


def _linear_group(b: Builder, x: Value) -> Value:
    first, second = b.linear(x, "first", 64, bias=True), b.linear(x, "second", 64)
    return b.add(first, second, name="op")


def _add_rms_norm(b: Builder, x: Value) -> Value:
    return b.scale(b.rms_norm(b.add(x, b.scale(x, 0.5)), "op", eps=1e-6), 1.0, "after")


def _same(b: Builder, x: Value) -> Value:
    return b.scale(x, 1.0, "op")


def _activation(kind: str, b: Builder, x: Value) -> Value:
    return b.activation(x, kind, "op")


def _gated(kind: str, b: Builder, x: Value) -> Value:
    return b.gated_activation(x, x, kind, "op")


def _rope(spec: RopeSpec, b: Builder, x: Value) -> Value:
    return b.rope(x, spec, 24, "op")


def _attention(options: dict[str, Any], b: Builder, x: Value) -> Value:
    heads, kv_heads, dim = 6, 2, 24
    q = b.linear(x, "q", heads * dim)
    k = b.linear(x, "k", kv_heads * dim)
    v = b.linear(x, "v", kv_heads * dim)
    return b.attention(
        q, k, v, heads=heads, kv_heads=kv_heads, head_dim=dim, scale=0.2, name="op", **options
    )


def _clamped(b: Builder, x: Value) -> Value:
    x = b.scale(x, 5.0)  # beyond the limits, both ways
    return b.gated_activation(x, b.scale(x, -1.0, "up"), "clamped_silu", "op")


def _self_attention(window: int, b: Builder, x: Value) -> Value:
    heads, kv_heads, dim = 6, 2, 24
    q = b.linear(x, "q", heads * dim)
    k = b.linear(x, "k", kv_heads * dim)
    v = b.linear(x, "v", kv_heads * dim)
    return b.self_attention(
        q,
        k,
        v,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        scale=0.2,
        window=window,
        name="op",
    )


def _latent_attention(b: Builder, x: Value) -> Value:
    heads, rank, rope_dim = 4, 40, 8
    q = b.linear(x, "q", heads * (rank + rope_dim))
    latent, rope = b.linear(x, "latent", rank), b.linear(x, "rope", rope_dim)
    return b.latent_attention(q, latent, rope, heads=heads, scale=0.2, name="op")


def _scan(delta: bool, b: Builder, x: Value) -> Value:
    heads, key_heads, key_dim, value_dim = 4, 2, 8, 20
    q = b.l2_norm(b.linear(x, "q", key_heads * key_dim), key_dim, 1e-6, "q_norm")
    k = b.l2_norm(b.linear(x, "k", key_heads * key_dim), key_dim, 1e-6, "k_norm")
    v = b.linear(x, "v", heads * value_dim)
    decay = b.activation(b.linear(x, "decay", heads), "sigmoid", "forget")
    beta = b.activation(b.linear(x, "beta", heads), "sigmoid", "write")
    return b.recurrent_scan(
        q, k, v, decay, beta, heads=heads, key_heads=key_heads, scale=0.5, delta=delta, name="op"
    )


def _short_conv(b: Builder, x: Value) -> Value:
    return b.short_conv(x, "op", 4, bias=True)


def _pool(kind: str, b: Builder, x: Value) -> Value:
    return b.pool(x, kind, "op")


def _route(options: dict[str, Any], b: Builder, x: Value) -> Value:
    logits = b.linear(x, "router", 12)
    experts, weights = b.route_experts(logits, top_k=3, name="op", **options)
    # Both results count: the number of the expert, too.
    return b.combine_experts(b.grouped_linear(x, experts, "of", 12, WIDTH, 16), weights, "combined")


def _grouped(apart: bool, bias: bool, b: Builder, x: Value) -> Value:
    slots = 2
    experts, _ = b.route_experts(b.linear(x, "router", EXPERTS), top_k=slots)
    if apart:
        x = b.concat([x, b.scale(x, 0.5)], "apart")
    return b.grouped_linear(x, experts, "op", EXPERTS, WIDTH, 40, bias=bias)


def _head_linear(b: Builder, x: Value) -> Value:
    return b.head_linear(b.concat([x, b.scale(x, 0.5)], "two"), "op", 2, 40)


def _expert_cases() -> Iterator[Case]:
    """Routing, and linear layers that a token chooses."""
    for name, options in ROUTES.items():
        yield Case(
            "route_experts",
            name,
            partial(_route, options),
            tolerances.linear(WIDTH, int8=False),
            tap="combined",
        )
    dense_and_packed = (
        "fp32",
        "bf16",
        "affine4g32o",
        "affine8g32",
        "affine6g16",
        "mxfp4",
        "fp8g32",
    )
    for name in (*dense_and_packed, "affine4g32o act-order"):
        rounds = not name.startswith(("fp", "bf"))
        for activation in ("fp32", "int8") if rounds else ("fp32",):
            tolerance = tolerances.linear(WIDTH, int8=activation == "int8")
            plan = {"activation": activation}
            path = _packed_name(name) if name not in ("fp32", "bf16") else ""
            for op, build in (
                ("grouped_linear", partial(_grouped, False, True)),
                ("grouped_linear/apart", partial(_grouped, True, False)),
                ("head_linear", _head_linear),
            ):
                yield Case(
                    f"{op}/{activation}",
                    name,
                    build,
                    tolerance,
                    plan=plan,
                    pack=FORMATS[name],
                    expected_path=path,
                )


def _packed_name(name: str) -> str:
    """What a backend calls the format of a case."""
    return "lookup4g32" if name == "mxfp4" else name.partition(" ")[0]


def cases() -> Iterator[Case]:
    """Every operator, and ``linear`` in every format with both kinds of activations."""
    for name, pack in FORMATS.items():
        quantized = name not in ("fp32", "bf16", "fp16")
        rounds = quantized and not name.startswith("fp8")
        width = 128 if "g128" in name or "g64" in name else WIDTH
        for activation in ("fp32", "int8") if rounds else ("fp32",):
            yield Case(
                f"linear/{activation}",
                name,
                _linear,
                tolerances.linear(width, int8=activation == "int8"),
                width,
                {"activation": activation},
                pack,
                _packed_name(name) if quantized else "",
            )
    yield from _expert_cases()
    for name in ("affine4g32o", "affine6g16", "affine8g32", "lookup4g32"):
        tolerance = tolerances.linear(WIDTH, int8=True) / 256
        pack = FORMATS[name]
        yield Case(
            "linear/head", name, _linear, tolerance, pack=pack, expected_path=name, head=True
        )
    exact = {"activation": "fp32", "kv": "fp32"}
    embedded = ("fp32", "bf16", "fp16", "affine8g32", "affine4g32o", "affine6g16", "fp8g32")
    for name in (*embedded, "affine4g32o act-order"):
        yield Case("embedding", name, _same, tolerances.ELEMENTWISE, plan=exact, pack=FORMATS[name])
    yield Case("linear_group", "fp32", _linear_group, tolerances.linear(WIDTH, int8=False))
    norms: dict[str, Build] = {
        "rms_norm": lambda b, x: b.rms_norm(x, "op", eps=1e-6),
        "rms_norm/heads": lambda b, x: b.rms_norm(x, "op", eps=1e-6, run=24),
        "rms_norm/after a row": lambda b, x: b.rms_norm(
            b.add(x, b.vector("op.row", WIDTH)), "op", eps=1e-6
        ),
        "rms_norm/offset": lambda b, x: b.rms_norm(x, "op", eps=1e-5, weight_offset=1.0),
        "layer_norm": lambda b, x: b.layer_norm(x, "op", eps=1e-5),
        "l2_norm": lambda b, x: b.l2_norm(x, 24, 1e-6, "op"),
    }
    for name, build in norms.items():
        yield Case(name, "fp32", build, tolerances.NORM)
    # A tapped node is not fused: here the tap is behind the norm, so that the fused form runs.
    yield Case("add_rms_norm", "fp32", _add_rms_norm, tolerances.NORM, tap="after")
    for kind in ACTIVATIONS:
        yield Case("activation", kind, partial(_activation, kind), tolerances.ELEMENTWISE)
        yield Case("gated_activation", kind, partial(_gated, kind), tolerances.ELEMENTWISE)
    yield Case("gated_activation", "clamped_silu", _clamped, tolerances.ELEMENTWISE)
    elementwise: dict[str, Build] = {
        "add": lambda b, x: b.add(x, x, "op"),
        "add/row": lambda b, x: b.add(x, b.vector("op.row", WIDTH), "op"),
        "mul": lambda b, x: b.mul(x, x, "op"),
        "mul/row": lambda b, x: b.mul(x, b.vector("op.row", WIDTH), "op"),
        "split": lambda b, x: b.split(x, (5, 19), "op", runs=4)[1],
        "concat": lambda b, x: b.concat([b.scale(x, 2.0, "twice"), x], "op", runs=4),
        "replace_rows": lambda b, x: b.embedding_segments(x, "op"),
        "scale": lambda b, x: b.scale(x, 0.37, "op"),
        "softcap": lambda b, x: b.softcap(x, 3.0, "op"),
    }
    for name, build in elementwise.items():
        yield Case(name, "fp32", build, tolerances.ELEMENTWISE)
    ropes = {
        "halves": RopeSpec(24),
        "partial": RopeSpec(16),
        "interleaved": RopeSpec(24, interleaved=True),
        "yarn": RopeSpec(24, kind="yarn", factor=4.0, original_context=64),
        "dynamic": RopeSpec(24, kind="dynamic", factor=2.0, original_context=8),
    }
    for name, spec in ropes.items():
        yield Case("rope", name, partial(_rope, spec), tolerances.ROPE)
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "window": {"window": 7},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": True},
    }
    for kv in ("fp32", "fp16", "bf16", "int8"):
        tolerance = tolerances.ATTENTION_OVER[kv]
        for name, chosen in options.items():
            plan = {"activation": "fp32", "kv": kv}
            build = partial(_attention, chosen)
            yield Case("attention", f"{kv} {name}", build, tolerance, plan=plan)
        yield Case(
            "latent_attention",
            kv,
            _latent_attention,
            tolerances.ATTENTION_BF16 if kv == "int8" else tolerance,  # it stays in bf16
            plan={"activation": "fp32", "kv": kv},
        )
    for name, window in (("whole", 0), ("window", 4)):
        build = partial(_self_attention, window)
        yield Case("self_attention", name, build, tolerances.ATTENTION)
    for kind in POOLS:
        yield Case("pool", kind, partial(_pool, kind), tolerances.NORM, encoder=True)
    for name, delta in (("plain", False), ("delta", True)):
        yield Case("recurrent_scan", name, partial(_scan, delta), tolerances.SCAN)
    yield Case("short_conv", "fp32", _short_conv, tolerances.ELEMENTWISE)


class RandomWeights:
    """Random weights for a program, packed as the case asks; vectors stay float32."""

    def __init__(self, program: Program, case: Case) -> None:
        rng = np.random.default_rng(7)
        self._weights: dict[str, Weight] = {}
        for spec in program.weights:
            values = rng.standard_normal(spec.shape).astype(np.float32)
            if spec.name == "x.weight":
                values = (np.rint(values * 16) / 16).astype(np.float32)
            elif len(spec.shape) >= 2 and not spec.name.startswith("op."):
                # Few and simple: what feeds the operator is exact in any order of summing.
                values = (np.rint(values / 3).clip(-1, 1) / 2).astype(np.float32)
            packs = spec.name == "op.weight" and not case.operator.startswith("short_conv")
            packs = packs and len(spec.shape) >= 2
            packs = packs or (case.operator == "embedding" and spec.name == "x.weight")
            self._weights[spec.name] = (case.pack if packs else FORMATS["fp32"])(spec.name, values)

    def weight(self, name: str) -> Weight:
        return self._weights[name]

    def identity(self) -> str:
        return "conformance"


def case_program(case: Case) -> Program:
    """Random rows through the operator; its node is called ``op``."""
    builder = Builder()
    x = builder.embedding(builder.token_ids, "x", 4 * ROWS, case.width)
    if case.encoder:
        return builder.finish_encoder(case.build(builder, x), 4 * ROWS)
    if case.head:
        return builder.finish(case.build(builder, builder.gather_rows(x, builder.output_rows)))
    result = builder.gather_rows(case.build(builder, x), builder.output_rows)
    return builder.finish(builder.linear(result, "head", 4 * ROWS))


def make_batch(
    program: Program, block_size: int, tap: str, lengths: tuple[int, int] = LENGTHS
) -> Batch:
    """Two sequences without a context, of so many tokens."""
    tokens = sum(lengths)
    starts = np.array([0, lengths[0], tokens], np.int32)
    none = Ragged(np.zeros(0, np.int32), np.zeros(tokens + 1, np.int32))
    tables = tuple(np.arange(2, dtype=np.int32).reshape(2, 1) for _ in program.groups())
    assert max(lengths) <= block_size
    rows = np.array([0, 14], np.int32) if "embeddings" in program.inputs else starts[:0]
    vectors = np.random.default_rng(12).standard_normal((len(rows), WIDTH)).astype(np.float32)
    return Batch(
        tokens=np.arange(tokens, dtype=np.int32),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        starts=starts,
        contexts=np.zeros(2, np.int32),
        block_tables=tables,
        rope_lengths=np.array(lengths, np.int32),
        output_rows=np.arange(tokens, dtype=np.int32),
        sampling=np.zeros(tokens, SAMPLING_ROW),
        history=none,
        bias_tokens=none,
        bias_values=Ragged(np.zeros(0, np.float32), none.starts),
        taps=(tap,),
        embedding_rows=rows,
        embeddings=vectors,
    )


def prepare(
    backend: Backend, case: Case, device: str, isa: str = "auto"
) -> tuple[Executable, Batch]:
    """A case's executable, with state, and the step that shows its result in ``case.tap``."""
    program = case_program(case)
    plan = ExecutionPlan(backend=backend.name, device=device, isa=isa).replace(**case.plan)
    weights = backend.pack(program, RandomWeights(program, case), plan, None)
    executable = backend.compile(program, weights, plan, device, (case.tap,))
    executable.allocate_state([2] * len(program.groups()))
    return executable, make_batch(program, plan.block_size, case.tap)


def execute(
    backend: Backend, case: Case, device: str, isa: str = "auto"
) -> tuple[F32, Executable, float]:
    """The result of a case's operator, the executable, and the best time of a step in seconds."""
    executable, batch = prepare(backend, case, device, isa)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        output = executable.collect(executable.submit(batch))
        times.append(time.perf_counter() - started)
    return output.taps[case.tap].astype(np.float32), executable, min(times)


def lacking(case: Case, capabilities: Capabilities) -> str:
    """What a case needs and the capabilities do not name; empty where it can run."""
    needed = {node.op for node in case_program(case).nodes}
    missing = sorted(needed - capabilities.operators)
    if missing:
        return f"operator {', '.join(missing)}"
    for key, known in (("activation", capabilities.activations), ("kv", capabilities.kv_formats)):
        if key in case.plan and case.plan[key] not in known:
            return f"{key} {case.plan[key]}"
    return ""


def fitted(case: Case, capabilities: Capabilities) -> Case:
    """The case as a backend can run it: where it leaves the plan open, with what there is; and
    the packed format has to show in the path only where the backend says that it keeps it."""
    usual = ExecutionPlan()
    plan: dict[str, object] = {
        "activation": _usual(usual.activation, sorted(capabilities.activations)),
        "kv": _usual(usual.kv, sorted(capabilities.kv_formats)),
        "block_size": _usual(usual.block_size, capabilities.block_sizes),
    }
    kept = case.expected_path.startswith(tuple(capabilities.weight_formats))
    return dataclasses.replace(
        case, plan=plan | dict(case.plan), expected_path=case.expected_path if kept else ""
    )


def _usual(value: object, known: Sequence[object]) -> object:
    return value if value in known else known[0]


def run_case(backend: Backend, case: Case, device: str, isa: str = "auto") -> Result:
    """Runs one case on a backend (on one of its instruction-set paths) and on the reference."""
    case = fitted(case, backend.capabilities(device))
    expected, _, _ = execute(load_backend("reference"), case, "reference")
    try:
        got, executable, seconds = execute(backend, case, device, isa)
    except Exception as failure:  # a backend under way may raise anything; the rest goes on
        message = f"{type(failure).__name__}: {failure}"
        if isinstance(failure, SartorError):
            message = str(failure)
        return Result(
            case.operator, case.format, False, float("inf"), case.tolerance, 0.0, "", message
        )
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    path = executable.kernel_path("op")
    message = ""
    if not error <= case.tolerance:  # also when it is not a number
        message = "wrong result"
    elif case.expected_path and backend.name != "reference" and case.expected_path not in path:
        message = f"ran as {path}, not as {case.expected_path}"
    return Result(
        case.operator, case.format, not message, error, case.tolerance, seconds * 1e6, path, message
    )


def run(backend_name: str, isa: str = "auto", progress: Progress = SILENT) -> Report:
    """The whole matrix for one backend on its first device; ``isa`` picks a path of the CPU."""
    backend = load_backend(backend_name)
    devices = backend.devices()
    if not devices:
        raise SartorError(f"backend {backend_name!r} has no device on this machine")
    device = devices[0].name
    capabilities = backend.capabilities(device)
    results: list[Result] = []
    not_offered: list[NotOffered] = []
    every = list(cases())
    with showing(progress, f"conformance of {backend_name}", len(every), "cases"):
        for case in every:
            progress.part(case.operator)
            lacks = lacking(case, capabilities)
            if lacks:
                not_offered.append(NotOffered(case.operator, case.format, lacks))
            else:
                results.append(run_case(backend, case, device, isa))
            progress.advance(1)
    return Report(backend_name, device, tuple(results), tuple(not_offered))
