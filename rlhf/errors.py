"""Errors that the pipeline raises on purpose.

Their messages name the field or key, the value and the cure. Every class passes all of its
arguments on, so that errors survive pickling between processes, and inherits the standard exception
that a caller would expect to catch.
"""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from typing import Any

from rlhf.plain_text import one_line, shortened

#: Exit code of a command whose input is wrong.
BAD_INPUT = 2
#: Packages of this project, for the place of a fault.
_PACKAGES = ("rlhf", "tasks", "flows")


class RLHFError(Exception):
    """Base of all errors that this project raises."""

    #: True if a retry of the same work may succeed.
    retriable = False


class ConfigError(RLHFError, ValueError):
    """A configuration value is unusable; raised before any expensive work."""


class NoPreferences(ConfigError):
    """The rows of a source of pairs hold nothing that says which reply is better."""


class DataError(RLHFError, ValueError):
    """Input data are missing, empty or not in a form to train on."""


class PromptUnusable(DataError):
    """A model can't be given a prompt: its chat template refuses it, or it is too long.

    Args:
        reason: Kind of fault, equal for all prompts with it.
        detail: What is special in this prompt.
        cure: What a user can do about it.
    """

    def __init__(self, reason: str, detail: str, cure: str) -> None:
        super().__init__(reason, detail, cure)
        self.reason, self.detail, self.cure = reason, detail, cure

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}; {self.cure}"


class StoreError(RLHFError, OSError):
    """The object store refused or failed a request."""

    retriable = True


class StoreConfigError(StoreError, ConfigError):
    """The store can't be used as configured, as when access is denied."""

    retriable = False


class ArtifactMissing(StoreError):
    """A manifest, blob or reference is not in the store."""

    retriable = False


class ArtifactCorrupt(StoreError):
    """Stored bytes do not match their manifest, or the manifest is invalid or unsafe."""

    retriable = False


class TrainingError(RLHFError, ArithmeticError):
    """Training can't continue, as after a non-finite loss or a wrong checkpoint."""


class NotFinite(TrainingError):
    """A loss or gradient is NaN or infinite; the weights are not."""


class Interrupted(RLHFError):
    """SIGTERM was received; the work is saved, and a retry resumes from there."""

    retriable = True


class CheckpointError(RLHFError, OSError):
    """A checkpoint can't be written, as on a full disk; earlier ones are intact."""

    retriable = True


class ExportFailed(RLHFError):
    """An export does not behave like the policy in the store; nothing is left of it."""


class StageLost(RLHFError):
    """The machine or process of a stage is gone; a retry resumes from its checkpoint."""

    retriable = True


class WorkerDied(RLHFError):
    """A child process of a stage died without an error, as by a signal."""

    retriable = True


class StageFailed(RLHFError):
    """A stage's run on its deployment ended without a result, after its own retries."""


class BudgetSpent(RLHFError):
    """A run's budget is used up before a training that it needs."""


class RewardServiceError(RLHFError, ConnectionError):
    """A reward service is unreachable or fails, after retries."""

    retriable = True


class GateRejected(RLHFError):
    """A gate rejected a model; never retried.

    The same model would get the same verdict. `verdict` is the `rlhf.gates.Verdict`: rules and
    measured values.
    """

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message, verdict)
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[0])


class NotBetter(GateRejected):
    """A policy met the rules of its gate and is not better than the champion, which stays.

    A normal end of a run.
    """


class AlreadyChampion(NotBetter):
    """A policy was not found better than the champion of then, and a person promoted it since.

    A normal end of a run: its policy is the champion.
    """


class PromotionLost(RLHFError):
    """The champion was changed by another promotion meanwhile; never retried."""


class PolicyWithdrawn(RLHFError):
    """A person rolled the policy back, so a run does not promote it again."""


class ApprovalMissing(RLHFError):
    """A person has not decided yet on the promotion of this policy."""


class ApprovalRefused(RLHFError):
    """A person refused the promotion of this policy."""


class SmokeTestFailed(RLHFError):
    """The published policy, loaded as a user would, produces no answers."""


class UnexpectedError(RLHFError):
    """An exception of another library, or a fault of this program, explained in one line."""


def is_retriable(error: BaseException) -> bool:
    """Return whether a retry of the same work may succeed.

    `RLHFError.retriable` decides, or for other exceptions whether they come from the machine: an
    OSError, MemoryError or TimeoutError.
    """
    if isinstance(error, RLHFError):
        return error.retriable
    return isinstance(error, OSError | MemoryError | TimeoutError)


def explained(error: BaseException) -> RLHFError:
    """Return an error of this project: the same, or one that explains an exception of another.

    Its cause is the exception, and it is retriable if that is.
    """
    if isinstance(error, RLHFError):
        return error
    known = UnexpectedError(explain(error))
    known.retriable = is_retriable(error)
    known.__cause__ = error
    return known


def is_bad_input(error: BaseException | None) -> bool:
    """Return whether the user's input is wrong, for which commands end with exit code 2."""
    return isinstance(error, ConfigError | DataError | ArtifactMissing)


def explain(error: BaseException) -> str:
    """Return any exception as one line: what went wrong, where in this project, and the cure.

    The project's own errors say that themselves.
    """
    message = one_line(_message(error))
    if message in ("", "None"):
        message = "no message"
    if isinstance(error, RLHFError):
        return message if message != "no message" else type(error).__name__
    cure = next((cure for kind, cure in _CURES if isinstance(error, kind)), _FAULT)
    return f"{type(error).__name__}: {shortened(message)}{_place(error)}; {cure}"


_FAULT = "this is a fault of the program: report it with what --debug shows"
#: What a user can do about exceptions that have no message of ours, by their kind.
_CURES: tuple[tuple[type[BaseException], str], ...] = (
    (MemoryError, "free memory, raise its limit, or lower batch sizes and lengths"),
    (RecursionError, "look for the value or file that is nested so deeply, and flatten it"),
    (ImportError, "install the project's packages as README.md says"),
    (UnicodeError, "name and write everything in UTF-8"),
    (TimeoutError, "see that the service answers, and run the same again"),
    (OSError, "mend that, and run the same again"),
)


def _message(error: BaseException) -> str:
    """Return an exception's message without what its class adds in further lines."""
    text = str(error)
    problems: Any = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(problems):  # pydantic's
        listed: Any = problems()
        where = ".".join(str(part) for part in listed[0]["loc"])
        text = f"{where}: {listed[0]['msg']}".removeprefix(": ")
    elif isinstance(error, KeyError) and error.args:
        text = f"{error.args[0]!r} is missing"
    elif isinstance(error, MemoryError):
        text = text or "memory is used up"
    elif isinstance(error, RecursionError):
        text = "a value is nested too deeply"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return text


def _place(error: BaseException) -> str:
    """Return file and line of this project that an exception passed last."""
    root = Path(__file__).parents[1]
    for frame, line in reversed([*walk_tb(error.__traceback__)]):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root) and (parts := path.relative_to(root).parts)[0] in _PACKAGES:
            return f" ({'/'.join(parts)}:{line})"
    return ""
