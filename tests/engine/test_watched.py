"""How far packing is, told by the weights that a backend asks for: any backend."""

from __future__ import annotations

import math

import pytest
from engine_helpers import RandomWeights, llama_program

from recorded import Recorded
from sartor.backends.registry import load_backend
from sartor.engine.watched import WatchedSource
from sartor.plan import ExecutionPlan


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_weights_that_a_backend_has_asked_for(name: str) -> None:
    program, progress = llama_program(), Recorded()
    backend = load_backend(name)
    device = backend.devices()[-1].name
    plan = ExecutionPlan(backend=name, device=device, block_size=16)
    source = RandomWeights(program)
    with WatchedSource(source, program, progress, "packing it") as watched:
        assert watched.identity() == source.identity()
        backend.pack(program, watched, plan, None)
    told = progress.phase("packing it")
    assert (told.total, told.unit) == (program.size, "weights")
    # The last one has been asked for, and nobody knows when it is done: then it is over.
    last = max(abs(weight.shape[0] * weight.shape[-1]) for weight in program.weights)
    assert program.size - last <= told.done < program.size


def test_no_phase_where_no_weight_is_read() -> None:
    program, progress = llama_program(), Recorded()
    with WatchedSource(RandomWeights(program), program, progress, "packing it"):
        pass
    assert progress.phases == []


def test_a_failure_ends_the_phase_and_a_weight_counts_once() -> None:
    program, progress = llama_program(), Recorded()
    names = [spec.name for spec in program.weights]

    def ask() -> None:
        with WatchedSource(RandomWeights(program), program, progress, "packing it") as watched:
            for name in (names[0], names[0], names[1], "no such weight"):
                watched.weight(name)

    with pytest.raises(KeyError):
        ask()
    told = progress.phase("packing it")
    size = {spec.name: spec.shape for spec in program.weights}
    first, second = (math.prod(size[name]) for name in names[:2])
    assert told.done == first + second
