"""Models that have no file in ``sartor.models``: run by the code that ``transformers`` has.

Slower than a model of Sartor's own, and marked as such: one sequence at a time, weights in the
checkpoint's own precision, no prefix cache, no adapters. Needs the extra ``transformers``.
"""
