"""Quality: perplexity of a text, and distance from a reference."""

from sartor.evaluation.compare import Comparison, compare
from sartor.evaluation.evaluate import EvaluationReport, evaluate, run_evaluation
from sartor.evaluation.logits import LogitSource, ModelLogits, open_logits
from sartor.evaluation.text import english_text, evaluation_tokens

__all__ = [
    "Comparison",
    "EvaluationReport",
    "LogitSource",
    "ModelLogits",
    "compare",
    "english_text",
    "evaluate",
    "evaluation_tokens",
    "open_logits",
    "run_evaluation",
]
