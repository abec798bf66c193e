"""Compares greedy answers of Sartor with those of llama.cpp, token by token.

Both get the same token ids (Sartor's tokenizer) and no sampling. Needs llama-cpp-python, here
or in the environment of another interpreter. Where the two first differ, the script says how
close the two likeliest tokens were in Sartor: rounding may decide a near tie either way, so a
difference at a wide margin is a mistake, one at a narrow margin is not.

    python benchmarks/greedy_against_llama_cpp.py MODEL.gguf [--activation int8] [--python P]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_cpp_process import ask

from sartor import LLM, SamplingParams
from sartor.errors import SartorError

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three most important ideas in physics are",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, two people walked on",
    "A list of fruits: apple, banana,",
)


@dataclass(frozen=True)
class Result:
    """One prompt: tokens that agree from the start, and the margin where they cease to.

    ``margin`` is the difference of Sartor's two likeliest log probabilities there, in nats.
    """

    prompt: str
    agreed: int
    tokens: int
    margin: float | None


def llama_cpp_tokens(
    python: str, model: Path, prompts: Sequence[Sequence[int]], tokens: int
) -> list[list[int]]:
    """Greedy tokens of each prompt by llama.cpp, in a process and environment of its own."""
    request = {"model": str(model.resolve()), "prompts": list(prompts), "tokens": tokens}
    answers: list[list[int]] = json.loads(ask(python, "llama_cpp_greedy.py", request))
    return answers


def compare(llm: LLM, prompts: Sequence[Sequence[int]], other: list[list[int]]) -> list[Result]:
    """Sartor's answers beside those of another engine."""
    results = []
    for text, prompt, expected in zip(PROMPTS, prompts, other, strict=True):
        params = SamplingParams(
            temperature=0,
            repetition_penalty=1,
            max_tokens=len(expected),
            ignore_eos=True,
            logprobs=2,
        )
        (choice,) = llm.generate(list(prompt), params)[0].choices
        pairs = zip(choice.tokens, expected, strict=True)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected))
        margin = None
        if agreed < len(expected):
            first, second = choice.logprobs[agreed].top[:2]
            margin = first.logprob - second.logprob
        results.append(Result(text, agreed, len(expected), margin))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--activation", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--kv", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter that has llama-cpp-python"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    try:
        with LLM(
            options.model, activation=options.activation, kv=options.kv, max_context=1024
        ) as llm:
            prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
            other = llama_cpp_tokens(options.python, options.model, prompts, options.tokens)
            results = compare(llm, prompts, other)
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"model": str(options.model), "results": [asdict(r) for r in results]}))
        return 0
    for result in results:
        margin = "" if result.margin is None else f", then a margin of {result.margin:.3f} nats"
        print(f"{result.agreed:3}/{result.tokens}{margin}: {result.prompt!r}")
    agreed, total = sum(r.agreed for r in results), sum(r.tokens for r in results)
    print(f"{agreed} of {total} tokens agree before the first difference of their prompt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
