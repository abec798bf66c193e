"""A causal language model of ``transformers``, and how it goes on from where a sequence stands."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from sartor.graph.batch import F32

Mode = Literal["chunked", "stepwise", "recompute"]
"""How a model continues a sequence.

chunked    its cache takes any number of further tokens
stepwise   its cache takes one further token at a time
recompute  it has no cache that can be trusted: every step computes the whole sequence
"""

MODES: tuple[Mode, ...] = ("chunked", "stepwise", "recompute")


class CausalLM:
    """A model in evaluation mode on one device. A *memory* is what it keeps of a sequence: its
    own cache object, opaque here, which the next step changes in place; or the tokens so far."""

    def __init__(self, model: Any, mode: Mode) -> None:
        """``model`` is a PreTrainedModel. ``mode`` must be one that it has been found fit for."""
        self.model = model
        self.mode = mode
        self.device: torch.device = model.device
        arguments = inspect.signature(model.forward).parameters
        self._arguments = tuple(arguments)
        self._cache: str | None = None
        self._keeps = "logits_to_keep" in arguments
        # Some models hand this on in their further keywords; all of those know it.
        kinds = {argument.kind for argument in arguments.values()}
        self._caching = "use_cache" in arguments or inspect.Parameter.VAR_KEYWORD in kinds

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def can(self, mode: Mode) -> bool:
        """Whether a mode can be tried at all."""
        return mode == "recompute" or self._caching

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], memory: Any, rows: int) -> tuple[F32, Any]:
        """Logits of the last ``rows`` of the new ``tokens``, ``[rows, vocab]``, and the memory
        after them. ``memory`` is None before the first token; it must not be used again."""
        if self.mode == "recompute":
            history = array("i") if memory is None else memory
            history.extend(tokens)
            logits, _ = self._forward(history, None, rows)
            return logits.numpy(force=True), history
        parts = []
        for start, stop in self._pieces(len(tokens), memory is not None):
            wanted = min(max(stop - (len(tokens) - rows), 0), stop - start)
            logits, memory = self._forward(tokens[start:stop], memory, wanted)
            parts.append(logits)
        return torch.cat(parts).numpy(force=True), memory

    def _pieces(self, count: int, begun: bool) -> Iterator[tuple[int, int]]:
        """Runs of tokens that one call of the model takes."""
        if self.mode == "stepwise" and begun:
            yield from ((i, i + 1) for i in range(count))
        else:
            yield 0, count

    def _forward(self, tokens: Sequence[int], cache: Any, rows: int) -> tuple[torch.Tensor, Any]:
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor([list(tokens)], device=self.device),
            "return_dict": True,
        }
        if self._caching:
            arguments["use_cache"] = self.mode != "recompute"
        if cache is not None:
            assert self._cache is not None
            arguments[self._cache] = cache
        if self._keeps:
            # A vocabulary's width for every token of a prompt would be most of the work of a
            # small model; 0 means all.
            arguments["logits_to_keep"] = max(rows, 1)
        out = self.model(**arguments)
        logits: torch.Tensor = out.logits[0]
        kept = logits[len(logits) - rows :].float()
        if self._cache is None:
            # Its name differs between models and between releases of the library (cache,
            # past_key_values, cache_params, state, mems): it is what comes back under the name
            # of another argument. Newer releases give it under its older names too.
            others = (name for name in self._arguments if name not in arguments)
            self._cache = next((name for name in others if hasattr(out, name)), None)
        return kept, getattr(out, self._cache, None) if self._cache else None


def nbytes(memory: Any) -> int:
    """Bytes of a memory: of all distinct tensors in it, or of its tokens."""
    if isinstance(memory, array):
        return len(memory) * memory.itemsize
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)
        elif hasattr(value, "__dict__"):
            walk(vars(value))

    walk(memory)
    return sum(storages.values())
