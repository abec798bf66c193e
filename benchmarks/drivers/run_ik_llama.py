"""ik_llama.cpp by its C interface: weights repacked at load, flash attention, KV in fp16."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from ik_llama_cpp import _ctypes_api as api
from llama_api import CHUNK, LlamaDriver
from protocol import Answer, Load, serve


class IkLlamaDriver(LlamaDriver):
    api = api

    def load(self, request: Load) -> Answer:
        self._threads = request.threads
        self.context_tokens = request.context
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = False  # repacking writes over what was read
        params.repack_tensors = True
        params.merge_qkv = True
        params.flash_attn = True
        self._model = api.llama_model_load_from_file(request.model.encode(), params)
        if not self._model:
            raise RuntimeError(f"ik_llama.cpp cannot load {request.model}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        return {
            "version": version("ik-llama-cpp-python"),
            "settings": "run-time repack, merged qkv, flash attention, fp16 state",
        }

    def make_context(self, sequences: int) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx = sequences * self.context_tokens
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn = True
        return api.llama_init_from_model(self._model, params)

    def clear(self, context: Any) -> None:
        api.llama_kv_cache_clear(context)


if __name__ == "__main__":
    serve(IkLlamaDriver())
