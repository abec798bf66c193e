"""Greedy answers of a backend on a small program with full attention, a window, a recurrence and
an adapter, alone and in company: prints them as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
from engine_helpers import make_engine, prompt, request, run, tokens

from sartor.graph import LowRank


def main() -> None:
    engine = make_engine(sys.argv[1], windows=(0, 7, "recurrent"))
    rng = np.random.default_rng(3)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    engine.load_adapter("loud", {"layers.0.q.weight": LowRank(down, up)})
    requests = [request(f"r{i}", prompt(i, 5 + 9 * i)) for i in range(4)]
    requests.append(request("adapted", prompt(2, 23), adapter="loud"))
    answers = run(engine, *requests)
    print(json.dumps({name: tokens(chunks) for (name, _), chunks in answers.items()}))


if __name__ == "__main__":
    main()
