"""The errors a user can meet: each names the field or key, the value and the cure.

Every class passes all of its arguments on, so that errors survive pickling between processes, and
inherits the standard error that a caller would expect to catch.
"""

from __future__ import annotations


class RLHFError(Exception):
    """Base of every error this project raises on purpose."""

    #: Whether trying the same work again can help; tasks read this to decide on a retry.
    retriable = False


class ConfigError(RLHFError, ValueError):
    """A configuration value is unusable. Raised before any expensive work."""


class DataError(RLHFError, ValueError):
    """Input data is missing, empty or not in a shape that can be trained on."""


class StoreError(RLHFError, OSError):
    """The object store refused or failed a request; retried by default."""

    retriable = True


class StoreConfigError(StoreError, ConfigError):
    """The store can't work as configured (no such bucket, access denied, unwritable folder)."""

    retriable = False


class ArtifactMissing(StoreError):
    """A manifest, blob or reference is not in the store."""

    retriable = False


class ArtifactCorrupt(StoreError):
    """Stored bytes differ from what the manifest promises, or the manifest itself is hostile."""

    retriable = False


class TrainingError(RLHFError, ArithmeticError):
    """Training can't go on: a non-finite loss or reward, or a resume that does not match."""


class Interrupted(RLHFError):
    """The process was asked to end; what was done is saved, and the same work goes on from it."""

    retriable = True


class CheckpointError(RLHFError, OSError):
    """A checkpoint can't be written, as on a full disk; those before it are whole."""

    retriable = True


class StageLost(RLHFError):
    """The machine, worker or process that ran a stage is gone; it goes on from its checkpoint."""

    retriable = True


class WorkerDied(RLHFError):
    """One of a stage's child processes ended without a word, as by a signal or lack of memory."""

    retriable = True


class StageFailed(RLHFError):
    """A stage's own run ended without a result; it has tried again where that could help."""


class RewardServiceError(RLHFError, ConnectionError):
    """A service that scores replies can't be reached or fails, again and again."""

    retriable = True


class GateRejected(RLHFError):
    """An evaluation gate said no. Final: retrying the same model gives the same answer.

    `verdict` holds the rules and what was measured (a `rlhf.gates.Verdict`).
    """

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message, verdict)
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[0])


class PromotionLost(RLHFError):
    """Somebody else changed the champion meanwhile; whether to do it again is a new decision."""


class PolicyWithdrawn(RLHFError):
    """A person took this policy back, so a run does not promote it again."""


class ApprovalMissing(RLHFError):
    """Nobody has said yet whether this policy may be promoted."""


class ApprovalRefused(RLHFError):
    """A person said that this policy may not be promoted."""


class SmokeTestFailed(RLHFError):
    """The published policy, loaded as a user would, can't answer."""


def worth_retrying(error: BaseException) -> bool:
    """Whether the same work may succeed when tried again.

    Ours say so themselves. Of the others, a broken connection, a full disk or an exhausted memory
    may pass; a wrong value, type or computation will not.
    """
    if isinstance(error, RLHFError):
        return error.retriable
    return isinstance(error, OSError | MemoryError | TimeoutError)
