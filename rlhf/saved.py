"""JSON of artifacts: what a stage has written is read by another, or refused in one line.

The store verifies bytes, not their meaning: a folder that was pushed, an artifact of another
version and a folder outside of the store may hold anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rlhf.errors import DataError, RLHFError
from rlhf.plain_text import one_line

T = TypeVar("T")
#: Longest reason in a message, in characters.
_LONGEST = 120
#: Name of a fetched artifact's folder: its digest, and what selects some of its files.
_DIGEST = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}(?:-[0-9a-f]{16})?")
#: What can be wrong with JSON from a file; nesting without end is a RecursionError.
FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RecursionError,
)  # fmt: skip


def read_saved(path: Path, shape: TypeAdapter[Any] | None = None) -> Any:
    """Read a JSON file of an artifact: an object, or what `shape` describes.

    Args:
        path: The file, directly in the artifact's folder.
        shape: What it has to hold; the value is returned as it was read.

    Raises:
        DataError: It is missing, or holds something else.
    """

    def parse() -> Any:
        value = json.loads(path.read_text(encoding="utf-8"))
        if shape is not None:
            shape.validate_python(value)
        elif not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value

    return checked(path, parse)


def checked(path: Path, read: Callable[[], T]) -> T:
    """Return what a function reads from a file of an artifact.

    Raises:
        DataError: The file is missing, or the function finds a fault.
    """
    try:
        return read()
    except RLHFError:
        raise
    except FAULTS as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception, place: str = "") -> DataError:
    """Return an error for a file of an artifact: what is wrong with it, and the cure.

    Args:
        path: The file.
        error: What reading it raised.
        place: Where in the file, for example its line.
    """
    digest = _DIGEST.fullmatch(path.parent.name)
    what = f"{path.name} of artifact {digest[1]}" if digest else str(path)
    cure = (
        f"give another artifact, or remove this one (rlhf artifacts rm {digest[1]}), so that its "
        "stage makes it anew"
        if digest
        else "restore it, or run the stage that makes it again"
    )
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what} is missing; {cure}")
    return DataError(f"{what} is damaged ({place}{_reason(error)}); {cure}")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    elif isinstance(error, KeyError):
        text = f"{error.args[0]} is missing"
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    else:
        text = str(error) or type(error).__name__
    line = one_line(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
