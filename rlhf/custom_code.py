"""Where a Python function of the operator's lies, and whether it may run; it is not loaded here."""

from __future__ import annotations

import ast
import hashlib
import os
from pathlib import Path

from rlhf.errors import ConfigError

#: Folders (separated as PATH is) from which the operator allows code to run. An environment
#: variable, for whoever may set parameters of a run may not be one who may run code here.
ALLOWED = "RLHF_ALLOWED_CODE"


class CustomCode:
    """A function's file, with a digest of its content.

    Args:
        function: `module:function` or `file.py:function`.
        field: The configuration's field that names it, for messages.

    Raises:
        ConfigError: It lies outside of the operator's folders, or does not exist.
    """

    def __init__(self, function: str, field: str) -> None:
        self.where = f"{field}.function = {function!r}"
        place, _, self.name = function.rpartition(":")
        self.module = "" if place.endswith(".py") else place
        self.file, self.folder = self._found(place)
        self.digest = hashlib.sha256(self.file.read_bytes()).hexdigest()

    def check(self) -> None:
        """Refuse what can be seen without running it.

        Raises:
            ConfigError: The file is no Python, or nothing in it has the function's name.
        """
        try:
            nodes = [*ast.walk(ast.parse(self.file.read_bytes(), self.file.name))]
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{self.where}: {self.file.name} is no Python ({error})") from None
        functions = [n.name for n in nodes if isinstance(n, ast.FunctionDef)]
        imported = [a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom)
                    for a in n.names]  # fmt: skip
        assigned = [n.id for n in nodes if isinstance(n, ast.Name)]
        known = {*functions, *imported, *assigned}
        if self.name not in known and "*" not in known:
            there = f"it has {', '.join(functions)}" if functions else "it has none"
            raise ConfigError(
                f"{self.where}: {self.file.name} has no function {self.name!r}; {there}"
            )

    def _found(self, place: str) -> tuple[Path, Path]:
        """The function's file, and the folder that its imports start from."""
        listed = [Path(p).resolve() for p in os.environ.get(ALLOWED, "").split(os.pathsep) if p]
        if not listed:
            raise ConfigError(
                f"{self.where}: code of one's own is not allowed here; the operator has to list "
                f"its folder in the environment variable {ALLOWED}"
            )
        path = f"{place.replace('.', '/')}" if self.module else place
        names = [f"{path}.py", f"{path}/__init__.py"] if self.module else [path]
        starts = listed if self.module else [Path.cwd(), *listed]
        there = [(s, s / name) for s in starts for name in names if (s / name).is_file()]
        if not there:
            raise ConfigError(
                f"{self.where}: no such {'module' if self.module else 'file'} in "
                f"{ALLOWED} = {os.environ[ALLOWED]!r}; correct the name"
            )
        start, file = there[0][0], there[0][1].resolve()
        # Links are followed first: where a file is is where it really is.
        if not any(file.is_relative_to(folder) for folder in listed):
            raise ConfigError(
                f"{self.where}: lies in {str(file.parent)!r}, outside of the folders in "
                f"{ALLOWED}; move it there"
            )
        return file, start if self.module else file.parent
