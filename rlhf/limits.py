"""Limits on the memory and time that text from strangers can take: patterns, JSON, YAML, files.

A few hundred characters suffice for gigabytes: nested repeats in a pattern, aliases of aliases in
YAML. Everything here refuses by a ValueError that says what is too much, before it is computed.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import regex

from rlhf.files import exists, is_file

#: Bytes of a text that is configuration: preset, environment, override.
MAX_CONFIG_BYTES = 2**18
#: Bytes of a JSON file of a model that is not its weights or tokenizer.
MAX_MODEL_BYTES = 2**20
#: Bytes of a model's tokenizer; those with the largest vocabularies have 35 million.
MAX_TOKENIZER_BYTES = 2**28
#: Levels of nesting of JSON and YAML, and values in a configuration, aliases written out.
MAX_DEPTH, MAX_VALUES = 64, 50_000
#: Characters of a pattern, or of a name in a configuration.
MAX_PATTERN = 1_000
#: Bytes of memory and seconds of CPU that compiling a pattern may take.
PATTERN_BYTES, PATTERN_SECONDS = 2**28, 2.0
#: Seconds that matching one name may take.
NAME_SECONDS = 1.0

#: A call of the whole pattern or of a group, (?R), (?1) or (?&name), which may be recursive: half a
#: gigabyte in the second that matching may take. A backslash and what it quotes are passed over.
_CALL = re.compile(r"\\.|(\(\?(?:R|[+-]?\d+|&\w*|P>\w*)\))", re.DOTALL)

#: Compiles the patterns of its input one by one; ends early, by a signal, at the first that takes
#: too long. Reports each as a line of JSON: null, or what is wrong.
_COMPILER = """
import json, resource, signal, sys
import regex
memory, seconds = int(sys.argv[1]), float(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
print("true", flush=True)
for pattern in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        regex.compile(pattern)
        problem = None
    except MemoryError:
        problem = "it takes too much memory; write it without nested repeats"
    except RecursionError:
        problem = "it is nested too deeply"
    except Exception as error:
        problem = str(error)
    print(json.dumps(problem), flush=True)
"""


def pattern_error(pattern: str) -> str | None:
    """Return why a regular expression can't be used, or None."""
    return pattern_errors((pattern,)).get(pattern)


@functools.lru_cache(maxsize=64)
def pattern_errors(patterns: tuple[str, ...]) -> dict[str, str]:
    """Return the regular expressions that can't be used, each with the reason.

    What may grow without bounds is compiled by a process of its own first, under a limit.
    """
    found = {pattern: _plain_error(pattern) for pattern in patterns}
    rest = [text for text in patterns if found[text] is None and not _is_cheap(text)]
    while rest:
        results = _compiled_elsewhere(rest)
        found |= zip(rest, results, strict=False)
        rest = rest[len(results) :]
    return {pattern: error for pattern, error in found.items() if error}


def run_limited(program: str, inputs: Sequence[str], memory: int, seconds: float) -> list[Any]:
    """Run a Python program on texts in a process of limited memory and CPU time.

    It gets memory and seconds as arguments, the texts as a JSON list, and writes a line of JSON
    when it is ready, and one for each text. Fewer results than texts mean that the next one took
    too much.

    Raises:
        RuntimeError: It did not get ready, which is no fault of the texts.
    """
    command = [sys.executable, "-I", "-c", program, str(memory), str(seconds)]
    done = subprocess.run(
        command, input=json.dumps(inputs), capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if not lines:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{sys.executable} can't run a check under a memory limit: {last}")
    return [json.loads(line) for line in lines[1:]]


def matches_whole(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern matches as a whole.

    Raises:
        ValueError: The pattern can't be used, or matching takes too long.
    """
    error = pattern_error(pattern)
    if error:
        raise ValueError(f"is no regular expression ({error}); mend it")
    compiled = regex.compile(pattern)
    try:
        return [name for name in names if compiled.fullmatch(name, timeout=NAME_SECONDS)]
    except (TimeoutError, MemoryError):
        raise ValueError(
            f"takes more than {NAME_SECONDS:g} s on one name; write it without nested repeats"
        ) from None


def load_json(data: str | bytes, **options: Any) -> Any:
    """Parse JSON as `json.loads` does, of limited depth.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(data, **options)
    except RecursionError:
        raise _too_deep() from None
    check_tree(value, most=len(data) + 1)
    return value


def check_tree(value: Any, most: int = MAX_VALUES) -> None:
    """Check depth and number of values of nested lists and mappings.

    A part that occurs several times counts each time, as what walks the tree meets it.

    Raises:
        ValueError: One is above its limit.
    """
    measure(value, _children, most)


def measure(root: Any, children: Callable[[Any], Sequence[Any]], most: int = MAX_VALUES) -> None:
    """Check depth and number of the nodes of a tree, in which nodes may be shared.

    Raises:
        ValueError: One is above its limit.
    """
    sizes: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def size(node: Any, depth: int) -> tuple[int, int]:
        """Return number of nodes and height of a tree."""
        if depth > MAX_DEPTH:
            raise _too_deep()
        inner = children(node)
        if not inner:
            return 1, 0
        if id(node) in open_nodes:
            raise ValueError("holds a value that contains itself; write it out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            below = [size(child, depth + 1) for child in inner]
            open_nodes.remove(id(node))
            sizes[id(node)] = 1 + sum(n for n, _ in below), 1 + max(h for _, h in below)
        total, height = sizes[id(node)]
        if total > most:
            raise ValueError(f"holds more than {most:,} values, aliases written out; shorten it")
        if depth + height > MAX_DEPTH:
            raise _too_deep()
        return total, height

    size(root, 0)


def read_text(path: Path, most: int = MAX_CONFIG_BYTES) -> str:
    """Read a text file of limited size.

    Raises:
        OSError: It can't be read.
        ValueError: It is larger, no regular file, or no UTF-8.
    """
    if exists(path) and not is_file(path):
        raise ValueError("is no regular file; give the path of one")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"has more than {most:,} bytes; is this the right file?")
    return data.decode("utf-8")


def read_some(path: Path, most: int) -> bytes:
    """Return a file's bytes, of a larger file the first ones: JSON that is cut is no JSON."""
    with path.open("rb") as file:
        return file.read(most + 1)


def _plain_error(pattern: str) -> str | None:
    """Return what can be seen without compiling."""
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern):,} characters, and at most {MAX_PATTERN:,} are read"
    call = next((match[1] for match in _CALL.finditer(pattern) if match[1]), None)
    if call:
        return f"{call} calls a pattern within itself, which takes memory without end; write it out"
    if not _is_cheap(pattern):
        return None
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        return str(error) or type(error).__name__
    return None


def _is_cheap(pattern: str) -> bool:
    """Return whether compiling takes time and memory in proportion to the length."""
    return "(" not in pattern


def _compiled_elsewhere(patterns: list[str]) -> list[str | None]:
    """Return the errors of the first patterns, up to one that ended the compiling process."""
    results: list[str | None] = run_limited(_COMPILER, patterns, PATTERN_BYTES, PATTERN_SECONDS)
    if len(results) < len(patterns):
        results.append("it takes too much time or memory; write it without nested repeats")
    return results


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list | tuple) else ()


def _too_deep() -> ValueError:
    return ValueError(f"is nested more than {MAX_DEPTH} levels deep; write it flatter")
