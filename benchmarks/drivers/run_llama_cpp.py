"""llama.cpp by its C interface: repacked weights, flash attention, KV in fp16."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_api import CHUNK, LlamaDriver
from llama_cpp import llama_cpp as api
from protocol import Answer, Load, serve


class LlamaCppDriver(LlamaDriver):
    api = api

    def load(self, request: Load) -> Answer:
        self._threads = request.threads
        self.context_tokens = request.context
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = True  # layouts of its own, which its fast kernels need
        self._model = api.llama_model_load_from_file(request.model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {request.model}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        system = api.llama_print_system_info().decode()
        features = system.partition("CPU :")[2].replace(" = 1", "").strip(" |").split(" | ")
        return {
            "version": llama_cpp.__version__,
            "settings": f"repacked weights, flash attention, fp16 state; {' '.join(features)}",
        }

    def make_context(self, sequences: int) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx = sequences * self.context_tokens
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False  # no sequence looks at another's keys
        return api.llama_init_from_model(self._model, params)

    def clear(self, context: Any) -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)


if __name__ == "__main__":
    serve(LlamaCppDriver())
