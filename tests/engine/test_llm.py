from __future__ import annotations

import dataclasses
import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from engine_helpers import VOCAB, RandomWeights, byte_tokenizer, llama_program
from safetensors.numpy import save_file

from sartor import LLM, SamplingParams
from sartor.backends.null.backend import NullExecutable, null_program
from sartor.backends.registry import load_backend
from sartor.engine.llm import Output, progress_for
from sartor.engine.load import LoadedModel, _check, load
from sartor.engine.prompt import MixedPrompt, Prompt
from sartor.engine.request import Chunk, Request
from sartor.errors import CapacityError, SartorError, UnsupportedError, UsageError
from sartor.graph import Capabilities, SamplingDefaults
from sartor.models import Model
from sartor.plan import ExecutionPlan
from sartor.progress import SILENT, Silent
from sartor.progress.line import ProgressLine
from sartor.text.template import ChatTemplate

BOS = 254
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def loaded(backend: str = "null", template: bool = True, **plan_fields: object) -> LoadedModel:
    program = null_program(VOCAB) if backend == "null" else llama_program()
    fields = {"block_size": 16, "kv": "fp32", "max_sequences": 8, "max_batch_tokens": 64}
    plan = ExecutionPlan(backend=backend).replace(**{**fields, **plan_fields})
    chip = load_backend(backend)
    source = RandomWeights(program)
    weights = chip.pack(program, source, plan, None)
    executable = chip.compile(program, weights, plan, chip.devices()[0].name)
    return LoadedModel(
        name="tiny",
        model=cast(Model, SimpleNamespace(context_length=512, source=source, program=program)),
        tokenizer=byte_tokenizer(bos=BOS),
        template=ChatTemplate(TEMPLATE, bos_token="", eos_token="") if template else None,
        executable=executable,
        plan=executable.plan,
        capabilities=chip.capabilities(executable.plan.device),
        load_seconds=0.0,
        bits_per_weight=0.0,
        identity=source.identity(),
    )


@pytest.fixture
def llm() -> LLM:
    return LLM.from_loaded(loaded())


PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_text_gets_the_special_tokens_and_ids_are_taken_as_they_are(llm: LLM) -> None:
    (output,) = llm.generate("Hello", PARAMS)
    assert output.prompt_tokens == (BOS, *b"Hello")
    assert len(output.tokens) == 8
    assert output.choices[0].finish_reason == "length"
    assert output.text == llm.tokenizer.decode(output.tokens)
    (same,) = llm.generate([BOS, *b"Hello"], PARAMS)
    assert same.tokens == output.tokens
    (array,) = llm.generate(np.array([BOS, *b"Hello"]), PARAMS)  # type: ignore[arg-type]
    assert array == same


def test_many_prompts_with_parameters_each(llm: LLM) -> None:
    prompts = ["one", [1, 2, 3], "three"]
    outputs = llm.generate(prompts, [PARAMS, SamplingParams(max_tokens=2, seed=1), PARAMS])
    assert [len(o.tokens) for o in outputs] == [8, 2, 8]
    assert outputs[0] == llm.generate("one", PARAMS)[0]
    assert llm.generate([], PARAMS) == []
    with pytest.raises(UsageError, match="3 prompts, but 1 params"):
        llm.generate(prompts, [PARAMS])


def test_choices_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1, top_p=1, seed=3, n=3, max_tokens=5, logprobs=2, ignore_eos=True
    )
    (output,) = llm.generate("abc", params)
    assert len({choice.tokens for choice in output.choices}) == 3
    assert all(len(choice.logprobs) == 5 for choice in output.choices)
    assert output == llm.generate("abc", params)[0]


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1, top_p=1, max_tokens=8, ignore_eos=True)
    assert len({llm.generate("abc", params)[0].tokens for _ in range(4)}) == 4


def test_what_parameters_leave_open_is_the_model_s_own(llm: LLM) -> None:
    own = SamplingDefaults(temperature=0, repetition_penalty=1.5, origin="test")
    model = LLM.from_loaded(dataclasses.replace(loaded(), sampling=own))
    assert model.sampling is own
    seen: list[SamplingParams] = []
    add = model._engine.add

    def note(request: Request) -> None:
        seen.append(request.params)
        add(request)

    model._engine.add = note  # type: ignore[method-assign]
    model.generate("abc", SamplingParams(max_tokens=2, min_p=0.5))
    model.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2, temperature=1))
    list(model.stream("abc", SamplingParams(max_tokens=1)))
    for params in seen:
        assert (params.top_p, params.repetition_penalty) == (0.95, 1.5)
    assert [params.temperature for params in seen] == [0, 1, 0]
    assert seen[0].min_p == 0.5
    # Greedy by the model's own choice: two runs without a seed are alike.
    open_ = SamplingParams(max_tokens=8, ignore_eos=True)
    assert model.generate("abc", open_)[0].tokens == model.generate("abc", open_)[0].tokens


def test_streams_fold_to_the_answer(llm: LLM) -> None:
    chunks = list(llm.stream("Hello", PARAMS))
    (whole,) = llm.generate("Hello", PARAMS)
    assert "".join(c.text for c in chunks) == whole.text
    assert len(chunks) == 8


def test_streams_can_be_interleaved_and_left(llm: LLM) -> None:
    expected = [llm.generate(word, PARAMS)[0].text for word in ("one", "two")]
    one, two, left = (llm.stream(word, PARAMS) for word in ("one", "two", "left"))
    next(left)
    pairs: list[tuple[Chunk, Chunk]] = list(zip(one, two, strict=True))
    left.close()  # type: ignore[attr-defined]
    assert ["".join(p[i].text for p in pairs) for i in range(2)] == expected
    assert llm._engine.running == 0


def test_chat_renders_the_template_and_adds_no_second_bos(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, PARAMS)
    assert output.prompt_tokens == tuple(b"<user>Hi<assistant>")
    chunks = list(llm.chat(messages, PARAMS, stream=True))
    assert "".join(c.text for c in chunks) == output.text


def test_chat_needs_a_template() -> None:
    llm = LLM.from_loaded(loaded(template=False))
    with pytest.raises(UsageError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_a_refused_prompt_takes_no_other_with_it(llm: LLM) -> None:
    with pytest.raises(CapacityError, match="600 tokens"):
        llm.generate([[1, 2, 3], [1] * 600], PARAMS)
    assert llm._engine.running == llm._engine.waiting == 0
    assert len(llm.generate("abc", PARAMS)[0].tokens) == 8


def test_an_interrupt_leaves_the_model_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("abc", PARAMS)
    executable = llm._engine.executable
    for part in ("submit", "collect"):
        with monkeypatch.context() as patch:

            def interrupt(argument: Any) -> Any:
                raise KeyboardInterrupt

            patch.setattr(executable, part, interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["abc", "def"], PARAMS)
        llm._engine.check()
        assert llm._engine.running == llm._engine.waiting == 0
        assert llm.generate("abc", PARAMS) == expected


def test_a_failed_step_raises_and_the_next_call_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def fail(batch: Any) -> int:
            raise SartorError("the chip is gone")

        patch.setattr(llm._engine.executable, "submit", fail)
        with pytest.raises(SartorError, match="the chip is gone"):
            llm.generate("abc", PARAMS)
    assert len(llm.generate("abc", PARAMS)[0].tokens) == 8


def test_a_prompt_may_hold_vectors(llm: LLM) -> None:
    def ask(*vectors: float) -> Output:
        (output,) = llm.generate(MixedPrompt(["ab", np.array([vectors]), "c"]), PARAMS)
        return output

    output = ask(1, 2)
    assert output.prompt_tokens == (BOS, *b"ab", 0, *b"c")
    assert ask(1, 3).tokens != output.tokens == ask(1, 2).tokens
    mixed: list[Prompt] = ["plain", MixedPrompt(["ab", np.array([[1, 2]]), "c"])]
    assert llm.generate(mixed, PARAMS)[1] == output


def test_adapters_by_name(llm: LLM, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    halves = {"A": rng.standard_normal((2, 2)), "B": rng.standard_normal((VOCAB, 2))}
    save_file(
        {f"base_model.model.head.lora_{h}.weight": a.astype("f4") for h, a in halves.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    llm.load_adapter("mine", tmp_path)
    assert llm.adapters == ("mine",)
    plain = llm.generate("Hello", PARAMS)[0].tokens
    (adapted,) = llm.generate("Hello", PARAMS, adapter="mine")
    assert adapted.tokens != plain
    chunks = list(llm.stream("Hello", PARAMS, adapter="mine"))
    assert tuple(t for c in chunks for t in c.tokens) == adapted.tokens
    messages = [{"role": "user", "content": "Hi"}]
    one = llm.chat(messages, PARAMS, adapter="mine")
    assert one.tokens != llm.chat(messages, PARAMS).tokens
    assert "".join(c.text for c in llm.chat(messages, PARAMS, stream=True, adapter="mine")) == (
        one.text
    )
    llm.drop_adapter("mine")
    with pytest.raises(UsageError, match="'mine' is not loaded"):
        llm.generate("Hello", PARAMS, adapter="mine")


def test_threads_take_turns(llm: LLM) -> None:
    words = [f"word {i}" for i in range(6)]
    expected = [o.tokens for o in llm.generate(words, PARAMS)]
    found: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        found[index] = llm.generate(words[index], PARAMS)[0].tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(words))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(words))] == expected


CALLS: dict[str, Callable[[LLM], object]] = {
    "generate": lambda llm: llm.generate("abc", PARAMS),
    "generate, of nothing": lambda llm: llm.generate([]),
    "stream": lambda llm: llm.stream("abc", PARAMS),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "Hi"}]),
    "chat, as it comes": lambda llm: llm.chat([{"role": "user", "content": "Hi"}], stream=True),
    "embed": lambda llm: llm.embed("abc"),
    "load_adapter": lambda llm: llm.load_adapter("mine", "nowhere"),
    "drop_adapter": lambda llm: llm.drop_adapter("mine"),
    "adapters": lambda llm: llm.adapters,
    "__enter__": lambda llm: llm.__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["null", "reference"])
def test_after_close_every_call_says_so(call: str, backend: str) -> None:
    llm = LLM.from_loaded(loaded(backend, activation="fp32"))
    llm.generate("abc", PARAMS)
    llm.close()
    llm.close()
    name = call.partition(",")[0]
    with pytest.raises(UsageError, match=rf"LLM\.{name}: tiny is closed; open it again") as caught:
        CALLS[call](llm)
    assert "\n" not in str(caught.value)
    llm.close()
    assert (llm.context_length, llm.plan.backend) == (512, backend)  # facts stay


def test_a_with_block_may_close_inside() -> None:
    with LLM.from_loaded(loaded()) as llm:
        llm.close()


def test_closing_ends_streams_that_are_open(llm: LLM) -> None:
    begun, fresh = llm.stream("one", PARAMS), llm.stream("two", PARAMS)
    next(begun)
    llm.close()
    for stream in (begun, fresh):
        with pytest.raises(UsageError, match=r"LLM\.stream: tiny is closed"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_closing_while_another_thread_streams() -> None:
    llm = LLM.from_loaded(loaded())
    started, errors = threading.Event(), []

    def follow() -> None:
        try:
            for _ in llm.stream("abc", SamplingParams(max_tokens=400, ignore_eos=True)):
                started.set()
        except BaseException as error:
            errors.append(error)

    cast(NullExecutable, llm._engine.executable).delay = 0.005  # seconds a step
    threads = [threading.Thread(target=follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    llm.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [UsageError] * 3
    assert all("LLM.stream: tiny is closed" in str(error) for error in errors)


def test_what_is_shown_while_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    own = Silent()
    monkeypatch.setenv("TERM", "xterm")
    assert progress_for(own) is own
    assert progress_for(None) is progress_for(False) is SILENT
    assert isinstance(progress_for(True), ProgressLine)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress_for(None), ProgressLine)
    assert progress_for(False) is SILENT


def test_a_real_program_runs_too() -> None:
    with LLM.from_loaded(loaded("reference", activation="fp32")) as llm:
        outputs = llm.generate(["Hello", "Hello there"], PARAMS)
        assert [len(o.tokens) for o in outputs] == [8, 8]
        assert outputs[0].tokens == llm.generate("Hello", PARAMS)[0].tokens


def test_what_a_backend_cannot_do_is_refused() -> None:
    operators = load_backend("null").capabilities("null").operators
    program, plan = null_program(), ExecutionPlan(activation="fp32", kv="fp32", block_size=16)
    with pytest.raises(UnsupportedError, match=r"block_size 16.*32, 64"):
        _check(Capabilities(operators, block_sizes=(32, 64)), program, plan)
    with pytest.raises(UnsupportedError, match="no operator attention"):
        _check(Capabilities(operators - {"attention"}), program, plan)
    with pytest.raises(UnsupportedError, match="activation int8"):
        _check(Capabilities(operators), program, plan.replace(activation="int8"))


def test_loading_what_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none.gguf", ExecutionPlan(), "none", None)
