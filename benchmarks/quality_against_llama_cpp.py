"""How far Sartor and llama.cpp are from float32 arithmetic on the same file.

Both read the same page of English token by token; the reference is Sartor with float32
activations and state, which tests hold to transformers. Needs llama-cpp-python, here or in the
environment of another interpreter.

    python benchmarks/quality_against_llama_cpp.py MODEL.gguf [--positions 512] [--python P]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp_process import ask

from sartor.errors import SartorError
from sartor.evaluation.compare import Comparison, compare
from sartor.evaluation.logits import open_logits
from sartor.evaluation.text import english_text, evaluation_tokens
from sartor.plan import ExecutionPlan

F32 = npt.NDArray[np.float32]


def sartor_logits(model: Path, plan: ExecutionPlan, positions: int) -> tuple[tuple[int, ...], F32]:
    """The tokens of the text, and the logits ``[positions, vocabulary]``."""
    source = open_logits(model, plan, model.name)
    try:
        tokens = evaluation_tokens(source.loaded.tokenizer, english_text(), positions)
        return tokens, np.concatenate([rows.copy() for rows in source.chunks(tokens)])
    finally:
        source.close()


def llama_cpp_logits(python: str, model: Path, tokens: Sequence[int]) -> F32:
    """The same by llama.cpp, in a process and environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "logits.npy")
        request = {"model": str(model.resolve()), "tokens": list(tokens), "to": str(to)}
        ask(python, "llama_cpp_logits.py", request)
        logits: F32 = np.load(to)
        return logits


def line(name: str, found: Comparison) -> str:
    return (
        f"{name:10} mean KL {found.mean_kl:.5f}, same likeliest token {found.top_1_agreement:.1%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter that has llama-cpp-python"
    )
    options = parser.parse_args()
    exact = ExecutionPlan(activation="fp32", kv="fp32")
    try:
        tokens, reference = sartor_logits(options.model, exact, options.positions)
        own = compare(reference, sartor_logits(options.model, ExecutionPlan(), len(tokens))[1])
        other = compare(reference, llama_cpp_logits(options.python, options.model, tokens))
    except SartorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(tokens)} positions against float32 arithmetic, nats a position")
    print(line("Sartor", own))
    print(line("llama.cpp", other))
    print(f"ratio      {own.mean_kl / other.mean_kl:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
