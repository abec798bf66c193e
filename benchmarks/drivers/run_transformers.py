"""A loop over ``transformers``: bf16 weights and state, greedy choice, a batch of equal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from protocol import Answer, Load, LoopDriver, Tokens, serve


class TransformersDriver(LoopDriver):
    def load(self, request: Load) -> Answer:
        torch.set_num_threads(request.threads)
        torch.set_grad_enabled(False)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            request.folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        return {
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "settings": "bf16, sdpa attention, no compilation",
        }

    def start(self, prompts: Sequence[Tokens]) -> None:
        self._cache: Any = transformers.DynamicCache(config=self._model.config)
        self._forward(torch.tensor([list(prompt) for prompt in prompts]))

    def step(self) -> None:
        self._forward(self._tokens)

    def end(self) -> None:
        self._cache = self._tokens = None

    def _forward(self, tokens: torch.Tensor) -> None:
        found = self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._tokens: Any = found.logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    serve(TransformersDriver())
