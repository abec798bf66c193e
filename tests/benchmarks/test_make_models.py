"""Random models of a given shape: sound files, values of the promised size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from make_models import SHAPES, STANDARD_DEVIATION, random_blocks, write_random

from sartor import LLM, SamplingParams


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K])
def test_random_blocks_have_the_promised_spread(kind: GGMLQuantizationType) -> None:
    blocks = random_blocks(np.random.default_rng(0), (64, 512), kind)
    values = quants.dequantize(blocks, kind)
    assert values.shape == (64, 512)
    assert values.std() == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    assert np.abs(values.mean()) < STANDARD_DEVIATION / 4  # codes are not quite symmetric


def test_a_random_model_runs(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_random(SHAPES["tiny"], path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    with LLM(path, max_context=128) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (choice,) = llm.generate("he", params)[0].choices
    assert len(choice.tokens) == 4


def test_shapes_are_those_of_the_models() -> None:
    """Parameters as the makers state them: 1.54 and 8.03 x 10^9."""
    from make_models import _tensors

    for name, stated in (("qwen2-1.5b", 1.54e9), ("llama3-8b", 8.03e9)):
        total = sum(int(np.prod(form)) for _, form, _ in _tensors(SHAPES[name]))
        assert total == pytest.approx(stated, rel=0.01)
