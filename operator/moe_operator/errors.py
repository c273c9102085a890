"""The operator's errors: one tree, whose types say whether a retry can help."""

from __future__ import annotations

import math
from typing import ClassVar

from moe_api.listwatch import ExpiredError, UnavailableError


class MoEOperatorError(Exception):
    """Base of all errors that this package raises on purpose. The text is a message for people."""

    brief_seconds: ClassVar[float] = 0.0
    """For how long it is expected to heal by itself, so that a deployment does not count as stuck."""


class RetryableError(MoEOperatorError):
    """A later retry can succeed without a change of the object."""

    patience: ClassVar[float] = 1.0
    """Pause before the next retry, relative to that for an API server that does not respond."""
    longest_seconds: ClassVar[float] = math.inf
    """Upper bound of the pause, after any number of retries."""


class PermanentError(MoEOperatorError):
    """A retry does not help: the object or the installation has to be changed."""


class ClusterUnavailableError(RetryableError, UnavailableError):
    """The API server did not respond, or was overloaded."""


class HistoryExpiredError(RetryableError, ExpiredError):
    """A watch cannot continue from its version; the objects have to be listed again."""


class ChangedMeanwhileError(RetryableError):
    """Another client changed or deleted an object first; the next plan starts from the new state."""

    patience = 0.1


class ReadForbiddenError(RetryableError):
    """The operator lacks a right to read; it continues when its ClusterRole grants the right."""

    longest_seconds = 30.0


class KindUnknownError(ReadForbiddenError):
    """The API server does not serve a kind: its CRD is not installed."""


class ApplyForbiddenError(RetryableError):
    """The API server refused a request because of missing rights, a quota or an admission webhook.

    None of these is part of the object, so a retry can succeed without an edit, but rarely soon.
    """

    patience = 5.0


class WebhookUnavailableError(ApplyForbiddenError):
    """The API server could not ask an admission webhook, so it refuses what the webhook has to admit."""

    patience = 1.0
    longest_seconds = 30.0
    brief_seconds = 10.0


class OwnerUnknownError(ApplyForbiddenError):
    """The API server does not know the CRD yet; if it checks owners, a MoEDeployment may own nothing.

    It checks every 30 s (OwnerReferencesPermissionEnforcement, kube-apiserver), so frequent retries help.
    """

    patience = 1.0
    longest_seconds = 2.0
    brief_seconds = 40.0


class OutOfTimeError(RetryableError):
    """A plan took too long for one reconcile; its changes stay, and the next reconcile continues."""

    patience = 0.1


class ApplyRefusedError(PermanentError):
    """The API server refused an object that the operator rendered; it says why."""


class InvalidSpecError(PermanentError):
    """A MoEDeployment that the CRD accepted has an invalid spec."""


class InstallationError(PermanentError):
    """The operator cannot start: a CRD is missing, a setting is invalid, or a port is not available."""
