"""Speed: prompts, decoding, batches, memory and start-up of one model on this machine."""

from sartor.bench.report import BenchReport, Spread
from sartor.bench.run import run_bench

__all__ = ["BenchReport", "Spread", "run_bench"]
