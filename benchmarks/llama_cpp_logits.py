"""The logits of llama.cpp for every position of a text, with the kernels that `compare.py` times.

Needs llama-cpp-python and nothing of Sartor, so it can run in an environment of its own.
Request on standard input: {"model": path, "tokens": [ids], "to": path}; it writes `to`, a numpy
file of float32 [positions, vocabulary].
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    tokens = request["tokens"]
    engine = llama_cpp.Llama(
        request["model"],
        n_gpu_layers=0,
        n_ctx=len(tokens),
        logits_all=True,
        flash_attn=True,
        verbose=False,
    )
    engine.eval(tokens)
    np.save(request["to"], np.asarray(engine.scores[: len(tokens)], np.float32))


if __name__ == "__main__":
    main()
