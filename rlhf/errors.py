"""Errors that the pipeline raises on purpose.

Their messages name the field or key, the value and the cure. Every class passes all of its
arguments on, so that errors survive pickling between processes, and inherits the standard exception
that a caller would expect to catch.
"""

from __future__ import annotations


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


class StageLost(RLHFError):
    """The machine or process of a stage is gone; a retry resumes from its checkpoint."""

    retriable = True


class WorkerDied(RLHFError):
    """A child process of a stage died without an error, as by a signal."""

    retriable = True


class StageFailed(RLHFError):
    """A stage's run on its deployment ended without a result, after its own retries."""


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


def is_retriable(error: BaseException) -> bool:
    """Return whether a retry of the same work may succeed.

    `RLHFError.retriable` decides, or for other exceptions whether they come from the machine: an
    OSError, MemoryError or TimeoutError.
    """
    if isinstance(error, RLHFError):
        return error.retriable
    return isinstance(error, OSError | MemoryError | TimeoutError)
