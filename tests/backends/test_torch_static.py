"""Static steps: padded to buckets, they give what plain steps give and touch nobody's state."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sartor.backends.registry import load_backend  # noqa: E402
from sartor.backends.torch.executable import Outcome, TorchExecutable  # noqa: E402
from sartor.backends.torch.graphs import StepGraphs, in_scratch  # noqa: E402
from sartor.backends.torch.layout import StepShape, bucket, pad  # noqa: E402
from sartor.graph import SAMPLING_ROW, Batch, Builder, Program, Ragged  # noqa: E402
from sartor.ops.rope import RopeSpec  # noqa: E402
from sartor.ops.weights import Weight, dense, quantize_affine  # noqa: E402
from sartor.plan import ExecutionPlan  # noqa: E402

VOCAB, WIDTH, BLOCK, BLOCKS = 64, 32, 16, 40
BACKEND = load_backend("torch")
GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")


def program() -> Program:
    """Every kind of state: full and window attention, latents, convolution, recurrence; experts."""
    b = Builder()
    x = b.embedding(b.token_ids, "embed", VOCAB, WIDTH)
    for window in (0, 20):
        with b.scope(f"attention{window}"):
            spec = RopeSpec(8, kind="dynamic", factor=2.0, original_context=16)
            h = b.rms_norm(x, "norm", eps=1e-5)
            q = b.rope(b.linear(h, "q", WIDTH), spec, 8, "q_rope")
            k = b.rope(b.linear(h, "k", 16), spec, 8, "k_rope")
            v = b.linear(h, "v", 16)
            sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.3}
            a = b.attention(q, k, v, window=window, sinks=window > 0, **sizes)
            x = b.add(x, b.linear(a, "o", WIDTH))
    with b.scope("latent"):
        h = b.rms_norm(x, "norm", eps=1e-5)
        parts = [b.linear(h, name, width) for name, width in (("q", 48), ("c", 16), ("r", 8))]
        a = b.latent_attention(*parts, heads=2, scale=0.3)
        x = b.add(x, b.linear(a, "o", WIDTH))
    with b.scope("recurrent"):
        h = b.short_conv(b.rms_norm(x, "norm", eps=1e-5), "conv", 4)
        q, k = (b.l2_norm(b.linear(h, name, 16), 8, 1e-6, f"{name}_norm") for name in "qk")
        gates = [b.activation(b.linear(h, name, 4), "sigmoid", f"{name}_gate") for name in "db"]
        a = b.recurrent_scan(
            q, k, b.linear(h, "v", 32), *gates, heads=4, key_heads=2, scale=0.5, delta=True
        )
        x = b.add(x, b.linear(a, "o", WIDTH))
    with b.scope("experts"):
        chosen, weights = b.route_experts(b.linear(x, "router", 6), top_k=2)
        h = b.grouped_linear(x, chosen, "up", 6, WIDTH, 32)
        h = b.grouped_linear(b.activation(h, "silu"), chosen, "down", 6, 32, WIDTH)
        x = b.add(x, b.combine_experts(h, weights))
    x = b.gather_rows(b.rms_norm(x, "norm", eps=1e-5), b.output_rows)
    return b.finish(b.linear(x, "head", VOCAB))


class Source:
    def __init__(self, program: Program) -> None:
        self._shapes = {spec.name: spec.shape for spec in program.weights}

    def weight(self, name: str) -> Weight:
        shape = self._shapes[name]
        rng = np.random.default_rng(sum(name.encode()))
        values = (rng.standard_normal(shape) * 1.5 * shape[-1] ** -0.5).astype(np.float32)
        quantized = len(shape) == 2 and shape[1] % 32 == 0 and "router" not in name
        return quantize_affine(name, values, bits=4) if quantized else dense(name, values)

    def identity(self) -> str:
        return "static"


def executable(*, bucketed: bool, device: str = "torch-cpu") -> TorchExecutable:
    model = program()
    plan = ExecutionPlan(activation="fp32", kv="fp32", block_size=BLOCK, device=device, threads=1)
    found = BACKEND.compile(model, BACKEND.pack(model, Source(model), plan, None), plan, device)
    assert isinstance(found, TorchExecutable)
    found.allocate_state([BLOCKS] * len(model.groups()))
    found.bucketed = bucketed
    return found


class Books:
    """Three sequences, their blocks scattered; builds the batch of every step."""

    def __init__(self, found: TorchExecutable) -> None:
        self.groups = found.program.groups()
        rng = np.random.default_rng(4)
        self.tables = [rng.permutation(BLOCKS)[:15].reshape(3, 5) for _ in self.groups]
        self.contexts = np.zeros(3, np.int32)

    def batch(self, tokens: dict[int, list[int]], **row: float) -> Batch:
        """One step of some sequences; every one gives an output."""
        ids = list(tokens)
        lengths = np.array([len(tokens[s]) for s in ids])
        contexts = self.contexts[ids]
        starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        tables = []
        for group, table in zip(self.groups, self.tables, strict=True):
            held = table[ids].astype(np.int32)
            for row_of, context, n in zip(held, contexts, lengths, strict=True):
                end = (context + n - 1) // BLOCK
                row_of[end + 1 :] = -1
                if group.kind == "recurrent":
                    row_of[: max(0, context - 1) // BLOCK] = -1
                elif group.window:
                    row_of[: max(0, context - group.window + 1) // BLOCK] = -1
            tables.append(held)
        self.contexts[ids] += lengths.astype(np.int32)
        sampling = np.zeros(len(ids), SAMPLING_ROW)
        sampling["top_p"], sampling["repetition_penalty"] = 1, 1
        sampling["logprobs"], sampling["position"] = -1, self.contexts[ids]
        for name, value in row.items():
            sampling[name] = value
        none = Ragged(np.zeros(0, np.int32), np.zeros(len(ids) + 1, np.int32))
        spans = zip(contexts, lengths, strict=True)
        return Batch(
            tokens=np.array([t for s in ids for t in tokens[s]], np.int32),
            positions=np.concatenate([np.arange(c, c + n, dtype=np.int32) for c, n in spans]),
            starts=starts,
            contexts=contexts,
            block_tables=tuple(tables),
            rope_lengths=np.full(len(ids), 80, np.int32),
            output_rows=starts[1:] - 1,
            sampling=sampling,
            history=none,
            bias_tokens=none,
            bias_values=Ragged(np.zeros(0, np.float32), none.starts),
        )


PROMPTS = {0: list(range(33)), 1: [5], 2: list(range(9, 25))}
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 0.9},
    "cut": {"temperature": 0.9, "top_k": 7},
    "reported": {"temperature": 0.9, "top_k": 7, "logprobs": VOCAB},
}


def answers(found: TorchExecutable, steps: int = 20, **row: float) -> list[list[float]]:
    """Tokens and log probabilities of prompts and the steps after; sequences come and go."""
    books = Books(found)
    next_tokens = dict(PROMPTS)
    out = []
    for step in range(steps):
        there = [s for s in (0, 1, 2) if step == 0 or (step + s) % 5]
        batch = books.batch({s: next_tokens[s] for s in there}, **row)
        output = found.collect(found.submit(batch))
        for s, token in zip(there, output.tokens.tolist(), strict=True):
            next_tokens[s] = [token]
        out.append([*output.tokens.tolist(), *output.top_logprobs.values.tolist()])
    return out


def spy(found: TorchExecutable, shapes: list[StepShape]) -> TorchExecutable:
    run = found.run

    def record(shape: StepShape, *args: object) -> object:
        shapes.append(shape)
        return run(shape, *args)  # type: ignore[arg-type]

    found.run = record  # type: ignore[method-assign, assignment]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_step_equals_a_plain_one(kind: str) -> None:
    shapes: list[StepShape] = []
    plain, static = executable(bucketed=False), spy(executable(bucketed=True), shapes)
    expected, got = answers(plain, **KINDS[kind]), answers(static, **KINDS[kind])
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    # After the prompts: 1 to 4 sequences, 1 to 4 blocks.
    assert {shape.sequences for shape in shapes[1:]} <= {2, 4}
    assert len(set(shapes[1:])) <= 4
    # What anybody holds is the same; only scratch differs.
    for mine, theirs in zip(plain.state._pools, static.state._pools, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.data[:-1], other.data[:-1], atol=1e-4, rtol=1e-4)


def test_chunks_and_company_change_little() -> None:
    """Prompts of all three at once, or one after the other in pieces."""
    together, apart = executable(bucketed=False), executable(bucketed=True)
    expected = Books(together).batch(PROMPTS, logprobs=VOCAB)
    one = together.collect(together.submit(expected)).top_logprobs.values.reshape(3, VOCAB)
    books = Books(apart)
    for s, prompt in PROMPTS.items():
        for at in range(0, len(prompt), 7):
            batch = books.batch({s: prompt[at : at + 7]}, logprobs=VOCAB)
            output = apart.collect(apart.submit(batch))
        np.testing.assert_allclose(output.top_logprobs.values, one[s], atol=2e-4)


@pytest.mark.parametrize("device", ["torch-cpu", pytest.param("cuda:0", marks=on_gpu)])
@pytest.mark.parametrize("bucketed", [False, True])
def test_tokens_in_flight(device: str, bucketed: bool) -> None:
    """A step names outputs of the one before, which is collected only afterwards."""
    waiting, flying = (executable(bucketed=bucketed, device=device) for _ in range(2))
    expected, got = [], []
    books = Books(waiting)
    tokens = dict(PROMPTS)
    for _ in range(6):
        output = waiting.collect(waiting.submit(books.batch(tokens, temperature=1.0)))
        tokens = {s: [int(t)] for s, t in enumerate(output.tokens)}
        expected.append(output.tokens.tolist())
    books = Books(flying)
    handles = [flying.submit(books.batch(PROMPTS, temperature=1.0))]
    for step in range(5):
        order = [2, 0, 1] if step % 2 else [0, 1, 2]
        before = [0, 1, 2] if step % 2 or step == 0 else [2, 0, 1]
        named = {s: [-1 - before.index(s)] for s in order}
        handles.append(flying.submit(books.batch(named, temperature=1.0)))
    for step, handle in enumerate(handles):
        row = flying.collect(handle).tokens.tolist()
        got.append(row if step % 2 or step == 0 else [row[i] for i in np.argsort([2, 0, 1])])
    assert got == expected


def test_capture_works_in_scratch_alone() -> None:
    found = executable(bucketed=True)
    books = Books(found)
    found.collect(found.submit(books.batch(PROMPTS)))
    before = [[pool.data.clone() for pool in pools] for pools in found.state._pools]
    batch = pad(books.batch({0: [1], 1: [-1], 2: [3]}), 4)
    shape, arrays = found._layout.lay_out(batch, found.state.scratch, 4)
    moved = {n: torch.from_numpy(np.array(a)) for n, a in in_scratch(found, arrays).items()}
    with found._working():
        found.run(shape, moved, None)
    for pools, old in zip(found.state._pools, before, strict=True):
        for pool, kept in zip(pools, old, strict=True):
            assert torch.equal(pool.data[:-1], kept[:-1])


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]


def test_special_steps_are_not_padded() -> None:
    shapes: list[StepShape] = []
    found = spy(executable(bucketed=True), shapes)
    books = Books(found)
    found.load_adapter(0, {})
    batch = books.batch({s: [1] for s in PROMPTS})
    batch = dataclasses.replace(batch, adapters=np.array([0, -1, -1], np.int32))
    found.collect(found.submit(batch))
    assert shapes[0].sequences == 3


class Replay:
    """Stands in for a CUDA graph on the CPU: runs again what was run while it was captured, over
    the same input buffer, and leaves the results where the capture left them."""

    def __init__(self, found: TorchExecutable) -> None:
        self.run, self.calls = found.run, []
        found.run = self.record  # type: ignore[method-assign, assignment]

    def record(self, *args: object) -> Outcome:
        self.calls.append((args, self.run(*args)))  # type: ignore[arg-type]
        return self.calls[-1][1]

    def replay(self) -> None:
        args, outcome = self.calls[-1]
        again = self.run(*args)
        outcome.result.copy_(again.result)
        if outcome.sampled is not None:
            outcome.sampled.tokens.copy_(again.sampled.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_replays_read_the_buffer_and_outputs_are_copies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, found = executable(bucketed=False), executable(bucketed=True)
    graphs: list[Replay] = []

    def new_graph() -> Replay:
        graphs.append(Replay(found))
        return graphs[-1]

    @contextlib.contextmanager
    def capture(graph: Replay, **_: object) -> Iterator[None]:
        yield
        found.run = graph.run  # type: ignore[method-assign]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    found._graphs = StepGraphs(found)
    books, in_flight = Books(plain), Books(found)
    row = KINDS[kind]
    tokens = dict(PROMPTS)
    expected, handles = [], [found.submit(in_flight.batch(PROMPTS, **row))]
    for step in range(6):
        output = plain.collect(plain.submit(books.batch(tokens, **row)))
        tokens = {s: [int(t)] for s, t in enumerate(output.tokens)}
        expected.append(output.tokens.tolist())
        if step:
            handles.append(found.submit(in_flight.batch({s: [-1 - s] for s in PROMPTS}, **row)))
    assert [found.collect(handle).tokens.tolist() for handle in handles] == expected
    assert found._graphs.count == len(graphs) == 1
    assert found.memory().scratch > found._live_bytes()
    found.close()
    assert found._graphs.count == 0


# On a GPU -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_what_plain_steps_give(kind: str) -> None:
    plain, graphs = (executable(bucketed=b, device="cuda:0") for b in (False, True))
    expected, got = answers(plain, **KINDS[kind]), answers(graphs, **KINDS[kind])
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert graphs._graphs is not None
    assert 1 <= graphs._graphs.count <= 4
    assert plain._graphs is not None
    assert plain._graphs.count == 0
    graphs.allocate_state([BLOCKS] * len(graphs.program.groups()))
    assert graphs._graphs.count == 0  # they named the old state's memory


@on_gpu
@pytest.mark.parametrize("bucketed", [False, True])
def test_a_step_does_not_wait_for_the_gpu(bucketed: bool) -> None:
    found = executable(bucketed=bucketed, device="cuda:0")
    books = Books(found)
    found.collect(found.submit(books.batch(PROMPTS)))
    row = {"temperature": 1.0, "top_p": 0.9}
    found.collect(found.submit(books.batch({s: [1] for s in PROMPTS}, **row)))  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [
            found.submit(books.batch({s: [-1 - s] for s in PROMPTS}, **row)) for _ in range(3)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for handle in handles:
        assert len(found.collect(handle).tokens) == 3
