"""Random arrivals, aborts and steps: the books stay in order, and every answer is the right one."""

from __future__ import annotations

from collections.abc import Sequence

from engine_helpers import EOS, Engine, Layer, counts, make_engine, request, run, tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sartor.engine.request import Chunk, Request

# Prompts begin alike, so that they share, wait for each other and diverge.
STEMS = [tuple((7 * i + 31 * s) % EOS for i in range(80)) for s in range(2)]


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine: Engine = make_engine()
        self.windows: Sequence[Layer] = (0,)
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.chunks: dict[tuple[str, int], list[Chunk]] = {}

    @initialize(
        windows=st.sampled_from([(0,), (40,), (0, 24), ("recurrent",), (0, "recurrent", 24)]),
        blocks=st.integers(10, 24),
        states=st.integers(2, 8),
        tokens=st.sampled_from([5, 16, 40, 512]),
        places=st.integers(1, 6),
        cache=st.booleans(),
        device=st.sampled_from(["null", "null-async"]),
    )
    def start(
        self,
        windows: Sequence[Layer],
        blocks: int,
        states: int,
        tokens: int,
        places: int,
        cache: bool,
        device: str,
    ) -> None:
        self.windows = windows
        self.engine = make_engine(
            windows=windows,
            blocks=counts(windows, blocks, states),
            context=160,
            max_batch_tokens=tokens,
            max_sequences=places,
            prefix_cache=cache,
            device=device,
        )

    @rule(
        stem=st.sampled_from(STEMS),
        length=st.integers(1, 80),
        tail=st.lists(st.integers(0, EOS), max_size=3),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        max_tokens=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 1.0]),
        ignore_eos=st.booleans(),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        emitted=st.integers(0, 3),
    )
    def arrive(
        self,
        stem: tuple[int, ...],
        length: int,
        tail: list[int],
        n: int,
        emitted: int,
        **params: object,
    ) -> None:
        r = request(
            f"r{len(self.requests)}",
            (*stem[:length], *tail),
            n=n,
            emitted=[[1] * emitted] * n,
            **params,  # type: ignore[arg-type]
        )
        self.requests[r.id] = r
        self.engine.add(r)

    @rule(which=st.integers(0, 1 << 30))
    def abort(self, which: int) -> None:
        if self.requests:
            name = list(self.requests)[which % len(self.requests)]
            self.aborted.add(name)
            self.engine.abort(name)

    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        for _ in range(times):
            for chunk in self.engine.step():
                self.chunks.setdefault((chunk.request_id, chunk.choice), []).append(chunk)
            self.engine.check()

    @invariant()
    def books_are_in_order(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        for _ in range(100_000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "the engine does not come to an end"
        assert not any(self.engine.blocks_held())
        expected = {(r.id, c) for r in self.requests.values() for c in range(r.params.n)}
        assert self.chunks.keys() == expected
        for chunks in self.chunks.values():
            assert [c.finish_reason is not None for c in chunks].count(True) == 1
            assert chunks[-1].finish_reason is not None
            assert chunks[-1].finish_reason != "error"
        for r in list(self.requests.values())[:4]:
            if r.id not in self.aborted:
                alone = run(make_engine(windows=self.windows, context=160, blocks=64), r)
                for choice in range(r.params.n):
                    key = (r.id, choice)
                    assert tokens(self.chunks[key]) == tokens(alone[key])


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=30,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
