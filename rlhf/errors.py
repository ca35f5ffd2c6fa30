"""The errors a user can meet: each names the field or key, the value and the cure.

Every class keeps its message as the only positional argument, so that errors survive pickling
between processes, and inherits the standard error that a caller would expect to catch.
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


class GateRejected(RLHFError):
    """An evaluation gate said no. Final: retrying the same model gives the same answer."""
