"""The CPU backend: Sartor's native kernels behind the contract."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sartor.backends.base import Device, KernelTiming, MemoryUse, PackedWeights, WeightSource
from sartor.backends.cpu import _native
from sartor.backends.cpu.custom import CustomKernel, custom_kernels, fused_operators
from sartor.backends.cpu.packing import PackedMatrix, pack_matrix
from sartor.backends.cpu.tuned import TunedDevice, TunedStore
from sartor.backends.cpu.tuning import Traits, Tuner, linear_layers
from sartor.backends.cpu.weights import CpuWeights, pack
from sartor.errors import CapacityError, UnsupportedError, UsageError
from sartor.graph import (
    Batch,
    Capabilities,
    KVStateSpec,
    LatentStateSpec,
    LowRank,
    Node,
    Program,
    ProgramWork,
    Ragged,
    RecurrentStateSpec,
    StepOutput,
)
from sartor.graph.passes import fuse, logits_linear
from sartor.hardware import (
    Arithmetic,
    Ceilings,
    Peak,
    available_cores,
    inventory,
    physical_cores,
)
from sartor.ops import CORE_OPERATORS, FUSED_OPERATORS
from sartor.ops.functions import OUTLIER
from sartor.ops.rope import attention_factor, inverse_frequencies
from sartor.ops.weights import F32, dense
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Progress

# The order of `enum class Op` in native/core/executor.hpp.
OPCODES = (
    "embedding",
    "linear",
    "rms_norm",
    "layer_norm",
    "rope",
    "kv_write",
    "attention",
    "activation",
    "gated_activation",
    "add",
    "mul",
    "scale",
    "softcap",
    "gather_rows",
    "add_rms_norm",
    "sample",
    "self_attention",
    "latent_write",
    "short_conv",
    "recurrent_scan",
    "route_experts",
    "grouped_linear",
    "head_linear",
    "combine_experts",
    "l2_norm",
    "split",
    "concat",
    "replace_rows",
    "pool",
)
_LINEARS = ("linear", "linear_group", "grouped_linear", "head_linear")
_SAME_CODE = {"linear_group": "linear", "latent_attention": "attention"}
"""Operators that the native core runs as another one."""

MOST_INT8_FEATURES = 512
"""Of a head whose keys and values are int8 (kMostByteFeatures in native/core/kernels.hpp)."""


class CpuBackend:
    """x86-64 with AMX, AVX-512 VNNI, AVX-VNNI or AVX2, ARM64 with NEON dot products, and a portable
    path for any other processor."""

    name = "cpu"

    def __init__(self) -> None:
        self._pools: dict[int, Any] = {}
        self._lock = threading.Lock()

    def devices(self) -> list[Device]:
        machine = inventory()
        isa = _native.usable_paths()[0]
        description = f"{machine.cpu}, {machine.cores} cores"
        return [Device("cpu", self.name, description, machine.memory_bytes, isa)]

    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(
            operators=frozenset(CORE_OPERATORS),
            fused=frozenset(FUSED_OPERATORS),
            weight_formats=frozenset({"dense", "affine", "lookup", "fp8"}),
            activations=frozenset({"int8", "fp32"}),
            kv_formats=frozenset({"bf16", "fp16", "fp32", "int8"}),
            adapters=True,
            copies=True,
            bitwise=True,
            row_tile=16,  # of AMX; what the other paths take is a divisor
        )

    def pool(self, threads: int) -> Any:
        """The thread pool of that size (0: every core); made once. CapacityError where the system
        does not give so many threads."""
        threads = threads or available_cores()
        with self._lock:
            if threads not in self._pools:
                try:
                    self._pools[threads] = _native.ThreadPool(threads)
                except RuntimeError as error:
                    step = "lower {}, or raise the process's limits (ulimit -v, ulimit -u)"
                    raise CapacityError(str(error), advice=(step, ("threads",))) from None
            return self._pools[threads]

    def ceilings(
        self, device: str, seconds: float = 0.5, *, threads: int = 0, isa: str = "auto"
    ) -> Ceilings:
        """Measures the device: streaming reads, then int8, float32 and bfloat16 arithmetic.

        Takes ``seconds`` for each of the four, and 256 MiB of memory a thread, 2 GiB at most.
        """
        isa = _native.usable_paths()[0] if isa == "auto" else isa
        pool = self.pool(threads)
        cores = physical_cores(pool.threads)
        read, *peaks = _native.measure_ceilings(pool, isa, cores == pool.threads, seconds)
        int8, fp32, bf16 = (Peak(*peak, cores) for peak in peaks)
        return Ceilings(read, int8, fp32, bf16 if bf16.ops_per_s else None, pool.threads, isa)

    def pack(
        self, program: Program, source: WeightSource, plan: ExecutionPlan, cache: Path | None
    ) -> CpuWeights:
        return pack(self.pool(plan.threads), program, source, cache)

    def compile(
        self,
        program: Program,
        weights: PackedWeights,
        plan: ExecutionPlan,
        device: str,
        taps: Sequence[str] = (),
    ) -> CpuExecutable:
        assert isinstance(weights, CpuWeights)
        usable = _native.usable_paths()
        if plan.isa != "auto" and plan.isa not in usable:
            raise UsageError(
                f"plan: isa {plan.isa} cannot run on this machine; choose from {', '.join(usable)}",
                fields=("isa",),
            )
        plan = plan.replace(
            backend=self.name,
            device=device,
            threads=plan.threads or available_cores(),
            isa=usable[0] if plan.isa == "auto" else plan.isa,
        )
        return CpuExecutable(program, weights, plan, self.pool(plan.threads), tuple(taps))


class CpuExecutable:
    """A program on the native core: one call a step."""

    def __init__(
        self,
        program: Program,
        weights: CpuWeights,
        plan: ExecutionPlan,
        pool: Any,
        taps: tuple[str, ...],
    ) -> None:
        self.program = program
        self.plan = plan
        self._weights = weights
        self._taps = taps
        self._pool = pool
        self._custom = custom_kernels()
        wanted = fused_operators(frozenset(FUSED_OPERATORS), self._custom)
        self._fused = fuse(program, wanted, frozenset(taps))
        native, self._matrices = _translate(program, self._fused, weights, plan, taps, self._custom)
        self._native = _native.Executor(native, pool, plan.isa)
        self._adapter_bytes: dict[int, int] = {}
        self._finished: dict[int, StepOutput] = {}
        self._next_handle = 0
        self._last_tokens = np.zeros(0, np.int32)
        self._allocated = not program.states
        self._tuned: TunedStore | None = None
        self._tuner: Tuner | None = None

    def block_bytes(self, group: int) -> int:
        return int(self._native.block_bytes(group))

    def allocate_state(self, blocks: Sequence[int]) -> None:
        self._allocated = False
        try:
            self._native.allocate_state(list(blocks))
        except MemoryError:
            need = sum(n * self.block_bytes(g) for g, n in enumerate(blocks))
            raise CapacityError(
                f"no memory for {need >> 20} MiB of sequence state",
                advice=("lower {}", ("state_bytes", "max_sequences", "max_context")),
            ) from None
        self._allocated = True

    def submit(self, batch: Batch) -> int:
        ids, logprobs, top_ids, top_logprobs, top_starts, taps, embeddings = self._native.run(
            *self._arrays(batch)
        )
        output = StepOutput(
            ids,
            logprobs,
            Ragged(top_ids, top_starts),
            Ragged(top_logprobs, top_starts),
            {name: tap for name, tap in zip(self._taps, taps, strict=True) if name in batch.taps},
            embeddings,
        )
        self._last_tokens = ids
        handle = self._next_handle
        self._next_handle += 1
        self._finished[handle] = output
        return handle

    def collect(self, handle: int) -> StepOutput:
        return self._finished.pop(handle)

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        packed = [
            (
                self._matrices[name],
                pack_matrix(self._pool, dense(f"{name}.down", layer.down)),
                pack_matrix(self._pool, dense(f"{name}.up", layer.up)),
            )
            for name, layer in layers.items()
        ]
        self._native.load_adapter(index, [(i, d.native(), u.native()) for i, d, u in packed])
        self._adapter_bytes[index] = sum(down.nbytes + up.nbytes for _, down, up in packed)

    def drop_adapter(self, index: int) -> None:
        self._native.drop_adapter(index)
        del self._adapter_bytes[index]

    def memory(self) -> MemoryUse:
        return MemoryUse(
            self._weights.nbytes + sum(self._adapter_bytes.values()),
            int(self._native.state_bytes),
            int(self._native.scratch_bytes),
        )

    def kernel_path(self, node: str) -> str:
        found = self.program.node(node)
        if found.op in self._custom:
            return f"{self._custom[found.op].name} {found.op}"
        if found.op not in _LINEARS:
            return f"{self.plan.isa} {found.op}"
        matrix = self._matrix(self.program, found)
        return f"{self._path(matrix)} {self._arithmetic(matrix)} {matrix.format_name}"

    def _path(self, matrix: PackedMatrix) -> str:
        """The path whose instructions multiply a matrix. Tiles and AVX-VNNI are for int8 alone,
        and a tile product takes 32 inputs of one scale (native/core/kernels_amx.cpp)."""
        narrower = {"amx": "avx512", "avx512bf16": "avx512", "avxvnni": "avx2"}
        int8 = self._arithmetic(matrix) == "int8"
        fits = {"amx": int8 and matrix.group != 16, "avx512bf16": False, "avxvnni": int8}
        isa = self.plan.isa
        return isa if fits.get(isa, True) else narrower[isa]

    def work(self) -> ProgramWork:
        """Counts what the fused program asks of the machine."""
        packed = self._weights
        arithmetic = {
            node.name: self._arithmetic(self._matrix(self._fused, node))
            for node in self._fused.nodes
            if node.op in _LINEARS
        }
        sizes = {name: matrix.nbytes for name, matrix in packed.matrices.items()}
        sizes |= {name: vector.nbytes for name, vector in packed.vectors.items()}
        return ProgramWork(self._fused, sizes, self.plan.kv, arithmetic)

    def _matrix(self, program: Program, node: Node) -> PackedMatrix:
        """The first matrix of a linear node."""
        specs = program.weight_values()
        return self._weights.matrices[next(specs[v].name for v in node.inputs if v in specs)]

    def _arithmetic(self, matrix: PackedMatrix) -> Arithmetic:
        return self.plan.activation if matrix.integer_codes else "fp32"

    def profile(self, on: bool) -> None:
        """Starts or stops timing every instruction; :meth:`seconds` reads the sums."""
        self._native.profile(on)

    def seconds(self) -> list[tuple[str, float]]:
        """Seconds by node since profiling began, in program order."""
        return list(self._native.seconds())

    def tuned_from(self, folder: Path, *, again: bool = False) -> None:
        device = TunedDevice.here(self.plan.isa, self.plan.threads)
        self._tuned = TunedStore(folder, device)
        self._tuner = None
        if again or self._tuned.path.exists():
            self._tuner = self._make_tuner(again=again)

    def tune(self, seconds: float, progress: Progress = SILENT) -> bool:
        if self._tuner is None:
            self._tuner = self._make_tuner()
        return self._tuner.run(seconds, progress)

    def use_tuned(self, on: bool) -> None:
        if self._tuner is not None:
            self._tuner.use_chosen(on)

    def timings(self) -> list[KernelTiming]:
        return [] if self._tuner is None else self._tuner.timings()

    def _make_tuner(self, *, again: bool = False) -> Tuner:
        logits = logits_linear(self._fused)

        def activation(index: int, matrix: PackedMatrix) -> str:
            found = self._arithmetic(matrix)
            whole = found == "int8" and logits in self._fused.nodes[index].outputs
            return "int16" if whole else found

        layers = linear_layers(
            self._fused, self._weights.matrices, activation, frozenset(self._custom)
        )
        traits = Traits(*_native.linear_traits(self.plan.isa))
        return Tuner(self._native, layers, traits, self.plan.threads, self._tuned, again=again)

    def close(self) -> None:
        self._native.allocate_state([0] * len(self.program.groups()))
        self._allocated = not self.program.states

    def record(self, batch: Batch, name: str, tolerance: float, expected: F32) -> bytes:
        """A step as bytes that native/runner/replay.cpp runs anywhere, with what it is to give.

        ``expected`` are the rows of the first tap; ``tolerance`` is a share of its largest
        value. ValueError for a step with adapters or with kernels of another package.
        """
        return bytes(self._native.record(name, tolerance, expected, *self._arrays(batch)))

    def _arrays(self, batch: Batch) -> tuple[Any, ...]:
        """A checked batch in the order of ``make_step`` in native/binding.cpp."""
        if not self._allocated:
            raise UsageError("cpu backend: allocate_state before the first step")
        batch.validate()
        tokens = batch.tokens
        if len(tokens) and tokens.min() < 0:
            names = np.where(tokens < 0, -1 - tokens, 0)
            tokens = np.where(tokens < 0, self._last_tokens[names], tokens).astype(np.int32)
        unknown = set(batch.taps) - set(self._taps)
        if unknown:
            raise UsageError(f"taps {sorted(unknown)} were not named when the program was compiled")
        return (
            tokens,
            batch.positions,
            batch.starts,
            batch.contexts,
            list(batch.block_tables),
            batch.output_rows,
            batch.sampling.view(np.uint8),
            batch.history.values,
            batch.history.starts,
            batch.bias_tokens.values,
            batch.bias_tokens.starts,
            batch.bias_values.values,
            [self._rope_frequencies(i, batch) for i in range(len(self.program.ropes))],
            [tap in batch.taps for tap in self._taps],
            batch.adapters,
            batch.embedding_rows,
            batch.embeddings,
            list(batch.copies),
        )

    def _rope_frequencies(self, index: int, batch: Batch) -> Any:
        spec = self.program.ropes[index]
        if not spec.depends_on_length:
            return None
        return np.stack([inverse_frequencies(spec, int(n)) for n in batch.rope_lengths])


def _translate(
    program: Program,
    fused: Program,
    weights: CpuWeights,
    plan: ExecutionPlan,
    taps: tuple[str, ...],
    custom: Mapping[str, CustomKernel],
) -> tuple[Any, dict[str, int]]:
    """The native form of a fused program, with weights bound; and its matrices by name."""
    for tap in taps:
        outputs = program.node(tap).outputs
        if not outputs or program.values[outputs[-1]].dtype != "fp32":
            raise UsageError(f"node {tap} has no result in floating point that could be tapped")
    native = _native.Program(
        vocab=program.vocab,
        block_size=plan.block_size,
        int8_activations=plan.activation == "int8",
        taps=list(taps),
        embedding=program.outputs.get("embedding", -1),
    )
    for value in fused.values:
        width = value.shape[-1]
        if value.source != "node" or not isinstance(width, int):
            width = 1  # inputs and weights have no buffer; a list of tokens is one wide
        native.add_value(width, str(value.shape[0]))
    names = {spec.value: spec.name for spec in fused.weights}
    matrices = {n: native.add_matrix(m.native()) for n, m in weights.matrices.items()}
    convolved = {node.inputs[1] for node in fused.nodes if node.op == "short_conv"}
    vectors = {}
    for spec in fused.weights:
        if spec.name in weights.vectors:
            vector = weights.vectors[spec.name]
            if spec.value in convolved:  # neighbouring features side by side
                vector = np.ascontiguousarray(vector.reshape(spec.shape).T).reshape(-1)
            vectors[spec.name] = native.add_vector(vector)
    for rope in fused.ropes:
        native.add_rope(
            rope.dim, rope.interleaved, attention_factor(rope), inverse_frequencies(rope)
        )
    _add_states(native, fused, plan.kv)
    inputs = set(fused.inputs.values())
    logits = logits_linear(program)
    for node in fused.nodes:
        fields = _fields(node, fused)
        if node.op in _LINEARS:
            fields["residual_threshold"] = 0.0 if logits in node.outputs else OUTLIER
        if node.op in custom:
            kernel = custom[node.op]
            kind = str(node.attributes.get("kind", ""))
            fields["custom"] = (kernel.address, kernel.context, node.op, kind)
        if node.name in taps:
            fields["tap"] = taps.index(node.name)
        bound_matrices, bound_vectors = _bind(node, names, matrices, vectors)
        native.add_instruction(
            OPCODES.index(_SAME_CODE.get(node.op, node.op)),
            node.name,
            [v for v in node.inputs if v not in names and v not in inputs],
            list(node.outputs),
            bound_matrices,
            bound_vectors,
            fields,
        )
    return native, matrices


def _add_states(native: Any, program: Program, kv: str) -> None:
    group_of = {state: group.index for group in program.groups() for state in group.states}
    for index, state in enumerate(program.states):
        group = group_of[index]
        match state:
            case KVStateSpec(kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                if kv == "int8" and max(head_dim, value_dim) > MOST_INT8_FEATURES:
                    raise UnsupportedError(
                        f"plan: kv int8 takes heads of up to {MOST_INT8_FEATURES} features on the "
                        f"CPU, and {state.name} has {max(head_dim, value_dim)}; choose bf16"
                    )
                native.add_state(state.storage(kv), heads, head_dim, value_dim, group)
            case LatentStateSpec(rank=rank, rope_dim=rope_dim):
                native.add_state(state.storage(kv), 1, rank + rope_dim, rank, group)
            case RecurrentStateSpec():
                native.add_recurrent_state(state.nbytes // 4, group)


def _fields(node: Node, program: Program) -> dict[str, Any]:
    """The attributes of a node under the names of the native instruction."""
    fields = {k: v for k, v in node.attributes.items() if k not in ("biases", "widths")}
    shapes = program.values
    match node.op:
        case "embedding":
            fields["positions"] = node.inputs[0] == program.inputs["positions"]
        case "latent_attention":
            rank, rope_dim = fields.pop("rank"), fields.pop("rope_dim")
            fields |= {"kv_heads": 1, "head_dim": rank + rope_dim, "value_dim": rank}
        case "route_experts":
            fields["sigmoid"] = fields.pop("score") == "sigmoid"
            fields["by_best_two"] = fields.pop("group_score") == "top2_sum"
        case "split" | "concat":
            parts = node.outputs if node.op == "split" else node.inputs
            widths = [shapes[part].shape[1] for part in parts]
            fields["widths"] = [int(width) // fields["runs"] for width in widths]
        case "pool":
            fields["pool"] = fields.pop("kind")
    return fields


def _bind(
    node: Node, names: dict[int, str], matrices: dict[str, int], vectors: dict[str, int]
) -> tuple[list[int], list[int]]:
    """Weight inputs of a node; a matrix without a bias gets the vector -1."""
    bound = [names[v] for v in node.inputs if v in names]
    if node.op not in (*_LINEARS, "embedding"):
        return [], [vectors[name] for name in bound]
    out_matrices: list[int] = []
    out_vectors: list[int] = []
    for name in bound:
        if name in matrices:
            out_matrices.append(matrices[name])
            out_vectors.append(-1)
        else:
            out_vectors[-1] = vectors[name]
    return out_matrices, out_vectors
