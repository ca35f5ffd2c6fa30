"""Worker process of a custom reward function, started by `custom.py` as a script.

    python -P worker.py <file> <module or ""> <function> <folder for imports>

Protocol: one JSON line per request on stdin, {"batch": [...]}, and one per response on stdout,
{"values": [...]} or {"error": "..."}. Output of the function goes to stderr. It imports nothing of
this project, so that it starts quickly.
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
    """Load the function and serve requests until stdin ends."""
    file, module, name, folder = sys.argv[1:]
    responses = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a print of the function must not be read as a response
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    function: Callable[..., Any] | None = None
    while True:
        line = requests.get()
        try:
            function = function or _load(file, module, name, folder)
            response: dict[str, Any] = {"values": _numbers(function(json.loads(line)["batch"]))}
        except BaseException as error:
            text = " ".join(str(error).split())
            response = {"error": f"{type(error).__name__}: {text}"[:500]}
        responses.write(json.dumps(response).encode() + b"\n")


def _listen(stdin: BinaryIO, requests: queue.Queue[bytes]) -> None:
    """Queue requests; end the process when stdin is closed, even during a call."""
    for line in stdin:
        requests.put(line)
    os._exit(0)


def _load(file: str, module: str, name: str, folder: str) -> Callable[..., Any]:
    """Import the function from its module, or from the file if it has no module name."""
    sys.path.insert(0, folder)
    if module:
        loaded = importlib.import_module(module)
        path = os.path.realpath(str(loaded.__file__))
        if path != file:
            raise ImportError(f"the module {module!r} is {path!r} already; rename yours")
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
    """Convert a list, array or tensor to a list of numbers."""
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
