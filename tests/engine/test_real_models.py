"""From a file on disk to answers, with real weights on the backend that users get."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_helpers import request, run

from sartor import LLM, SamplingParams
from sartor.backends.registry import load_backend
from sartor.engine.engine import Engine
from sartor.engine.load import LoadedModel, load, make_engine
from sartor.errors import UsageError
from sartor.plan import ExecutionPlan

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
Answer = list[tuple[int, float]]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def loaded(request: pytest.FixtureRequest, model_files: dict[str, Path]) -> LoadedModel:
    plan = ExecutionPlan(max_context=512, max_sequences=16)
    return load(model_files[request.param], plan, request.param, None)


def answers(engine: Engine, *prompts: tuple[int, ...], length: int = 12) -> list[Answer]:
    asked = [
        request(f"r{i}", ids, seed=i, temperature=0.7, top_p=0.9, logprobs=0, max_tokens=length)
        for i, ids in enumerate(prompts)
    ]
    found = run(engine, *asked)
    return [[(e.token, e.logprob) for c in found[r.id, 0] for e in c.logprobs] for r in asked]


def changed(loaded: LoadedModel, full_blocks: int = 200, **fields: object) -> Engine:
    """Another engine on the same weights."""
    executable = loaded.executable
    executable.plan = executable.plan.replace(**fields)  # type: ignore[misc]
    groups = executable.program.groups()
    return Engine(
        executable,
        loaded.tokenizer,
        capabilities=load_backend("cpu").capabilities(executable.plan.device),
        context_length=loaded.context_length,
        model_key="test",
        state_blocks=[100 if group.window else full_blocks for group in groups],
    )


def test_answers_are_bitwise_the_same_however_they_are_computed(loaded: LoadedModel) -> None:
    if loaded.plan.backend != "cpu":
        pytest.skip("the native CPU backend is not built")
    encode = loaded.tokenizer.encode
    prompts = [tuple(encode(TEXT + " " + TEXT[i:] + " ")) for i in range(0, 24, 8)]
    engine = make_engine(loaded)
    long = answers(engine, *prompts, length=48)
    together = [answer[:12] for answer in long]
    computed = sum(record.prompt_tokens for record in engine.records)
    assert answers(engine, *prompts) == together  # from the prefix cache
    assert sum(record.prompt_tokens for record in engine.records) < 1.5 * computed
    assert answers(make_engine(loaded), prompts[0])[0] == together[0]
    plan = loaded.executable.plan
    try:
        assert answers(changed(loaded, max_batch_tokens=7), *prompts) == together
        tight = changed(loaded, full_blocks=8, max_batch_tokens=64, prefix_cache=False)
        assert answers(tight, *prompts, length=48) == long
        assert sum(record.preempted for record in tight.records) > 0
    finally:
        loaded.executable.plan = plan  # type: ignore[misc]


@pytest.mark.parametrize("isa", ["auto", "avx512", "avx2", "portable"])
def test_answers_are_bitwise_the_same_on_any_number_of_threads(
    model_files: dict[str, Path], isa: str
) -> None:
    path = model_files["smollm2-135m"]
    seen = []
    for threads in (1, 2, 3, 8):
        plan = ExecutionPlan(threads=threads, isa=isa, max_context=256, max_sequences=4)
        try:
            loaded = load(path, plan, "threads", None)
        except UsageError:
            pytest.skip(f"instruction-set path {isa} cannot run here")
        if loaded.plan.backend != "cpu":
            pytest.skip("the native CPU backend is not built")
        prompts = [
            tuple(loaded.tokenizer.encode(TEXT)),
            tuple(loaded.tokenizer.encode("def f(x):")),
        ]
        seen.append(answers(make_engine(loaded), *prompts, length=6))
    assert seen[1:] == [seen[0]] * 3


def test_text_continues(loaded: LoadedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    (output,) = LLM.from_loaded(loaded).generate(TEXT, params)
    assert output.text.startswith(" Madrid.")
    assert output.text == loaded.tokenizer.decode(output.tokens)


def test_a_chat_answers_and_ends_by_itself(model_files: dict[str, Path]) -> None:
    # With int8 activations a 135M model is not sure enough of its first word.
    plan = ExecutionPlan(activation="fp32")
    llm = LLM.from_loaded(load(model_files["smollm2-135m"], plan, "smollm2", None))
    params = SamplingParams(temperature=0, max_tokens=60)
    output = llm.chat([{"role": "user", "content": "What is the capital of France?"}], params)
    assert output.text == "The capital of France is Paris."
    assert output.choices[0].finish_reason == "stop"
    assert output.tokens[-1] in llm.tokenizer.eos_ids
    assert output.prompt_tokens[0] != output.prompt_tokens[1]  # one bos at most


def test_a_base_model_does_not_chat(model_files: dict[str, Path]) -> None:
    loaded = load(model_files["gemma3-270m"], ExecutionPlan(), "gemma3", None)
    with pytest.raises(UsageError, match="gemma3 has no chat template"):
        LLM.from_loaded(loaded).chat([{"role": "user", "content": "Hi"}])
