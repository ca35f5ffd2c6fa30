"""Check of a GGUF file by llama-cpp-python, in a process without this project and without torch.

`python -I rlhf/gguf_check.py <request.json> <result.json>`. It stands apart because it runs as a
script.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Run the check that a request describes, and write its result."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    Path(arguments[1]).write_text(json.dumps(check(request)), encoding="utf-8")


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Return how llama.cpp reads prompts, and how likely replies to them are by its model.

    `tokens_equal` by prompt, true where there is no text; `log_probs` and `is_best` of each token
    of each reply.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]  (an extra)
    import numpy as np

    pairs = [*zip(request["prompts"], request["replies"], strict=True)]
    longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
    model = llama_cpp.Llama(
        request["file"], n_ctx=longest + 1, n_batch=longest + 1, n_gpu_layers=0, logits_all=True,
        verbose=False,
    )  # fmt: skip
    result: dict[str, Any] = {"version": llama_cpp.__version__, "log_probs": [], "is_best": []}
    result["tokens_equal"] = [
        text is None or model.tokenize(text.encode(), add_bos=False, special=True) == ids
        for text, ids in zip(request["texts"], request["prompts"], strict=True)
    ]
    for prompt, reply in pairs:
        model.reset()
        model.eval([*prompt, *reply])
        scores = np.asarray(model.scores[len(prompt) - 1 : len(prompt) + len(reply) - 1], float)
        top = scores.max(1, keepdims=True)
        logs = scores - top - np.log(np.exp(scores - top).sum(1, keepdims=True))
        rows = np.arange(len(reply))
        result["log_probs"].append(logs[rows, reply].tolist())
        result["is_best"].append((logs.argmax(1) == np.asarray(reply)).tolist())
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
