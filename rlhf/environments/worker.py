"""Runs one function of a user's in a process of its own; started by `custom.py`, as a script.

    python -P worker.py <file> <module or ""> <function> <folder for imports>

One JSON line in, one out: {"batch": [...]} gives {"values": [...]} or {"error": "..."}. It imports
nothing of this project, so that it starts in a moment. What the function prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO


def main() -> None:
    """Load the function, then answer until stdin ends."""
    file, module, name, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a print must not look like an answer
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    function: Callable[..., Any] | None = None
    while True:
        line = requests.get()
        try:
            function = function or _load(file, module, name, folder)
            answer: dict[str, Any] = {"values": _numbers(function(json.loads(line)["batch"]))}
        except BaseException as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:500]}
        answers.write(json.dumps(answer).encode() + b"\n")


def _listen(stdin: BinaryIO, requests: queue.Queue[bytes]) -> None:
    """Take requests; when the parent is gone, so is this, even in the midst of an answer."""
    for line in stdin:
        requests.put(line)
    os._exit(0)


def _load(file: str, module: str, name: str, folder: str) -> Callable[..., Any]:
    sys.path.insert(0, folder)
    if module:
        loaded = importlib.import_module(module)
        found = os.path.realpath(str(loaded.__file__))
        if found != file:
            raise ImportError(f"the module {module!r} is {found!r} already; rename yours")
    else:
        spec = importlib.util.spec_from_file_location("rlhf_custom_reward", file)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    function = getattr(loaded, name, None)
    if not callable(function):
        raise AttributeError(f"{file!r} has no function {name!r}")
    return function


def _numbers(values: Any) -> list[float]:
    """A list of numbers, also of an array's or a tensor's."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"it returned a {type(values).__name__}; return a list of numbers")
    values = [v.item() if hasattr(v, "item") else v for v in values]
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"value {i} is a {type(value).__name__}; return numbers")
    return [float(value) for value in values]


if __name__ == "__main__":
    main()
