"""Custom code: finding and checking a Python function's file without importing it.

Imports no torch, for the preflight checks and the worker that runs the function.
"""

from __future__ import annotations

import ast
import hashlib
import os
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.permissions import allowed_code

#: Environment variable with the folders (separated as in PATH) that code may run from. It is no
#: field, because people who may set a run's parameters may not be allowed to run code here.
ALLOWED = "RLHF_ALLOWED_CODE"


class CustomCode:
    """File of a custom function, with the digest of its content.

    Args:
        function: `module:function` or `file.py:function`.
        field: Section of the configuration that names it, for messages.

    Raises:
        ConfigError: The file does not exist or lies outside of the allowed folders.
    """

    def __init__(self, function: str, field: str) -> None:
        self.where = f"{field}.function = {function!r}"
        path, _, self.name = function.rpartition(":")
        self.module = "" if path.endswith(".py") else path
        self.file, self.folder = self._find(path)
        self.digest = hashlib.sha256(self.file.read_bytes()).hexdigest()

    def check(self) -> None:
        """Check by its syntax tree that the file defines or imports the function.

        Raises:
            ConfigError: The file is not valid Python, or has no such name.
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
            existing = f"it has {', '.join(functions)}" if functions else "it has none"
            raise ConfigError(
                f"{self.where}: {self.file.name} has no function {self.name!r}; {existing}"
            )

    def _find(self, path: str) -> tuple[Path, Path]:
        """Return the function's file, and the folder that its imports start from."""
        listed, where = allowed_code(ALLOWED)
        allowed = [Path(folder).resolve() for folder in listed]
        if not allowed:
            raise ConfigError(
                f"{self.where}: code of one's own is not allowed here; the operator has to list "
                f"its folder in {where}"
            )
        package = path.replace(".", "/")
        names = [f"{package}.py", f"{package}/__init__.py"] if self.module else [path]
        starts = allowed if self.module else [Path.cwd(), *allowed]
        matches = [(s, s / name) for s in starts for name in names if (s / name).is_file()]
        if not matches:
            raise ConfigError(
                f"{self.where}: no such {'module' if self.module else 'file'} in {where} = "
                f"{os.pathsep.join(listed)!r}; correct the name"
            )
        start, file = matches[0][0], matches[0][1].resolve()
        # After links are resolved, so that a link can't lead out of the allowed folders.
        if not any(file.is_relative_to(folder) for folder in allowed):
            raise ConfigError(
                f"{self.where}: lies in {str(file.parent)!r}, outside of the folders in {where}; "
                "move it there"
            )
        return file, start if self.module else file.parent
