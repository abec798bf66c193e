"""Which of several weight types is taken, and what is said about it."""

from __future__ import annotations

import pytest
from store_standins import GGUF, Hub, Recorder

from sartor.errors import UsageError
from sartor.formats.gguf_blocks import GGUF_TYPES
from sartor.store import ModelStore
from sartor.store.quantizations import ORDER, is_read, quantization
from sartor.store.source import choose_files

GB = 10**9


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M"),
        ("m.q4_k.gguf", "Q4_K"),
        ("m-Q4_K_S-imat.gguf", "Q4_K_S"),
        ("m-IQ4_XS.gguf", "IQ4_XS"),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m-UD_IQ2_M.gguf", "UD-IQ2_M"),
        ("Q8_0/m-00001-of-00002.gguf", "Q8_0"),
        ("BF16/m-BF16-00001-of-00002.gguf", "BF16"),
        ("m-fp16.gguf", "F16"),
        ("m.f32.gguf", "F32"),
        ("f16-to-Q5_0.gguf", "Q5_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("q4/m.gguf", None),
        ("MQ4_0x.gguf", None),
        ("m.gguf", None),
    ],
)
def test_the_type_is_read_from_the_name(name: str, quant: str | None) -> None:
    assert quantization(name) == quant


def test_what_is_read_agrees_with_the_reader() -> None:
    """Of the types that are named after one tensor type, those without a decoder are not taken."""
    for kind in GGUF_TYPES.values():
        if quantization(f"m-{kind.name}.gguf") == kind.name:
            readable = bool(kind.decode or kind.dense)
            assert is_read(kind.name) == readable or kind.name in ("Q8_1", "Q8_K"), kind.name
    assert all(map(is_read, ORDER))
    assert not any(map(is_read, ("IQ3_M", "UD-IQ2_XXS", "TQ2_0", "Q4_0_8_8", "IQ4_K", "Q4_K_R4")))


def choose(offered: dict[str, int], free: float, **given: object) -> tuple[list[str], list[str]]:
    said: list[str] = []
    files = choose_files(
        offered,
        (),
        "hf:o/m",
        sizes=offered,  # type: ignore[arg-type]
        room=lambda: int(free * GB),
        say=said.append,
        **given,  # type: ignore[arg-type]
    )
    return files, said


MANY = {
    f"m-{quant}.gguf": int(size * GB)
    for quant, size in {
        "Q2_K": 3, "Q3_K_M": 4, "IQ3_M": 4.2, "Q4_K_M": 5, "Q4_K_S": 4.7, "Q6_K": 6.6, "Q8_0": 8.5,
        "F16": 16,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("free", "taken"),
    [(64, "Q4_K_M"), (7.4, "Q4_K_M"), (7.3, "Q4_K_S"), (6, "Q3_K_M"), (4.5, "Q2_K"), (1, "Q2_K")],
)
def test_the_first_by_preference_that_fits(free: float, taken: str) -> None:
    files, (said,) = choose(MANY, free)
    assert files == [f"m-{taken}.gguf"]
    assert f"{taken} (" in said
    assert "hf:o/m:" in said
    assert ("it may not load here" in said) == (free == 1)
    assert ("free memory" in said) == (free in (7.3, 6, 4.5))


def test_without_the_favourite() -> None:
    few = {name: size for name, size in MANY.items() if "Q4" not in name}
    assert choose(few, 64)[0] == ["m-Q8_0.gguf"]
    assert choose(few, 10)[0] == ["m-Q6_K.gguf"]
    assert choose({"m-F16.gguf": GB, "m-IQ2_M.gguf": GB // 8}, 64)[0] == ["m-F16.gguf"]


def test_a_named_type() -> None:
    assert choose(MANY, 1, quant="Q8_0")[0] == ["m-Q8_0.gguf"]
    assert "may not load" in choose(MANY, 1, quant="Q8_0")[1][0]
    assert choose(MANY, 64, quant="FP16")[0] == ["m-F16.gguf"]
    with pytest.raises(UsageError, match="offers no Q4_K; it offers F16, IQ3_M, Q2_K, Q3_K_M"):
        choose(MANY, 64, quant="Q4_K")
    with pytest.raises(UsageError, match="IQ3_M is a weight type that Sartor does not read"):
        choose(MANY, 64, quant="IQ3_M")
    dynamic = {"m-UD-Q4_K_XL.gguf": GB, "m-Q4_K_M.gguf": GB}
    assert choose(dynamic, 64, quant="Q4_K_XL")[0] == ["m-UD-Q4_K_XL.gguf"]
    assert choose(dynamic, 64)[0] == ["m-Q4_K_M.gguf"]


def test_folders_and_split_files() -> None:
    offered = {
        **{f"Q4_K_M/m-0000{n}-of-00002.gguf": GB for n in (1, 2)},
        **{f"Q8_0/m-0000{n}-of-00002.gguf": 2 * GB for n in (1, 2)},
        "mmproj-F16.gguf": GB,
        "imatrix_m.gguf": GB,
    }
    assert choose(offered, 64)[0] == [f"Q4_K_M/m-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert choose(offered, 64, quant="Q8_0")[0] == [f"Q8_0/m-0000{n}-of-00002.gguf" for n in (1, 2)]


def test_several_models_of_one_type_are_the_users_choice() -> None:
    offered = {"a-1b-Q4_K_M.gguf": GB, "a-7b-Q4_K_M.gguf": GB, "a-1b-Q8_0.gguf": GB}
    for given in ({}, {"quant": "Q4_K_M"}):
        with pytest.raises(UsageError, match=r"hf:o/m/a-1b-Q4_K_M\.gguf, hf:o/m/a-7b-Q4_K_M\.gguf"):
            choose(offered, 64, **given)


@pytest.mark.parametrize("kind", ["hf", "modelscope"])
def test_pulled_by_type(hub: Hub, recorder: Recorder, kind: str) -> None:
    hub.repos["o/m"] = {"m-Q4_0.gguf": GGUF[:900], "m-Q8_0.gguf": GGUF}
    store = ModelStore(memory_bytes=len(GGUF))
    model = store.pull(f"{kind}:o/m", recorder)
    assert model.size_bytes == 900  # the other does not fit
    assert any("Q4_0 (1 kB) is taken" in notice for notice in recorder.notices)
    other = store.pull(f"{kind}:o/m:q8_0", recorder)
    assert (other.name, other.size_bytes) == (f"{kind}:o/m:Q8_0", len(GGUF))
    assert {m.name for m in store.list()} == {f"{kind}:o/m", f"{kind}:o/m:Q8_0"}
    with pytest.raises(UsageError, match="it offers Q4_0, Q8_0"):
        store.pull(f"{kind}:o/m:Q5_0")


def test_pickles_in_a_repository_are_explained(hub: Hub) -> None:
    hub.repos["o/m"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    hub.repos["o/a"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    for ref, says in (
        ("o/m", r"only pytorch_model\.bin: a Python pickle"),
        ("o/a", "LoRA adapter"),
    ):
        with pytest.raises(Exception, match=says):
            ModelStore().pull(ref)
    with pytest.raises(UsageError, match="no GGUF files"):
        ModelStore().pull("o/m:Q4_0")
