"""Benchmarks: what is measured, what is reported, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from recorded import Recorded
from sartor.backends.registry import load_backend
from sartor.bench import BenchReport, Spread, phases, run_bench
from sartor.bench.ceiling import PhaseCeiling, PhaseWork, phase_ceiling
from sartor.bench.memory import peak_rss_bytes
from sartor.bench.profile import OperatorTime, by_operator, work_by_operator
from sartor.engine.engine import Engine
from sartor.engine.load import load, make_engine
from sartor.engine.request import Request
from sartor.errors import CapacityError, SartorError, UnsupportedError, UsageError
from sartor.graph import Batch, Builder, ProgramWork, StepShape
from sartor.hardware import Bound, Ceilings, Peak, Work
from sartor.plan import ExecutionPlan

NULL = ExecutionPlan(backend="null", state_bytes=1 << 20, max_context=1024, prefix_cache=False)
NUMBERS = {
    "prompt_512_tps",
    "decode_tps",
    "batch_16_tps",
    "load_seconds",
    "peak_rss_mb",
    "bits_per_weight",
    "threads",
}


def null_engine(path: Path, **fields: object) -> Engine:
    return make_engine(load(path, NULL.replace(**fields), "tiny", None))


class _Watch:
    """Remembers what an engine was asked to do."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        add = engine.add

        def watched(request: Request) -> None:
            self.requests.append(request)
            add(request)

        monkeypatch.setattr(engine, "add", watched)


def test_report_has_every_number(tiny_path: Path) -> None:
    if importlib.util.find_spec("sartor.backends.cpu._native") is None:
        pytest.skip("the native CPU backend is not built")
    plan = ExecutionPlan(backend="cpu", threads=1, head_bits=4)
    report = run_bench(tiny_path, "tiny", plan, batches=(16, 2), repeats=2, profile=True)
    found = report.to_json_dict()
    assert json.loads(json.dumps(found)) == found
    for name in NUMBERS | {"batch_2_tps"}:
        assert float(str(found[name])) > 0, name
    for rate in ("prompt_512", "decode", "batch_2", "batch_16"):
        low, median, high = (found[f"{rate}_tps{end}"] for end in ("_min", "", "_max"))
        assert low <= median <= high  # type: ignore[operator]
    assert (found["model"], found["device"], found["threads"]) == ("tiny", "cpu", 1)
    assert (found["activation"], found["kv"], found["repeats"]) == ("int8", "bf16", 2)
    assert found["head_bits"] == 4
    assert found["isa"] == load_backend("cpu").devices()[0].isa
    assert found["machine"]
    assert 0 < float(str(found["decode_host_share"])) < 1
    assert 20 < float(str(found["peak_rss_mb"])) <= peak_rss_bytes() / 1e6
    ceilings = found["ceilings"]
    assert isinstance(ceilings, dict)
    assert (ceilings["threads"], ceilings["isa"]) == (1, found["isa"])
    for rate in ("prompt_512", "decode", "batch_2", "batch_16"):
        assert found[f"{rate}_share_of_ceiling"] == pytest.approx(
            float(str(found[f"{rate}_tps"])) / float(str(found[f"{rate}_ceiling_tps"]))
        )
        assert found[f"{rate}_limit"] in ("memory", "arithmetic")
        operators = found[f"profile_{rate}"]
        assert isinstance(operators, dict)
        seconds = [operator["seconds"] for operator in operators.values()]
        assert seconds == sorted(seconds, reverse=True)
        assert any("layers.*." in name for name in operators)
        head = operators["lm_head"]
        assert head["share_of_roofline"] == head["roofline_seconds"] / head["seconds"]
        assert head["bytes"] > 0
        assert sum(head["operations"].values()) > 0
        assert operators["sample"]["share_of_roofline"] is None


def test_median_and_extremes() -> None:
    assert Spread.of([5.0, 1.0, 3.0]) == Spread(3.0, 1.0, 5.0)
    assert Spread.of([4.0, 2.0]).median == 3.0


def test_report_takes_medians_of_counted_rounds(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round warms up and does not count; the others do, each once."""
    prompts = [1.0, 10.0, 30.0, 20.0]
    batches = [1.0, 7.0, 9.0, 8.0]

    def single(engine: Engine, seed: int, mark: phases.Mark) -> phases.Single:
        return phases.Single(prompts[seed], 2 * prompts[seed], prompts[seed] / 100)

    monkeypatch.setattr(phases, "single", single)
    monkeypatch.setattr(phases, "batch", lambda engine, size, seed, mark: size * batches[seed])
    report = run_bench(tiny_path, "tiny", NULL, batches=(4, 4, 2), repeats=3)
    assert report.rates == {
        "prompt_512": Spread(20.0, 10.0, 30.0),
        "decode": Spread(40.0, 20.0, 60.0),
        "batch_2": Spread(16.0, 14.0, 18.0),
        "batch_4": Spread(32.0, 28.0, 36.0),
    }
    assert report.host_share == pytest.approx(0.2)


def test_how_far_it_is(tiny_path: Path) -> None:
    progress = Recorded()
    run_bench(tiny_path, "tiny", NULL, batches=(2,), repeats=2, progress=progress)
    assert [told.name for told in progress.phases[:2]] == ["loading tiny", "measuring tiny"]
    told = progress.phase("measuring tiny")
    assert told.done == told.total == 3 * sum(phases.costs([2]).values())
    rounds = [part for part in told.parts if "of 3" in part]
    assert rounds[:4] == [
        "prompt_512, 1 of 3", "decode, 1 of 3", "batch_2, 1 of 3", "prompt_512, 1 of 3",
    ]  # fmt: skip
    assert "batch_2, 3 of 3" in rounds


def test_rates_follow_the_device(tiny_path: Path) -> None:
    """A device that takes 4 ms a step bounds every rate, and prompts are no part of a batch."""
    engine = null_engine(tiny_path, device="null-4ms")
    one = phases.single(engine, 0)
    assert one.decode < 250
    assert one.prompt < 512 / 0.004
    assert one.decode > 25
    assert one.host_share < 0.9
    assert 16 * 25 < phases.batch(engine, 16, 0) < 16 * 250


def test_single_runs_one_prompt_and_64_steps(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = null_engine(tiny_path)
    watch = _Watch(engine, monkeypatch)
    marks: list[tuple[str, int]] = []
    phases.single(engine, 0, lambda phase: marks.append((phase, len(engine.records))))
    (request,) = watch.requests
    assert len(request.prompt) == 512
    assert request.params.temperature == 0
    assert request.params.ignore_eos
    prompts, decodes = engine.records[0], list(engine.records)[1:]
    assert prompts.prompt_tokens == 512
    assert len(decodes) == 64
    assert all((r.decode_tokens, r.prompt_tokens) == (1, 0) for r in decodes)
    assert marks == [("prompt_512", 1), ("decode", 65)]
    assert not engine.has_work
    assert not any(engine.blocks_held())


class _Shapes:
    """Remembers the steps that an engine makes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[StepShape] = []
        submit = engine.executable.submit

        def watched(batch: Batch) -> int:
            lengths = np.diff(batch.starts).tolist()
            self.steps.append(
                StepShape(tuple(lengths), tuple(batch.contexts.tolist()), len(batch.output_rows))
            )
            return submit(batch)

        monkeypatch.setattr(engine.executable, "submit", watched)


@pytest.mark.parametrize("most", [512, 200])
def test_steps_are_counted_as_the_engine_makes_them(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    engine = null_engine(tiny_path, max_batch_tokens=most)
    watch = _Shapes(engine, monkeypatch)
    phases.single(engine, 0)
    expected = phases.shapes([4], most)
    assert watch.steps == expected["prompt_512"] + expected["decode"]
    watch.steps.clear()
    phases.batch(engine, 4, 0)
    # The sequences that began first are a few tokens further.
    for step, counted in zip(watch.steps[-32:], expected["batch_4"], strict=True):
        assert (step.lengths, step.outputs) == (counted.lengths, counted.outputs)
        assert all(0 <= a - b <= 4 for a, b in zip(step.contexts, counted.contexts, strict=True))


def test_ceilings_of_phases_follow_what_binds() -> None:
    def peak(rate: float) -> Peak:
        return Peak(rate, 1e9, 0.0, 1)

    ceilings = Ceilings(1e9, peak(1e11), peak(1e10), None, 1, "amx")
    slow = phase_ceiling(PhaseWork(1, Work(5e7, {"int8": 2e8})), ceilings)
    assert slow == PhaseCeiling(pytest.approx(20), "memory")
    fast = phase_ceiling(PhaseWork(64, Work(5e7, {"int8": 1e10, "fp32": 1e9})), ceilings)
    assert fast == PhaseCeiling(pytest.approx(64 / 0.2), "arithmetic")


def test_operators_stand_beside_their_work() -> None:
    b = Builder()
    x = b.embedding(b.token_ids, "embed", 32, 8)
    for layer in ("layers.0", "layers.1"):
        with b.scope(layer):
            x = b.add(x, b.linear(x, "up", 8))
    program = b.finish(b.linear(b.gather_rows(x, b.output_rows), "head", 32))
    work = ProgramWork(program, {spec.name: 100 for spec in program.weights}, 2, {"head": "int8"})
    step = StepShape((1, 1), (5, 9), 2)
    found = work_by_operator(work, [step, step])
    assert found["layers.*.up"] == Work(2 * 2 * 100, {"fp32": 2 * 2 * 2 * 2 * 64})
    assert found["head"] == Work(200, {"int8": 2 * 2 * 2 * 8 * 32})
    ceilings = Ceilings(1e3, Peak(1e3, 0, 0, 1), Peak(1e4, 0, 0, 1), None, 1, "")
    head = OperatorTime.of(4.0, found["head"], ceilings)
    assert head.bound == Bound(pytest.approx(2.048), "arithmetic")
    assert head.reached == pytest.approx(0.512)
    up = OperatorTime.of(1.0, found["layers.*.up"], ceilings)
    both = OperatorTime.total([head, up], ceilings)
    assert both.seconds == 5.0
    assert both.bound == Bound(pytest.approx(2.048 + 0.1024), "arithmetic")
    assert OperatorTime.of(1.0, Work(), ceilings).reached is None
    assert OperatorTime.of(1.0, found["head"], None).bound is None


def test_a_device_that_cannot_tell_has_no_ceilings(tiny_path: Path) -> None:
    report = run_bench(tiny_path, "tiny", NULL, batches=(2,), repeats=1)
    assert report.ceilings is None
    assert report.share_of_ceiling("decode") is None
    assert report.to_json_dict()["ceilings"] is None


def test_batch_measures_steps_in_which_all_decode(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = null_engine(tiny_path)
    watch = _Watch(engine, monkeypatch)
    phases.batch(engine, 16, 0)
    assert [len(request.prompt) for request in watch.requests] == [128] * 16
    assert len({request.prompt for request in watch.requests}) == 16
    last = list(engine.records)[-32:]
    assert all((r.decode_tokens, r.prompt_tokens) == (16, 0) for r in last)
    assert not engine.has_work


def test_prefix_cache_is_off(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ExecutionPlan] = []

    def measured(engine: Engine, batches: Sequence[int], repeats: int, *shown: object) -> object:
        seen.append(engine.executable.plan)
        return {}, 0.0

    monkeypatch.setattr("sartor.bench.run.measure", measured)
    plan = NULL.replace(prefix_cache=True, max_sequences=4, max_batch_tokens=100)
    report: BenchReport = run_bench(tiny_path, "tiny", plan, batches=(80,))
    assert not seen[0].prefix_cache
    assert seen[0].max_sequences >= 80
    assert report.max_batch_tokens == 160


def test_prompts_are_fixed_and_without_special_tokens() -> None:
    special = frozenset({0, 3})
    ids = phases.synthetic_prompt(1, 500, 10, special)
    assert ids == phases.synthetic_prompt(1, 500, 10, special)
    assert ids != phases.synthetic_prompt(2, 500, 10, special)
    assert set(ids) == set(range(10)) - special


def test_layers_are_added_up() -> None:
    seconds = [("model.layers.0.q", 1.0), ("head", 5.0), ("model.layers.11.q", 2.0)]
    assert by_operator(seconds) == {"head": 5.0, "model.layers.*.q": 3.0}
    assert next(iter(by_operator(seconds))) == "head"


def test_context_too_small_is_an_error(tiny_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"tiny: bench needs 577 tokens.*there are 300"):
        run_bench(tiny_path, "tiny", NULL.replace(max_context=300))


def test_batch_that_does_not_fit_is_an_error(tiny_path: Path) -> None:
    block = NULL.block_size * 8  # bytes of a block on the null device
    engine = null_engine(tiny_path, state_bytes=40 * block)
    with pytest.raises(CapacityError, match="batch of 16 does not fit"):
        phases.batch(engine, 16, 0)


def test_wrong_numbers_are_refused(tiny_path: Path) -> None:
    for fields in ({"repeats": 0}, {"batches": (0,)}, {"batches": ()}):
        with pytest.raises(UsageError, match="at least 1"):
            run_bench(tiny_path, "tiny", NULL, **fields)  # type: ignore[arg-type]


def test_profile_of_a_backend_without_one(tiny_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="null cannot time"):
        run_bench(tiny_path, "tiny", NULL, repeats=1, profile=True)


def test_a_failing_model_is_an_error(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = null_engine(tiny_path)

    def broken(batch: object) -> int:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.executable, "submit", broken)
    with pytest.raises(SartorError, match="out of luck"):
        phases.single(engine, 0)


def test_peak_is_at_least_what_is_held() -> None:
    import psutil

    assert peak_rss_bytes() > 0.5 * psutil.Process().memory_info().rss
