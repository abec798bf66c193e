"""Greedy tokens by llama.cpp on the CPU: a JSON request on standard input, the answer on output.

Needs llama-cpp-python and nothing of Sartor, so it can run in an environment of its own.
Request: {"model": path, "prompts": [[ids]], "tokens": count}; answer: [[ids]].
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as api


def use_plain_kernels() -> None:
    """Keeps weights as the file has them: answers are compared here, not speed.

    Repacked layouts bring their own kernels; a build with AMX crashes on virtual machines that
    show AMX but do not allow it.
    """
    defaults = api.llama_model_default_params

    def changed() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = changed


def main() -> None:
    request = json.load(sys.stdin)
    use_plain_kernels()
    engine = llama_cpp.Llama(request["model"], n_gpu_layers=0, n_ctx=1024, verbose=False)
    answers = []
    for prompt in request["prompts"]:
        engine.reset()
        stream = engine.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([int(token) for token in itertools.islice(stream, request["tokens"])])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
