"""A program compiled for a torch device: submits steps, collects them, never waits in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sartor.backends.base import MemoryUse
from sartor.backends.torch.devices import free_bytes
from sartor.backends.torch.graphs import StepGraphs
from sartor.backends.torch.kernels import Kernel, find
from sartor.backends.torch.layout import Layout, StepShape, bucket, is_single, pad, upload
from sartor.backends.torch.linear import members
from sartor.backends.torch.operators import PLAIN
from sartor.backends.torch.sampling import Sampled, SamplingShape, draw, lay_out_sampling
from sartor.backends.torch.state import TorchState
from sartor.backends.torch.step import Step
from sartor.backends.torch.weights import TorchWeight, TorchWeights
from sartor.errors import UsageError
from sartor.graph import Batch, LowRank, Node, Program, Ragged, StepOutput
from sartor.graph.passes import fuse, last_uses, logits_linear
from sartor.ops import FUSED_OPERATORS
from sartor.ops.rope import inverse_frequencies
from sartor.plan import ExecutionPlan

MATRIX_OPERATORS = ("embedding", "linear", "grouped_linear", "head_linear")


@dataclass(frozen=True)
class Outcome:
    """What a pass left on the device: logits (or an encoder's rows), samples, taps."""

    result: Tensor
    sampled: Sampled | None
    taps: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Pending:
    """A step under way: its results on their way to the host, and the end of that."""

    tensors: Mapping[str, Tensor]
    wanted: npt.NDArray[np.int32]  # log probabilities that each output row asked for
    done: torch.cuda.Event | None


class TorchExecutable:
    """Runs a program node by node on one device.

    Where ``bucketed`` is set, steps of single tokens run as *static* steps: padded to a power of
    two of sequences and of state blocks, so that few shapes exist and on CUDA each is captured
    in a graph. Padding works in scratch, and its rows are dropped.
    """

    def __init__(
        self,
        program: Program,
        weights: TorchWeights,
        plan: ExecutionPlan,
        taps: Sequence[str] = (),
    ) -> None:
        for tap in taps:
            program.node(tap)
        self.program = program
        self.plan = plan
        self.device = weights.device
        self.weights: dict[int, TorchWeight] = {
            value: weights.by_name[spec.name] for value, spec in program.weight_values().items()
        }
        self.logits = logits_linear(program)
        self.state = TorchState(program, plan, self.device)
        self.adapters: dict[int, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self.bucketed = self.device.type == "cuda"
        self.stream = _stream(self.device)
        self._graphs = StepGraphs(self) if self.stream is not None else None
        self._weights = weights
        self._taps = tuple(taps)
        self._layout = Layout(program, plan.block_size)
        fused = fuse(program, frozenset(FUSED_OPERATORS), frozenset(taps))
        self.schedule = _schedule(fused)
        self._kernels: dict[tuple[str, tuple[int, ...]], Kernel] = {}
        for node in fused.nodes:
            for part in (node, *(members(node) if node.op == "linear_group" else ())):
                self._kernels[_key(part)] = self._find(part)
        with self._working():
            self.frequencies = [
                torch.from_numpy(inverse_frequencies(spec)).to(self.device)
                for spec in program.ropes
            ]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # weights came by another stream
        self._limits = self._id_limits()
        self._largest = (0, 0, 0)
        self._pending: dict[int, _Pending] = {}
        self._next_handle = 0
        self._last = torch.zeros(0, dtype=torch.int64, device=self.device)

    # Kernels ----------------------------------------------------------------------------

    def _matrix(self, node: Node) -> TorchWeight | None:
        """The matrix that a node multiplies with or reads rows of."""
        if node.op not in MATRIX_OPERATORS:
            return None
        index = 2 if node.op == "grouped_linear" else 1
        return self.weights[node.inputs[index]]

    def _find(self, node: Node) -> Kernel:
        matrix = self._matrix(node)
        found = find(node.op, None if matrix is None else matrix.format, self.device.type)
        return found or Kernel("torch", PLAIN[node.op])

    def kernel(self, node: Node) -> Kernel:
        return self._kernels[_key(node)]

    def kernel_path(self, node: str) -> str:
        found = self.program.node(node)
        kernel, matrix = self._kernels.get(_key(found)) or self._find(found), self._matrix(found)
        if matrix is None:
            return f"{kernel.name} {found.op}"
        int8 = matrix.rounds and found.op != "embedding" and self.plan.activation == "int8"
        return f"{kernel.name} {'int8' if int8 else 'fp32'} {matrix.format.name} {found.op}"

    # State, adapters, memory ------------------------------------------------------------

    def block_bytes(self, group: int) -> int:
        return self.state.block_bytes(group)

    def allocate_state(self, blocks: Sequence[int]) -> None:
        self._settle()
        with self._working():
            self.state.allocate(blocks)

    def load_adapter(self, index: int, layers: Mapping[str, LowRank]) -> None:
        with self._working():
            self.adapters[index] = {
                name: (_copy(layer.down, self.device), _copy(layer.up, self.device))
                for name, layer in layers.items()
            }

    def drop_adapter(self, index: int) -> None:
        del self.adapters[index]

    def memory(self) -> MemoryUse:
        """``scratch`` counts results that live at once in the largest step so far, and buffers of
        captured steps; temporaries inside an operator come on top (:data:`linear.PIECE`,
        :data:`attention.BUDGET`)."""
        adapters = sum(
            part.nbytes for a in self.adapters.values() for layer in a.values() for part in layer
        )
        buffers = 0 if self._graphs is None else self._graphs.nbytes
        return MemoryUse(
            self._weights.nbytes + adapters,
            self.state.nbytes,
            self._live_bytes() + buffers,
            free_bytes(self.device),
        )

    def _live_bytes(self) -> int:
        sizes = dict(zip("TRS", self._largest, strict=True))

        def size(value: int) -> int:
            count = 4
            for dim in self.program.values[value].shape:
                count *= dim if isinstance(dim, int) else sizes.get(dim, 0)
            return count

        live = peak = 0
        for node, dead in self.schedule:
            live += sum(size(value) for value in node.outputs)
            peak = max(peak, live)
            live -= sum(size(v) for v in dead if self.program.values[v].source == "node")
        return peak

    def close(self) -> None:
        self._settle()
        self._pending.clear()
        self.state.free()

    def _settle(self) -> None:
        """Waits until nothing runs and drops graphs, which name the memory of the state."""
        if self.stream is not None:
            self.stream.synchronize()
        if self._graphs is not None:
            self._graphs.clear()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """On the executable's own stream and the plan's threads, without gradients."""
        threads = torch.get_num_threads()  # of the whole process: others may have set them
        torch.set_num_threads(self.plan.threads)
        try:
            with torch.inference_mode(), torch.cuda.stream(self.stream):
                yield
        finally:
            torch.set_num_threads(threads)

    # Steps ------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> int:
        batch.validate()
        self._check(batch)
        rows = len(batch.output_rows)
        with self._working():
            self._copy_blocks(batch)
            outcome, sampling = self._launch(batch)
            tensors = {f"tap.{name}": tap for name, tap in outcome.taps.items()}
            if not self.program.samples:
                tensors["embedding"] = outcome.result
            else:
                sampled = outcome.sampled
                assert sampled is not None
                self._last = sampled.tokens[:rows]
                tensors["tokens"] = self._last
                if sampling.reports:
                    assert sampled.chosen is not None
                    assert sampled.top_tokens is not None
                    assert sampled.top_logprobs is not None
                    tensors["chosen"] = sampled.chosen
                    tensors["top_tokens"] = sampled.top_tokens
                    tensors["top_logprobs"] = sampled.top_logprobs
            tensors = {name: self._to_host(tensor) for name, tensor in tensors.items()}
            done = None
            if self.stream is not None:
                done = self.stream.record_event()
        handle = self._next_handle
        self._next_handle += 1
        self._pending[handle] = _Pending(tensors, batch.sampling["logprobs"].copy(), done)
        sizes = (len(batch.tokens), rows, len(batch.contexts))
        self._largest = tuple(map(max, self._largest, sizes))  # type: ignore[assignment]
        return handle

    def _copy_blocks(self, batch: Batch) -> None:
        """Before the step and outside of its graph: the number of copies is no part of a shape."""
        if batch.copies:
            pairs = {str(g): c.T.astype(np.int64) for g, c in enumerate(batch.copies)}
            for group, on_device in upload(pairs, self.device).items():
                self.state.copy(int(group), on_device)

    def _launch(self, batch: Batch) -> tuple[Outcome, SamplingShape]:
        in_flight = bool((batch.tokens < 0).any())
        blocks = 0
        if self.bucketed and self._can_be_static(batch):
            blocks = bucket(int(batch.contexts.max()) // self.plan.block_size + 1)
            batch = pad(batch, bucket(len(batch.contexts)))
        shape, arrays = self._layout.lay_out(batch, self.state.scratch, blocks)
        sampling, wanted = lay_out_sampling(batch)
        if not self.program.samples:
            return self._eager(shape, arrays, None, in_flight, batch.taps), sampling
        if not blocks or self._graphs is None:
            arrays |= wanted
            return self._eager(shape, arrays, sampling, in_flight, batch.taps), sampling
        if sampling.plain:
            outcome = self._graphs.run(shape, sampling, arrays | wanted, in_flight)
            return outcome, sampling
        # Penalties, biases and log probabilities have sizes of their own: after the graph.
        outcome = self._graphs.run(shape, None, arrays, in_flight)
        sampled = draw(outcome.result, sampling, upload(wanted, self.device))
        return Outcome(outcome.result, sampled, {}), sampling

    def _can_be_static(self, batch: Batch) -> bool:
        special = batch.taps or len(batch.embedding_rows) or (batch.adapters >= 0).any()
        return self.program.samples and is_single(batch) and not special

    def _eager(
        self,
        shape: StepShape,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        sampling: SamplingShape | None,
        in_flight: bool,
        taps: Sequence[str],
    ) -> Outcome:
        on_device = upload(arrays, self.device)
        if in_flight:
            self.resolve(on_device["tokens"])
        return self.run(shape, on_device, sampling, taps)

    def resolve(self, tokens: Tensor) -> None:
        """Puts the outputs of the step before, which may still run, where tokens name them."""
        named = self._last.index_select(0, (-1 - tokens).clamp_(min=0))
        tokens.copy_(torch.where(tokens < 0, named, tokens))

    def run(
        self,
        shape: StepShape,
        arrays: Mapping[str, Tensor],
        sampling: SamplingShape | None,
        taps: Sequence[str] = (),
    ) -> Outcome:
        """One pass over the program: launches work and waits for nothing."""
        step = Step(self, shape, arrays, sampling)
        tapped = step.run(taps)
        outputs = self.program.outputs
        result = step.x(outputs["logits" if self.program.samples else "embedding"])
        return Outcome(result, step.sampled, tapped)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self.stream is None:
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def collect(self, handle: int) -> StepOutput:
        pending = self._pending.pop(handle)
        if pending.done is not None:
            pending.done.synchronize()
        found = {name: tensor.numpy() for name, tensor in pending.tensors.items()}
        taps = {
            name.removeprefix("tap."): array.astype(np.int32) if array.dtype == np.int64 else array
            for name, array in found.items()
            if name.startswith("tap.")
        }
        if "embedding" in found:
            return StepOutput.encoded(found["embedding"], taps)
        logprobs = np.zeros(len(pending.wanted), np.float32)
        starts = np.zeros(len(pending.wanted) + 1, np.int32)
        ids, values = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if "chosen" in found:
            asking = pending.wanted >= 0
            logprobs[asking] = found["chosen"]
            counts = np.minimum(pending.wanted.clip(0), self.program.vocab)
            np.cumsum(counts, out=starts[1:])
            kept = np.arange(found["top_tokens"].shape[1]) < counts[asking][:, None]
            ids = found["top_tokens"][kept].astype(np.int32)
            values = found["top_logprobs"][kept]
        return StepOutput(
            found["tokens"].astype(np.int32),
            logprobs,
            Ragged(ids, starts),
            Ragged(values, starts),
            taps,
        )

    # Checks -----------------------------------------------------------------------------

    def _id_limits(self) -> dict[str, int]:
        """How far token ids and positions may go; beyond, a device would fail for good."""
        names = {value: name for name, value in self.program.inputs.items()}
        limits: dict[str, int] = {}
        for node in self.program.nodes:
            if node.op == "embedding" and node.inputs[0] in names:
                name, rows = names[node.inputs[0]], self.weights[node.inputs[1]].shape[0]
                limits[name] = min(rows, limits.get(name, rows))
        return limits

    def _check(self, batch: Batch) -> None:
        if not self.state.allocated:
            raise UsageError("torch backend: allocate_state before the first step")
        unknown = set(batch.taps) - set(self._taps)
        if unknown:
            raise UsageError(f"taps {sorted(unknown)} were not named when the program was compiled")
        unknown_adapters = set(batch.adapters[batch.adapters >= 0].tolist()) - set(self.adapters)
        if unknown_adapters:
            raise UsageError(f"adapters {sorted(unknown_adapters)} are not loaded")
        for what, ids, limit in (
            ("token", batch.tokens, self._limits.get("token_ids", 0)),
            ("history token", batch.history.values, self.program.vocab),
            ("bias token", batch.bias_tokens.values, self.program.vocab),
        ):
            if limit and len(ids) and ids.max() >= limit:
                raise UsageError(f"batch: {what} {ids.max()} is outside the vocabulary of {limit}")
        limit = self._limits.get("positions", 0)
        if limit and len(batch.positions) and batch.positions.max() >= limit:
            raise UsageError(f"batch: position {batch.positions.max()}; the model has {limit}")
        if len(batch.tokens) and -1 - int(batch.tokens.min()) >= len(self._last):
            raise UsageError(
                f"batch: a token names output row {-1 - int(batch.tokens.min())} of the step "
                f"before, which has {len(self._last)}"
            )


def _key(node: Node) -> tuple[str, tuple[int, ...]]:
    """Tells nodes apart, and a group from its first member."""
    return node.op, node.inputs


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _schedule(program: Program) -> list[tuple[Node, tuple[int, ...]]]:
    """Every node, with the values that nobody reads after it."""
    dead: dict[int, list[int]] = {}
    for value, index in last_uses(program).items():
        dead.setdefault(index, []).append(value)
    return [(node, tuple(dead.get(i, ()))) for i, node in enumerate(program.nodes)]


def _copy(array: npt.NDArray[np.float32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(device)
