"""Models that only ``transformers`` knows, on the engine: held to its own ``generate``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_helpers import logprobs, prompt, request, run, tokens
from safetensors.torch import load_file, save_file

from fallback_models import MODELS, VOCAB, greedy, write_model
from sartor.engine.embedding import EmbeddingSegment
from sartor.engine.engine import Engine
from sartor.engine.fallback import model as fallback
from sartor.engine.fallback.causal_lm import nbytes
from sartor.engine.fallback.executable import FallbackExecutable
from sartor.engine.fallback.model import CAPABILITIES
from sartor.engine.fallback.probe import probe
from sartor.engine.llm import LLM
from sartor.engine.load import LoadedModel, load
from sartor.errors import FormatError, SartorError, UnsupportedError, UsageError
from sartor.graph import Program
from sartor.models import UnknownArchitectureError
from sartor.plan import ExecutionPlan

KINDS = {
    "gpt2": "chunked",
    "opt": "chunked",
    "bloom": "chunked",
    "starcoder2": "chunked",
    "mamba": "stepwise",
    "jamba": "stepwise",
    "openai-gpt": "recompute",
}
Oracle = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model of a kind, made at first use."""
    base = tmp_path_factory.mktemp("fallback")

    @cache
    def make(kind: str) -> tuple[Path, Any]:
        return base / kind, write_model(base / kind, kind)

    return make


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def oracle(kind: str, saved: Callable[[str], tuple[Path, Any]]) -> Oracle:
    model = saved(kind)[1]

    def generate(ids: Sequence[int], count: int) -> list[int]:
        return greedy(model, ids, count)

    return generate


@pytest.fixture(scope="module")
def loaded(kind: str, saved: Callable[[str], tuple[Path, Any]]) -> LoadedModel:
    return open_folder(saved(kind)[0])


def open_folder(folder: Path, taps: Sequence[str] = (), **fields: object) -> LoadedModel:
    plan = ExecutionPlan(block_size=16, max_batch_tokens=16, max_sequences=8).replace(**fields)
    return load(folder, plan, folder.name, None, taps)


def engine(loaded: LoadedModel, blocks: int = 64, states: int = 16) -> Engine:
    groups = loaded.executable.program.groups()
    return Engine(
        loaded.executable,
        loaded.tokenizer,
        capabilities=loaded.capabilities,
        context_length=loaded.context_length,
        model_key="test",
        state_blocks=[states if group.kind == "recurrent" else blocks for group in groups],
        clock=lambda: 0.0,
    )


def executable(loaded: LoadedModel) -> FallbackExecutable:
    assert isinstance(loaded.executable, FallbackExecutable)
    return loaded.executable


def test_it_says_what_it_is(kind: str, loaded: LoadedModel) -> None:
    assert "runs through transformers' own code: slower" in loaded.notes[0]
    path = loaded.executable.kernel_path("logits")
    assert path.startswith("transformers ")
    assert KINDS[kind] in path
    assert loaded.plan.backend == "transformers"
    assert not loaded.plan.prefix_cache
    assert (loaded.plan.kv, loaded.plan.activation) == ("fp32", "fp32")
    assert loaded.context_length == (8192 if kind in ("bloom", "mamba") else 256)
    assert loaded.executable.program.vocab == VOCAB
    assert Program.from_json(loaded.executable.program.to_json()) == loaded.executable.program
    assert executable(loaded).memory().weights > 0
    assert loaded.bits_per_weight == pytest.approx(32, rel=0.1)


def test_many_requests_in_chunks_equal_generate(loaded: LoadedModel, oracle: Oracle) -> None:
    """One batch of different lengths; 16 tokens a step, so that the prompts come in pieces."""
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 5, 16, 37, 60))]
    answers = run(
        engine(loaded),
        *(request(f"r{i}", ids, max_tokens=8 + i) for i, ids in enumerate(prompts)),
    )
    for i, ids in enumerate(prompts):
        assert tokens(answers[f"r{i}", 0]) == oracle(ids, 8 + i)


def test_preempted_equals_uninterrupted(kind: str, loaded: LoadedModel, oracle: Oracle) -> None:
    small = engine(loaded, blocks=6)
    requests = [request(f"r{i}", prompt(i, 30), max_tokens=30) for i in range(3)]
    answers = run(small, *requests)
    if kind != "mamba":  # a recurrent state does not grow: nothing has to give way
        assert sum(record.preempted for record in small.records) > 0
    for r in requests:
        assert tokens(answers[r.id, 0]) == oracle(r.prompt, 30)


def test_sampling_does_not_depend_on_company(loaded: LoadedModel) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "n": 2}
    options["repetition_penalty"] = 1.2
    chosen = request("r", prompt(3, 21), seed=5, **options)
    alone = run(engine(loaded), chosen)
    others = [request(f"o{i}", prompt(9 + i, 11), temperature=0.7, seed=i) for i in range(3)]
    together = run(engine(loaded), *others[:2], chosen, others[2])
    for choice in range(2):
        assert tokens(alone["r", choice]) == tokens(together["r", choice])
        assert logprobs(alone["r", choice]) == pytest.approx(
            logprobs(together["r", choice]), abs=1e-4
        )
    assert tokens(alone["r", 0]) != tokens(alone["r", 1])


def test_memory_stays_within_the_blocks(loaded: LoadedModel) -> None:
    """What ended or was aborted gives way, and what is held is what the engine counts."""
    blocks = [4 if g.kind == "recurrent" else 12 for g in loaded.executable.program.groups()]
    small = engine(loaded, blocks=12, states=4)
    memories = executable(loaded).memories
    budget = sum(count * loaded.executable.block_bytes(group) for group, count in enumerate(blocks))
    for round_ in range(6):
        for i in range(3):
            small.add(request(f"{round_}-{i}", prompt(round_ + i, 20 + 9 * i), max_tokens=40))
        for _ in range(12):
            small.step()
            small.check()
            assert memories.nbytes <= budget
            assert len(memories) <= min(blocks)
        small.abort(f"{round_}-1")
        if round_ == 3:
            small.reset()
    while small.has_work:
        small.step()
        assert memories.nbytes <= budget
    # One block each: nothing of the many before is left.
    run(small, *(request(f"last{i}", prompt(i, 16), max_tokens=2) for i in range(12)))
    assert len(memories) <= min(blocks)
    small.executable.allocate_state(blocks)
    assert (len(memories), memories.nbytes) == (0, 0)


def test_its_estimate_of_memory_is_honest(kind: str, loaded: LoadedModel) -> None:
    lm = executable(loaded)._lm
    assert lm is not None
    groups = loaded.executable.program.groups()
    for length in (1, 16, 64):
        _, content = lm.step(prompt(0, length), None, 1)
        blocks = [1 if g.kind == "recurrent" else -(-length // 16) for g in groups]
        held = sum(n * loaded.executable.block_bytes(g) for g, n in enumerate(blocks))
        assert 0 < nbytes(content) <= held


def test_logits_can_be_tapped(saved: Callable[[str], tuple[Path, Any]]) -> None:
    from sartor.evaluation.logits import open_logits

    folder, model = saved("gpt2")
    source = open_logits(folder, ExecutionPlan(), "gpt2")
    ids = prompt(1, 70)
    found = np.concatenate([part.copy() for part in source.chunks(ids)])
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match=r"'layers\.0' cannot be tapped"):
        open_folder(folder, taps=["layers.0"])


def test_what_it_lacks_is_refused(saved: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    llm = LLM.from_loaded(open_folder(saved("gpt2")[0]))
    with pytest.raises(UnsupportedError, match="takes no adapters; merge"):
        llm.load_adapter("a", tmp_path)
    mixed = request("r", [1, 2], segments=[EmbeddingSegment.of(0, np.zeros((1, 32)))])
    with pytest.raises(UsageError, match="takes tokens only"):
        engine(open_folder(saved("gpt2")[0])).add(mixed)
    with pytest.raises(UsageError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])
    assert not CAPABILITIES.adapters
    with pytest.raises(UnsupportedError, match=r"kv int8 .* choose from bf16, fp16, fp32"):
        open_folder(saved("gpt2")[0], kv="int8")
    llm.close()
    with pytest.raises(SartorError, match="is closed"):
        llm.generate([[1, 2]])


def test_a_slow_one_says_so_loudly(
    saved: Callable[[str], tuple[Path, Any]], kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """A text that is computed anew for each token is no detail."""
    with LLM(saved(kind)[0], progress=False) as llm:
        slow = KINDS[kind] == "recompute"
        assert ("VERY SLOW: it has no cache that works" in " ".join(llm._loaded.notes)) == slow
    said = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert any("VERY SLOW" in text for text in said) == slow


def test_precision(tmp_path: Path) -> None:
    for stored, used in (("bfloat16", "bf16"), ("float16", "fp32"), ("float32", "fp32")):
        folder = tmp_path / stored
        write_model(folder, "gpt2").to(getattr(torch, stored)).save_pretrained(folder)
        loaded = open_folder(folder)
        assert loaded.plan.kv == used
        assert "chunked" in loaded.executable.kernel_path("logits")


# What is not run --------------------------------------------------------------------------


def config_of(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "m", "gpt2")
    return tmp_path / "m"


def test_unknown_to_both(folder: Path) -> None:
    config_of(folder, model_type="gpt_9", architectures=["GPT9ForCausalLM"])
    with pytest.raises(UnsupportedError, match=r"'GPT9ForCausalLM'.* known neither to Sartor nor"):
        open_folder(folder)


def test_code_in_the_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config_of(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(UnsupportedError, match=r"Python code inside the checkpoint.*never run"):
        open_folder(folder)
    # A type that transformers has is run with its code, whatever lies beside it.
    config_of(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert open_folder(folder).executable.kernel_path("logits").startswith("transformers GPT2LM")
    assert not ran.exists()


def test_no_causal_language_model(folder: Path) -> None:
    config_of(folder, architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(UnsupportedError, match=r"no causal language model.*GPT2LMHeadModel"):
        open_folder(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"missing weights.*h\.1\.mlp\.c_fc\.bias"):
        open_folder(folder)


def test_a_damaged_configuration(folder: Path) -> None:
    config_of(folder, n_embd="many")
    with pytest.raises(SartorError, match="cannot load GPT2LMHeadModel"):
        open_folder(folder)


def test_tokens_that_see_the_future(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    with pytest.raises(UnsupportedError, match=r"BertLMHeadModel.*see those behind"):
        probe(transformers.BertLMHeadModel(config).eval(), 32)


class Summing:
    """A model whose logits depend on all tokens so far; its cache, of any name, sums them up."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, name: str) -> None:
        def forward(input_ids: torch.Tensor, use_cache: bool, **given: Any) -> Any:
            before = given.get(name, torch.zeros(1, 1, 64))
            sums = before + torch.nn.functional.one_hot(input_ids, 64).cumsum(1)
            return transformers.utils.ModelOutput(logits=sums, **{name: sums[:, -1:]})

        names = ("input_ids", "use_cache", name)
        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        vars(forward)["__signature__"] = inspect.Signature(parameters)
        self.forward = forward

    def __call__(self, *, return_dict: bool, **arguments: Any) -> Any:
        return self.forward(**arguments)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "a_later_name"])
def test_the_cache_is_found_whatever_its_name(name: str) -> None:
    """It has had several in the library's releases."""
    assert probe(Summing(name), 64).mode == "chunked"


def test_a_model_that_does_not_run() -> None:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(UnsupportedError, match="cannot run it on plain text here: "):
        probe(transformers.GPT2LMHeadModel(config).eval(), 32)  # 8 positions, and no more


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name == "transformers" else find_spec(name)

    monkeypatch.setattr(fallback, "find_spec", find)
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel.*install sartor\[transformers\]"):
        open_folder(folder)


@pytest.mark.parametrize("backend", ["null", "reference"])
def test_a_backend_that_torch_has_no_device_of(folder: Path, backend: str) -> None:
    with pytest.raises(UnknownArchitectureError, match="'GPT2LMHeadModel' is not supported"):
        open_folder(folder, backend=backend)


def test_a_gguf_is_what_the_registry_says_it_is(tmp_path: Path) -> None:
    checkpoint: Any = SimpleNamespace(kind="gguf")
    with pytest.raises(UnknownArchitectureError, match="not supported"):
        fallback.open_fallback(
            checkpoint, UnknownArchitectureError("not supported"), ExecutionPlan(), ()
        )


def test_a_refused_option_is_no_way_in(tmp_path: Path) -> None:
    """A known architecture never falls back: what it refuses would run with other answers."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, hidden_act="tanh"
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="hidden_act") as error:
        open_folder(tmp_path)
    assert not isinstance(error.value, UnknownArchitectureError)


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Tiny matrices on two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_kinds_are_tested() -> None:
    assert KINDS.keys() == MODELS.keys()
