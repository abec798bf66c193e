"""The output head in fewer bits: what changes, what stays, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from test_peft import matrices, save
from tiny_encoder import write_tiny_encoder
from tiny_model import HIDDEN, write_tiny_model

from fallback_models import write_model
from sartor import LLM, SamplingParams
from sartor.backends.registry import load_backend
from sartor.engine.head import code_bits, requantize_head
from sartor.engine.load import LoadedModel, load
from sartor.engine.peft import read_peft
from sartor.errors import SartorError, UnsupportedError, UsageError
from sartor.evaluation import ModelLogits
from sartor.graph import Builder, Program
from sartor.models import Model
from sartor.ops import AffineFormat, DenseFormat, Fp8Format, LookupFormat, Weight, WeightFormat
from sartor.ops.requantize import requantize
from sartor.plan import ExecutionPlan

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = tuple(range(40, 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose head is its embedding, in float32."""
    return write_tiny_model(tmp_path_factory.mktemp("head") / "tiny.gguf")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        load_backend(request.param)
    except SartorError as error:
        pytest.skip(str(error))
    return str(request.param)


def opened(path: Path, backend: str = "reference", **fields: object) -> LoadedModel:
    taps = ("model.embed_tokens", "model.norm", "lm_head")
    exact = ExecutionPlan(backend=backend, activation="fp32", kv="fp32", max_sequences=2)
    return load(path, exact.replace(**fields), "tiny", None, taps)


def tapped(loaded: LoadedModel, node: str) -> np.ndarray:
    model = ModelLogits(loaded)
    model._head = node
    return np.concatenate([chunk.copy() for chunk in model.chunks(TOKENS)])


# The plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, -4, 4.0, True, "4"])
def test_a_plan_takes_2_to_8_bits(bits: Any) -> None:
    with pytest.raises(UsageError, match="plan: head_bits is"):
        ExecutionPlan(head_bits=bits)


def test_bits_are_part_of_what_can_change_an_answer() -> None:
    plans = [ExecutionPlan(head_bits=bits) for bits in (0, *range(2, 9))]
    assert len({plan.numerics() for plan in plans}) == 8


# What changes and what stays ---------------------------------------------------------------


def test_lookups_are_those_of_the_file_and_logits_those_of_the_new_weight(
    tiny: Path, backend: str
) -> None:
    plain, fewer = (opened(tiny, backend, head_bits=bits) for bits in (0, 4))
    assert np.array_equal(tapped(plain, "model.embed_tokens"), tapped(fewer, "model.embed_tokens"))
    hidden = tapped(fewer, "model.norm")
    assert np.array_equal(tapped(plain, "model.norm"), hidden)
    assert isinstance(fewer.model, Model)
    own = requantize(fewer.model.source.weight(EMBEDDING), 4, HEAD)
    logits = tapped(fewer, "lm_head")
    np.testing.assert_allclose(logits, hidden @ own.dequantize().T, rtol=2e-3, atol=2e-3)
    assert np.abs(logits - tapped(plain, "lm_head")).max() > 0.05
    assert fewer.plan.head_bits == 4
    if backend == "cpu":
        assert fewer.executable.kernel_path("lm_head").endswith("affine4g32o")


def test_bits_are_counted_over_the_weights_of_the_file(tiny: Path) -> None:
    plain, fewer = (opened(tiny, head_bits=bits) for bits in (0, 4))
    size = plain.executable.program.size
    added = 259 * HIDDEN * 5  # 4 bits, and 32 of scale and offset for 32 weights
    assert plain.bits_per_weight == pytest.approx(32)
    assert fewer.bits_per_weight == pytest.approx(32 + added / size)


def test_an_engine_answers_with_it(tiny: Path, backend: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = ["Hello", "a second one, longer", "3"]
    fields: dict[str, Any] = {"backend": backend, "head_bits": 3, "max_sequences": 3}
    with LLM(tiny, **fields) as llm, LLM(tiny, backend=backend) as usual:
        together = llm.generate(prompts, params)
        assert [output.tokens for output in together] == [
            llm.generate(prompt, params)[0].tokens for prompt in prompts
        ]
        assert [o.tokens for o in together] != [o.tokens for o in usual.generate(prompts, params)]
        assert llm.plan.head_bits == 3


def test_packed_files_lie_side_by_side(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("sartor.backends.cpu._native")

    def logits(bits: int) -> np.ndarray:
        plan = ExecutionPlan(backend="cpu", activation="fp32", kv="fp32", head_bits=bits)
        found = tapped(load(tiny, plan, "tiny", tmp_path, ("lm_head",)), "lm_head")
        for thread in threading.enumerate():
            if thread.name == "sartor-packed-file":
                thread.join()
        return found

    first = [logits(bits) for bits in (0, 3, 4)]
    assert len(list(tmp_path.glob("*.packed"))) == 3
    again = [logits(bits) for bits in (0, 3, 4)]
    assert len(list(tmp_path.glob("*.packed"))) == 3
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(first[1], first[2])


# Heads of other forms ----------------------------------------------------------------------


def model_of(form: WeightFormat, *, tied: bool = False, width: int = 64) -> Model:
    """A model of an embedding and a head; its source makes no weights."""
    builder = Builder()
    x = builder.gather_rows(
        builder.embedding(builder.token_ids, "embed", 16, width), builder.output_rows
    )
    program = builder.finish(builder.linear(x, "head", 16, weight="embed.weight" if tied else None))
    source = SimpleNamespace(format=lambda name: form, identity=lambda: "file")
    return cast(Model, SimpleNamespace(name="toy", program=program, source=source))


@pytest.mark.parametrize(
    ("form", "has"),
    [
        (DenseFormat("bf16"), 16),
        (AffineFormat(6, 16, zero=32), 6),
        (AffineFormat(4, 32, offset=True), 4),
        (LookupFormat((0,) * 16, 32), 4),
        (Fp8Format(32), 8),
    ],
)
def test_a_head_that_has_so_few_bits_stays(form: WeightFormat, has: int) -> None:
    assert code_bits(form) == has
    model = model_of(form, tied=True)
    for bits in range(2, 9):
        program, source = requantize_head(model, bits)
        assert (source is model.source) == (bits >= has)
        assert (program is model.program) == (bits >= has)
    assert requantize_head(model, 0) == (model.program, model.source)


def test_the_plan_in_effect_says_whether_the_head_stayed(tmp_path: Path, backend: str) -> None:
    path = write_tiny_model(tmp_path / "q8.gguf", quantize=True)
    stayed, fewer = (opened(path, backend, head_bits=bits) for bits in (8, 7))
    assert (stayed.plan.head_bits, fewer.plan.head_bits) == (0, 7)
    assert isinstance(stayed.model, Model)
    assert stayed.executable.program == stayed.model.program
    assert np.array_equal(tapped(stayed, "lm_head"), tapped(opened(path, backend), "lm_head"))


def test_a_head_of_its_own_keeps_its_name_and_the_identity_differs() -> None:
    model = model_of(DenseFormat("bf16"))
    program, source = requantize_head(model, 4)
    assert program is model.program  # nothing else reads that weight
    identities = {requantize_head(model, bits)[1].identity() for bits in (0, 3, 4, 5)}
    assert len(identities) == 4
    assert source.identity() != model.source.identity()


def test_only_the_head_is_quantised_again() -> None:
    asked: list[str] = []
    values = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)

    def weight(name: str) -> Weight:
        asked.append(name)
        return Weight(name, DenseFormat("fp32"), values)

    model = model_of(DenseFormat("fp32"), tied=True)
    cast(Any, model.source).weight = weight
    _, source = requantize_head(model, 5)
    assert np.array_equal(source.weight("embed.weight").dequantize(), values)
    head = source.weight("head.weight")
    assert (head.name, head.format) == ("head.weight", AffineFormat(5, 32, offset=True))
    assert asked == ["embed.weight", "embed.weight"]


# What is refused ---------------------------------------------------------------------------


def test_an_encoder_has_no_head(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="head_bits is 4, but bert has no linear layer"):
        load(folder, ExecutionPlan(backend="reference", head_bits=4), "bert", None)


def test_a_model_of_transformers_keeps_its_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "gpt2")
    with pytest.raises(UnsupportedError, match="head_bits is 4, but GPT2LMHeadModel runs through"):
        load(tmp_path / "m", ExecutionPlan(head_bits=4), "m", None)


def test_rows_that_no_group_divides() -> None:
    with pytest.raises(UnsupportedError, match=r"rows of 48 weights of embed\.weight"):
        requantize_head(model_of(DenseFormat("fp32"), tied=True, width=48), 4)


def test_an_adapter_of_a_tied_head_is_one_of_the_weight_that_it_reads(
    tiny: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path, matrices("lm_head", 259, HIDDEN))
    for bits, weight in ((0, "model.embed_tokens.weight"), (4, HEAD)):
        loaded = opened(tiny, head_bits=bits)
        assert set(read_peft(folder, loaded.model, loaded.executable.program)) == {weight}


def test_the_program_of_the_file_is_kept_beside_it(tiny: Path) -> None:
    loaded = opened(tiny, head_bits=4)
    program: Program = loaded.executable.program
    names = [spec.name for spec in program.weights]
    assert names == [*(spec.name for spec in loaded.model.program.weights), HEAD]
