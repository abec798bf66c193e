"""Speed before and after tuning: measured in turns, in a stated time, with equal answers."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recorded import Recorded
from sartor.backends.base import KernelTiming
from sartor.bench import gain, phases
from sartor.bench.gain import CONTEXT, SIZES, measure_gain
from sartor.engine.load import LoadedModel, load
from sartor.errors import SartorError
from sartor.plan import ExecutionPlan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sartor.backends.cpu._native") is None,
    reason="the native CPU backend is not built",
)
PLAN = ExecutionPlan(backend="cpu", threads=1, max_context=CONTEXT, max_sequences=1,
                     prefix_cache=False)  # fmt: skip


def timing(**variant: int) -> KernelTiming:
    return KernelTiming("linear", "int8", "f", 8, 8, 1, 1, 1, variant, 1e-6, chosen=True)


class Tuned:
    """Which kernels are in use, and the calls that were made with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, changed: bool) -> None:
        executable: Any = loaded.executable
        self.on = True
        self.runs: list[tuple[bool, int, int]] = []
        self.seconds: Callable[[bool, int, int], float] = lambda on, prompt, decode: 0.0
        self.answer: Callable[[bool], tuple[int, ...]] = lambda on: (1, 2)
        self.now = 0.0
        found = [timing(streams=1)] if changed else [timing()]
        monkeypatch.setattr(executable, "timings", lambda: found)
        monkeypatch.setattr(executable, "use_tuned", self.use)
        monkeypatch.setattr(phases, "single", self.single)
        monkeypatch.setattr(gain.time, "perf_counter", lambda: self.now)

    def use(self, on: bool) -> None:
        self.on = on

    def single(
        self, engine: object, seed: int, *, prompt_tokens: int, decode_tokens: int
    ) -> phases.Single:
        self.runs.append((self.on, prompt_tokens, decode_tokens))
        seconds = self.seconds(self.on, prompt_tokens, decode_tokens)
        self.now += seconds
        rate = 200.0 if self.on else 100.0
        return phases.Single(rate + len(self.runs), rate, 0.1, self.answer(self.on))


@pytest.fixture
def loaded(tiny_path: Path) -> LoadedModel:
    return load(tiny_path, PLAN, "tiny", None)


def test_kernels_take_turns_within_the_time(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned(monkeypatch, loaded, changed=True)
    tuned.seconds = lambda on, prompt, decode: (prompt + decode) / 1000
    progress = Recorded()
    found = measure_gain(loaded, 10.0, progress)
    assert list(found) == ["prompt_512", "decode"]
    assert found["decode"].share == pytest.approx(1.0)
    assert found["decode"].before.median == 100
    assert tuned.now <= 10.0
    counted = [run for run in tuned.runs if run[1:] == SIZES[0]][1:]
    assert len(counted) >= 2 * gain.PAIRS
    pairs = [tuple(on for on, *_ in counted[i : i + 2]) for i in range(0, len(counted), 2)]
    assert set(pairs) == {(True, False), (False, True)}  # nothing favours who comes second
    assert tuned.on  # the chosen kernels stay
    told = progress.phase("speed of tiny, before and after")
    assert (told.total, told.seconds) == (None, 10.0)


def test_a_slow_machine_takes_fewer_tokens(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned(monkeypatch, loaded, changed=True)
    tuned.seconds = lambda on, prompt, decode: (prompt + decode) / 150
    assert list(measure_gain(loaded, 10.0)) == ["prompt_128", "decode"]
    assert tuned.now <= 10.0
    tuned.seconds = lambda on, prompt, decode: float(prompt + decode)
    tuned.runs.clear()
    assert list(measure_gain(loaded, 10.0)) == ["prompt_32", "decode"]
    assert [on for on, *_ in tuned.runs[-2:]] == [True, False]  # one pair in any case


def test_equal_kernels_are_measured_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned(monkeypatch, loaded, changed=False)
    tuned.seconds = lambda on, prompt, decode: (prompt + decode) / 1000
    found = measure_gain(loaded, 5.0)
    assert all(on for on, *_ in tuned.runs)
    assert found["prompt_512"].before == found["prompt_512"].after
    assert found["prompt_512"].share == 0


def test_kernels_that_answer_otherwise_are_a_fault(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned(monkeypatch, loaded, changed=True)
    tuned.seconds = lambda on, prompt, decode: 0.5
    tuned.answer = lambda on: (1, 2 + on)
    with pytest.raises(SartorError, match="compute something else than the default"):
        measure_gain(loaded, 5.0)
    assert tuned.on


def test_a_context_that_holds_nothing_gives_nothing(tiny_path: Path) -> None:
    short = load(tiny_path, PLAN.replace(max_context=40), "tiny", None)
    assert measure_gain(short, 1.0) == {}
    short = load(tiny_path, PLAN.replace(max_context=200), "tiny", None)
    assert list(measure_gain(short, 0.01)) == ["prompt_32", "decode"]


def test_on_the_real_kernels(loaded: LoadedModel) -> None:
    executable: Any = loaded.executable
    executable.tune(10)
    native = executable._native
    begin = time.perf_counter()
    found = measure_gain(loaded, 0.5)
    assert time.perf_counter() - begin < 30
    assert all(g.before.low > 0 < g.after.low for g in found.values())
    assert native is executable._native


def test_a_model_that_makes_vectors(minilm: Path) -> None:
    plan = PLAN.replace(max_context=0)
    encoder = load(minilm, plan, "minilm", None)
    executable: Any = encoder.executable
    executable.tune(0.5)
    found = measure_gain(encoder, 0.5)
    (name,) = found
    assert name.startswith("text_")
    assert found[name].after.median > 0
