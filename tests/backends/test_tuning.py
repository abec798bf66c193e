"""The tuner: what it measures, how it chooses, when it stops, and what it keeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from test_bitwise import BLOCK, _batch, _program, _Weights

from recorded import Recorded
from sartor.backends.base import Tunable
from sartor.backends.cpu import _native
from sartor.backends.cpu.backend import CpuBackend, CpuExecutable
from sartor.backends.cpu.tuned import TunedDevice, TunedStore
from sartor.backends.cpu.tuning import (
    DEFAULT,
    GAIN,
    PASS_SECONDS,
    Job,
    Layers,
    LinearVariant,
    Traits,
    Tuner,
    candidates,
    jobs_of,
    typical,
)
from sartor.plan import ExecutionPlan

Native = tuple[int, bool, int, int]
AMX = Traits(4, 4, True)
PLAIN = Layers("linear", "int8", "affine4g32", 4096, 1024, 1, 1, 32, 256, False, (0, 2))
HEAD = dataclasses.replace(PLAIN, activation="int16", outputs_only=True, instructions=(5,))
DEVICE = TunedDevice("a processor", "amx", 2, 1, "a module")


class Machine:
    """Executor and clock in one: a variant takes the seconds that ``cost`` says, by layer."""

    def __init__(self, base: float = 1e-5, **gains: float) -> None:
        self.now = 0.0
        self.base = base
        self.gains = gains  # by field: seconds that a value other than the default's takes
        self.variants: dict[tuple[int, int], Native] = {}
        self.calls: list[tuple[tuple[int, ...], int, Native]] = []
        self.noise = np.random.default_rng(0)

    def clock(self) -> float:
        return self.now

    def set_variant(self, instruction: int, bucket: int, variant: Native) -> None:
        self.variants[instruction, bucket] = variant

    def time_linears(self, instructions: Sequence[int], rows: int, variant: Native) -> list[float]:
        self.calls.append((tuple(instructions), rows, variant))
        factor = 1.0
        for name in LinearVariant(*variant).changes():
            factor *= self.gains.get(name, 1.0)
        disturbed = self.noise.random(len(instructions)) < 0.3
        seconds = [self.base * rows * factor * (4 if d else 1) for d in disturbed]
        self.now += sum(seconds)
        return seconds


def tuner(machine: Machine, layers: Sequence[Layers] = (PLAIN, HEAD), **options: object) -> Tuner:
    given: dict[str, object] = {"store": None, **options}
    return Tuner(machine, layers, AMX, 2, clock=machine.clock, **given)  # type: ignore[arg-type]


def test_the_faster_variant_is_chosen_and_used_for_its_rows() -> None:
    machine = Machine(streams=0.8)
    found = tuner(machine)
    assert found.run(1e9)
    chosen = {(t.activation, t.rows): t for t in found.timings() if t.chosen}
    assert len(chosen) == len(jobs_of([PLAIN, HEAD])) == 8 + 5
    for (_, rows), timing in chosen.items():
        assert (timing.variant.get("streams") == 1) == (rows <= AMX.direct_rows)
        assert timing.seconds == pytest.approx(1e-5 * rows * (0.8 if rows <= 4 else 1), rel=1e-3)
    for (_, bucket), variant in machine.variants.items():
        assert variant[0] == (bucket <= 2)
    assert {i for i, _ in machine.variants} == {0, 2, 5}


@pytest.mark.parametrize(("factor", "changes"), [(1 - GAIN - 0.01, True), (1 - GAIN + 0.01, False)])
def test_a_gain_below_the_threshold_changes_nothing(factor: float, changes: bool) -> None:
    machine = Machine(tiles=factor)
    found = tuner(machine, [PLAIN])
    assert found.run(1e9)
    for timing in found.timings():
        if timing.chosen and timing.rows > 8:
            assert (timing.variant.get("tiles") == 0) == changes


def test_all_layers_take_their_turn_in_a_pass() -> None:
    machine = Machine()
    tuner(machine, [PLAIN]).run(1e9)
    seen = [i for instructions, rows, _ in machine.calls for i in instructions if rows == 128]
    assert all(a != b for a, b in itertools.pairwise(seen))


def test_the_budget_ends_it() -> None:
    machine = Machine(base=1e-4)
    found = tuner(machine, budget=0.5)
    assert found.run(1e9)
    assert machine.now <= 0.5 + 2 * PASS_SECONDS
    assert 0 < len({timing.layer for timing in found.timings()}) < 8 + 5
    calls = len(machine.calls)
    assert found.run(1e9)
    assert len(machine.calls) == calls


def test_how_far_it_is() -> None:
    progress = Recorded()
    found = tuner(Machine())
    assert not found.run(0.01, progress)
    assert found.run(1e9, progress)
    first, second = progress.phases
    assert (first.name, first.total, first.unit) == ("measuring kernels", 8 + 5, "layers")
    assert first.seconds == 0.01
    assert 9 < (second.seconds or 0) <= 10  # what is left of the budget
    assert first.done < second.done == second.total == 8 + 5
    assert found.run(1e9, progress)
    assert len(progress.phases) == 2  # nothing was left to do


def test_the_defaults_can_be_used_for_a_while() -> None:
    machine = Machine(streams=0.8)
    found = tuner(machine)
    found.run(1e9)
    chosen = dict(machine.variants)
    assert set(chosen.values()) != {DEFAULT.native()}
    found.use_chosen(False)
    assert set(machine.variants.values()) == {DEFAULT.native()}
    found.use_chosen(True)
    assert machine.variants == chosen


def test_slices_are_short_and_lead_to_the_end() -> None:
    machine = Machine()
    found = tuner(machine)
    slices = 0
    while True:
        begin = machine.now
        done = found.run(0.02)
        assert machine.now - begin <= 0.02 + PASS_SECONDS
        slices += 1
        if done:
            break
    assert slices > 10
    assert len({timing.layer for timing in found.timings()}) == 8 + 5


def test_layers_too_long_for_a_slice_keep_their_default() -> None:
    machine = Machine(base=1e-3)
    found = tuner(machine, [PLAIN], budget=1e9)
    while not found.run(0.03):
        pass
    assert max(rows for _, rows, _ in machine.calls) == 16
    whole = tuner(machine, [PLAIN], budget=1e9)
    assert whole.run(1e9)
    assert max(rows for _, rows, _ in machine.calls) == 128


@pytest.mark.parametrize("isa", _native.usable_paths())
@pytest.mark.parametrize("activation", ["int8", "fp32"])
def test_candidates_fit_every_path(isa: str, activation: str) -> None:
    executable = _executable(isa=isa, activation=activation)
    traits = Traits(*_native.linear_traits(isa))
    index = [node.op for node in executable.program.nodes].index("linear")
    for job in jobs_of([PLAIN, HEAD, dataclasses.replace(PLAIN, slots=6, group=0)]):
        offered = candidates(job, traits, 2)
        assert offered[0] == DEFAULT
        assert 1 < len(offered) == len(set(offered)) < 25
        for variant in offered:
            executable._native.set_variant(index, job.bucket, variant.native())
            assert LinearVariant.of(variant.changes()) == variant
    executable.close()


def test_every_thread_gets_several_tasks() -> None:
    small = dataclasses.replace(PLAIN, n=256, blocks=16)
    assert {v.task_blocks for v in candidates(Job(small, 1), AMX, 4)} == {0}
    assert {v.task_blocks for v in candidates(Job(small, 1), AMX, 2)} == {0, 4}
    assert {v.task_blocks for v in candidates(Job(small, 1), AMX, 1)} == {0, 4, 8}


def test_typical_leaves_disturbances_out() -> None:
    assert typical([5, 1, 9, 8, 2, 7, 6, 9]) == 1.5
    assert typical([3.0]) == 3.0


# What is kept


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    machine, store = Machine(streams=0.8), TunedStore(tmp_path / "tuned", DEVICE)
    first = tuner(machine, store=store)
    assert first.run(1e9)
    again = Machine()
    second = tuner(again, store=TunedStore(tmp_path / "tuned", DEVICE))
    assert second.timings() == first.timings()
    assert second.run(1e9)
    assert not again.calls
    assert again.variants == machine.variants
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == [f"{DEVICE.key}.json"]
    anew = tuner(again, store=store, again=True)
    assert anew.run(1e9)
    assert again.calls
    assert {t.layer for t in store.read()} == {t.layer for t in first.timings()}
    assert len(store.read()) == len(first.timings())


def test_timings_of_other_layers_stay(tmp_path: Path) -> None:
    store = TunedStore(tmp_path, DEVICE)
    tuner(Machine(), [PLAIN], store=store).run(1e9)
    before = store.read()
    tuner(Machine(), [HEAD], store=store).run(1e9)
    assert store.read()[: len(before)] == before
    assert {t.activation for t in store.read()} == {"int8", "int16"}


def test_a_damaged_or_foreign_file_is_measured_again(tmp_path: Path) -> None:
    store = TunedStore(tmp_path, DEVICE)
    tuner(Machine(), [HEAD], store=store).run(1e9)
    whole = store.path.read_bytes()
    other = dataclasses.replace(DEVICE, module="another")
    assert other.key != DEVICE.key
    (tmp_path / f"{other.key}.json").write_bytes(whole)
    assert TunedStore(tmp_path, other).read() == []
    wrong = msgspec.json.decode(whole)
    wrong["timings"][0]["rows"] = "many"
    for data in (whole[:-20], b"", b"\xff" * 9, b"[]", msgspec.json.encode(wrong)):
        store.path.write_bytes(data)
        assert store.read() == []
        machine = Machine()
        assert tuner(machine, [HEAD], store=store).run(1e9)
        assert machine.calls
        assert len({t.layer for t in store.read()}) == 5


@pytest.mark.parametrize("variant", [{"colour": 1}, {"task_rows": 7}, {"task_blocks": 10**6}])
def test_a_stored_variant_that_is_none_is_measured_again(
    tmp_path: Path, variant: dict[str, int]
) -> None:
    executable = _executable()
    executable.tuned_from(tmp_path)
    executable.tune(10)
    (path,) = tmp_path.iterdir()
    content = msgspec.json.decode(path.read_bytes())
    known = {tuple(t[f] for f in ("operator", "n", "rows")) for t in content["timings"]}
    for timing in content["timings"]:
        if timing["chosen"] and timing["rows"] == 1:
            timing["variant"] = variant
    path.write_bytes(msgspec.json.encode(content))
    executable.tuned_from(tmp_path)
    found = {(t.operator, t.n, t.rows) for t in executable.timings()}
    assert found == {layer for layer in known if layer[2] != 1}
    executable.close()


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = TunedStore(tmp_path / "file", DEVICE)
    found = tuner(Machine(), [HEAD], store=store)
    assert found.run(1e9)
    assert found.timings()
    assert sum("not kept" in record.message for record in caplog.records) == 1
    assert store.read() == []


# On the real backend


def _executable(**plan: object) -> CpuExecutable:
    program = _program()
    backend = CpuBackend()
    full = ExecutionPlan(backend="cpu", device="cpu", block_size=BLOCK, threads=2).replace(**plan)
    packed = backend.pack(program, _Weights(program), full, None)
    executable = backend.compile(program, packed, full, "cpu", ("head",))
    executable.allocate_state([9] * len(program.groups()))
    return executable


def _logits(executable: CpuExecutable) -> np.ndarray:
    tokens = np.arange(30, dtype=np.int32)
    batch = _batch(executable.program, [(tokens, 0, 0), (tokens[:1], 0, 1)])
    return executable.collect(executable.submit(batch)).taps["head"]


@pytest.mark.parametrize("activation", ["int8", "fp32"])
def test_tuning_changes_no_bit(tmp_path: Path, activation: str) -> None:
    executable = _executable(activation=activation)
    assert isinstance(executable, Tunable)
    before = _logits(executable)
    executable.tuned_from(tmp_path)
    assert executable.timings() == []
    while not executable.tune(0.05):
        assert np.array_equal(_logits(executable), before)
    assert np.array_equal(_logits(executable), before)
    operators = {timing.operator for timing in executable.timings()}
    assert operators == {"linear", "linear_group", "head_linear", "grouped_linear"}
    assert all(timing.seconds > 0 and timing.threads == 2 for timing in executable.timings())
    executable.close()


def test_only_linear_layers_are_timed() -> None:
    executable = _executable()
    index = [node.op for node in executable.program.nodes].index("rms_norm")
    with pytest.raises(ValueError, match="no linear"):
        executable._native.time_linears([index], 1, DEFAULT.native())
    with pytest.raises(ValueError, match="rows"):
        executable._native.time_linears([], 0, DEFAULT.native())
    executable.close()
