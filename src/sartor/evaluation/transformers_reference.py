"""Logits by an independent implementation: ``transformers`` in fp32, eager attention.

A GGUF file is read and dequantised with the ``gguf`` package and brought into the layout of
``transformers`` here, so nothing of Sartor's own reader, models or kernels takes part. Layout of
GGUF tensors (llama.cpp's converter): "llama" files keep rotary features i and i + d/2 of a head
next to each other; "gemma3" files store norm weights plus one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sartor.errors import FormatError, SartorError, UnsupportedError
from sartor.evaluation.logits import F32, ROWS

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", "LLAMA"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "QWEN2"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", "QWEN3"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", "GEMMA3"),
}


class TransformersLogits:
    """A :class:`~sartor.evaluation.logits.LogitSource` on a GGUF file or a checkpoint folder."""

    name = "transformers fp32"

    def __init__(self, path: Path) -> None:
        """SartorError where a library is missing; FormatError for tensors that do not fit."""
        try:
            import gguf  # noqa: F401
            import torch
            import transformers
        except ImportError as error:
            raise SartorError(
                f"the reference 'transformers' needs torch, transformers and gguf ({error}); "
                "install sartor[test]"
            ) from error
        self._torch: Any = torch
        if path.is_dir():
            loader: Any = transformers.AutoModelForCausalLM
            model = loader.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        else:
            model = _from_gguf(path)
        self._model: Any = model.eval()

    def chunks(self, tokens: Sequence[int]) -> Iterator[F32]:
        past: Any = None
        for start in range(0, len(tokens), ROWS):
            ids = self._torch.tensor([list(tokens[start : start + ROWS])])
            with self._torch.no_grad():
                out = self._model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            yield out.logits[0].numpy()

    def close(self) -> None:
        self._model = None


def _from_gguf(path: Path) -> Any:
    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture not in _CLASSES:
        raise UnsupportedError(
            f"{path}: the reference reads GGUF files of {', '.join(_CLASSES)}, not "
            f"{architecture!r}; give it a folder of transformers instead"
        )
    config_class, model_class, key = _CLASSES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    prefix = f"{architecture}."
    options = {
        name.removeprefix(prefix): v for name, v in fields.items() if name.startswith(prefix)
    }
    values = _configuration(architecture, options)
    values["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    values["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config: Any = getattr(transformers, config_class)(**values)
    config._attn_implementation = "eager"
    model: Any = getattr(transformers, model_class)(config).to(torch.float32)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, key), config.num_hidden_layers)
    unused = set(tensors) - {"rope_freqs.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = names.get_name(name, (".weight", ".bias"))
            if stored not in tensors:
                raise FormatError(f"{path}: no tensor {stored} for {name}; another architecture?")
            unused.discard(stored)
            tensor = tensors[stored]
            data: Any = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                data = _halves(data, config.head_dim)
            if architecture == "gemma3" and "norm" in name:
                data = data - np.float32(1)
            parameter.copy_(torch.from_numpy(np.array(data)))
    if unused:
        raise FormatError(f"{path}: tensors without a place: {', '.join(sorted(unused)[:8])}")
    return model


def _configuration(architecture: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration of transformers from the keys of a GGUF file."""
    scaled = sorted(key for key in options if key.startswith("rope.scaling."))
    if scaled:
        raise UnsupportedError(
            f"the reference does not read rope scaling from GGUF files ({scaled[0]}); give it a "
            "folder of transformers instead"
        )
    hidden, heads = options["embedding_length"], options["attention.head_count"]
    theta = options.get("rope.freq_base", 10000.0)
    values = {
        "hidden_size": hidden,
        "intermediate_size": options["feed_forward_length"],
        "num_hidden_layers": options["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": options.get("attention.head_count_kv", heads),
        "head_dim": options.get("attention.key_length", hidden // heads),
        "max_position_embeddings": options["context_length"],
        "rms_norm_eps": options["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    if architecture == "gemma3":
        local = options.get("rope.freq_base_swa", 10000.0)
        values["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        values["sliding_window"] = options["attention.sliding_window"]
        values["query_pre_attn_scalar"] = values["head_dim"]
    return values


def _halves(rows: Any, head_dim: int) -> Any:
    """Rows of interleaved rotary features, put back into the order of rotation by halves."""
    per_head = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return per_head.swapaxes(1, 2).reshape(rows.shape)
