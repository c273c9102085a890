"""The operator's errors: one tree, whose types say whether trying again can help."""

from __future__ import annotations

import math
from typing import ClassVar


class MoEOperatorError(Exception):
    """Anything that this package raises on purpose. The text is a sentence for a person."""


class RetryableError(MoEOperatorError):
    """Trying again later can succeed without anybody changing the object."""

    patience: ClassVar[float] = 1.0
    """How long to pause before the next try, against an API server that does not answer."""
    longest_seconds: ClassVar[float] = math.inf
    """No pause is longer, however often it was tried."""


class PermanentError(MoEOperatorError):
    """Trying again soon is of no use: somebody has to change the object or the installation."""


class ClusterUnavailableError(RetryableError):
    """The API server did not answer, or was overloaded."""


class HistoryExpiredError(RetryableError):
    """A watch cannot go on from where it was; what there is has to be listed again."""


class ChangedMeanwhileError(RetryableError):
    """Somebody else changed or deleted an object first; the next plan starts from what they left."""

    patience = 0.1


class ReadForbiddenError(RetryableError):
    """The operator lacks the right to read something; it goes on once its ClusterRole grants it."""

    longest_seconds = 30.0


class ApplyForbiddenError(RetryableError):
    """The API server may not do what was asked: rights, a quota or an admission webhook are against it.

    None of these is part of the object, so it can heal without an edit, though rarely soon.
    """

    patience = 5.0


class OwnerUnknownError(ApplyForbiddenError):
    """The API server has yet to notice the CRD; where it checks owners, a MoEDeployment may own nothing.

    It looks every 30 s (OwnerReferencesPermissionEnforcement, kube-apiserver), so trying often pays.
    """

    patience = 1.0
    longest_seconds = 2.0


class OutOfTimeError(RetryableError):
    """A plan was too long for one turn; what was done stays, and the next turn goes on from there."""

    patience = 0.1


class ApplyRefusedError(PermanentError):
    """The API server refused an object that the operator rendered; it says why."""


class InvalidSpecError(PermanentError):
    """A MoEDeployment that got past the CRD's own checks cannot be understood."""


class InstallationError(PermanentError):
    """The operator cannot start: its CRDs or its peering object are missing."""
