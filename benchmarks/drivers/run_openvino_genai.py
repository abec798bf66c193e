"""OpenVINO GenAI on the GGUF itself: 4-bit weights as they are, int8 activations, 8-bit state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Answer, Load, LoopDriver, Tokens, serve

GROUP = 32
"""Features that share a scale of the dynamic int8 activations: as many as in the weights."""


class OpenVinoDriver(LoopDriver):
    def load(self, request: Load) -> Answer:
        self._context = request.context
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = request.sequences
        scheduler.enable_prefix_caching = False
        self._next = 0
        self._handles: list[Any] = []
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            request.model,
            scheduler,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": request.threads,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
                "KV_CACHE_PRECISION": openvino.Type.u8,
            },
        )
        return {
            "version": f"{openvino_genai.__version__}, openvino {openvino.__version__}",
            "settings": f"GGUF weights, dynamic int8 in groups of {GROUP}, u8 state",
        }

    def start(self, prompts: Sequence[Tokens]) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = self._context - len(prompts[0])
        config.ignore_eos = True
        config.do_sample = False
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            self._handles.append(self._pipeline.add_request(self._next, ids, config))
            self._next += 1
        begun: set[int] = set()
        while len(begun) < len(prompts):
            self._pipeline.step()
            begun |= {i for i, tokens in enumerate(self._read()) if tokens}

    def step(self) -> None:
        self._pipeline.step()
        if any(tokens != 1 for tokens in self._read()):
            raise RuntimeError("a step gave not exactly one token to every sequence")

    def end(self) -> None:
        for handle in self._handles:
            handle.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._handles = []

    def _read(self) -> list[int]:
        """Tokens of every sequence that are new."""
        return [
            sum(len(output.generated_ids) for output in handle.read().values())
            if handle.can_read()
            else 0
            for handle in self._handles
        ]


if __name__ == "__main__":
    serve(OpenVinoDriver())
