"""Settings, results and errors of a section of the benchmark."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import RuntimeConfig


class SectionFailedError(Exception):
    """The section detected an error, which the message describes."""


class SectionSkippedError(Exception):
    """The section can't run on this machine, which is no failure."""


@dataclass(frozen=True)
class Context:
    """Settings of a section: device, sizes and folders.

    `carried` is the folder of `.gpu`, `unpacked` its archive's content, `scratch` a folder of the
    section's own, `results` the file that it writes.
    """

    name: str
    device: str
    tiny: bool
    carried: str
    unpacked: str
    scratch: str
    results: str
    fails: bool = False
    """Fail on purpose, to test what happens then."""

    @property
    def runtime(self) -> RuntimeConfig:
        """Return the device as the product's stages take it."""
        # Imported here, so that a missing package fails sections and not the whole run.
        from rlhf.config import RuntimeConfig

        return RuntimeConfig(
            device="cuda" if self.device == "cuda" else "cpu", threads=self.threads
        )

    @property
    def threads(self) -> int:
        """Return the CPU threads of torch; tiny tensors gain nothing by a second."""
        return 1 if self.tiny else 2

    def to_json(self) -> str:
        """Serialise the context as the argument of a process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Context:
        """Restore a context from `to_json`."""
        return cls(**json.loads(text))


@dataclass
class Results:
    """A section's numbers and status, written to its file on every change."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    status: str = ""
    reason: str = ""

    def put(self, **values: Any) -> None:
        """Add values and write the file."""
        self.values.update(values)
        self._write()

    def end(self, status: str, reason: str = "") -> None:
        """Record the section's status: ok, failed or skipped."""
        self.status, self.reason = status, reason
        self._write()

    def _write(self) -> None:
        # Replaced atomically: the parent reads it while the section runs.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps([self.values, self.status, self.reason]))
        temporary.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read the results written so far."""
        return cls(path, *json.loads(path.read_text())) if path.is_file() else cls(path)


def finite(value: Any) -> Any:
    """Return nested results with None for numbers that JSON can't hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_finite(value: Any, path: str = "") -> list[str]:
    """Return the paths of numbers in nested results that are not finite."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in not_finite(v, f"{path}.{k}".strip("."))]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in not_finite(v, f"{path}[{i}]")]
    return [path] if isinstance(value, float) and not math.isfinite(value) else []
