"""vLLM on the CPU: bf16 weights and state, its engine in this process and driven by steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from protocol import Answer, Load, LoopDriver, Tokens, serve

STATE_GB = 2
"""Of KV cache: the largest batch of the bench fits in."""


class VllmDriver(LoopDriver):
    def load(self, request: Load) -> Answer:
        cores = sorted(os.sched_getaffinity(0))[: request.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(STATE_GB)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are called from here
        os.environ["OMP_NUM_THREADS"] = str(request.threads)
        import vllm  # reads the environment when it is imported

        self._sampling = vllm.SamplingParams
        self._ids: list[str] = []
        self._next = 0
        self._context = request.context
        self._engine: Any = vllm.LLM(
            request.folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=request.context,
            max_num_seqs=request.sequences,
            enable_prefix_caching=False,
        ).llm_engine
        return {"version": vllm.__version__, "settings": "bf16, its defaults for a CPU"}

    def start(self, prompts: Sequence[Tokens]) -> None:
        params = self._sampling(
            temperature=0,
            ignore_eos=True,
            max_tokens=self._context - len(prompts[0]),
            detokenize=False,
        )
        for prompt in prompts:
            self._ids.append(str(self._next))
            self._next += 1
            self._engine.add_request(self._ids[-1], {"prompt_token_ids": list(prompt)}, params)
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun |= {found.request_id for found in self._engine.step()}

    def step(self) -> None:
        if len(self._engine.step()) != len(self._ids):
            raise RuntimeError("a step gave not one token to every sequence")

    def end(self) -> None:
        self._engine.abort_request(self._ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._ids = []


if __name__ == "__main__":
    serve(VllmDriver())
