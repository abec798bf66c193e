"""The tokenizers inside real GGUF files, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from sartor.formats.gguf import GgufCheckpoint
from sartor.text.detokenizer import Detokenizer
from sartor.text.template import template_from_gguf
from sartor.text.tokenizer import tokenizer_from_gguf

CHATS = ("<|im_start|>user\nhi 2024<|im_end|>\n", "<bos>x<start_of_turn>user\n y<end_of_turn>\n")


def metadata_of(path: Path) -> dict[str, object]:
    checkpoint = GgufCheckpoint(path)
    try:
        return dict(checkpoint.metadata)
    finally:
        checkpoint.close()


def round_trip(ours: Any, ids: list[int], expected: str) -> None:
    stream = Detokenizer(ours)
    assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids) == expected


def test_smollm2(model_files: dict[str, Path], page: str, lines: tuple[str, ...]) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    path = model_files["smollm2-135m"]
    metadata = metadata_of(path)
    ours = tokenizer_from_gguf(metadata)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers has no rule for "smollm" and takes GPT-2's; the model's own tokenizer.json
    # splits digits first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for line in (*lines, *CHATS):
        ids = ours.encode(line)
        assert ids == theirs.encode(line)
        round_trip(ours, ids, theirs.decode(ids, skip_special_tokens=True))
    assert (ours.bos_id, ours.add_bos) == (1, False)
    assert ours.eos_ids == {0, 2}

    template = template_from_gguf(metadata)
    assert template is not None
    chat = [{"role": "user", "content": page}]
    rendered, _ = render_jinja_template(
        [chat], chat_template=template.source, add_generation_prompt=True
    )
    assert template.render(chat) == rendered[0]
    assert ours.encode(template.render(chat), add_special=False)[0] == ours.bos_id


def test_gemma3(model_files: dict[str, Path], lines: tuple[str, ...]) -> None:
    metadata = metadata_of(model_files["gemma3-270m"])
    ours = tokenizer_from_gguf(metadata)
    oracle = gemma_by_merges(metadata)
    for line in (*lines, *CHATS):
        if " " * 32 in line:
            continue  # see test_gemma3_takes_the_longest_run_of_spaces
        ids = oracle.encode(line).ids
        assert ours.encode(line, add_special=False) == ids
        round_trip(ours, ids, ours.decode(ids))
        assert ours.encode(line) == [2, *ids]
    assert (ours.bos_id, ours.add_bos) == (2, True)
    assert ours.eos_ids == {1, 106}
    assert template_from_gguf(metadata) is None


def test_gemma3_takes_the_longest_run_of_spaces(model_files: dict[str, Path]) -> None:
    """Runs are user-defined pieces, which SentencePiece matches whole, longest first; a merge
    table (transformers) cuts runs above 31 into halves instead."""
    ours = tokenizer_from_gguf(metadata_of(model_files["gemma3-270m"]))
    ids = ours.encode(" " * 40, add_special=False)
    assert [len(ours.token_text(i)) for i in ids] == [31, 9]


def gemma_by_merges(metadata: dict[str, object]) -> Backend:
    """The tokenizer as transformers builds it: a merge table derived from the pieces.

    Loading the file with transformers itself takes half a minute; the derivation is its
    ``generate_merges`` restricted to the pieces that can occur in a merge.
    """
    tokens: list[str] = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    types = list(metadata["tokenizer.ggml.token_type"])  # type: ignore[call-overload]
    pieces = ["\u2581" * len(t) if not t.strip(" ") else t for t in tokens]
    vocab = {token: i for i, token in enumerate(pieces)}
    merges = []
    for i, token in enumerate(pieces):
        if types[i] not in (3, 6):
            cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
            found = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
            merges += sorted(found, key=lambda cut: (len(cut[0]), len(cut[1])))
    backend = Backend(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    backend.add_tokens(
        [t for t, kind in zip(tokens, types, strict=True) if kind == 4 and t.strip(" ")]
    )
    return backend


@pytest.mark.parametrize(("name", "limit"), [("smollm2-135m", 1.5), ("gemma3-270m", 3.0)])
def test_construction_is_fast(model_files: dict[str, Path], name: str, limit: float) -> None:
    """0.15 s and 0.35 s on two cores; the limits leave room for a busy machine."""
    import time

    metadata = metadata_of(model_files[name])
    start = time.perf_counter()
    tokenizer_from_gguf(metadata)
    assert time.perf_counter() - start < limit
