"""The operator's errors: one tree, whose types say whether trying again can help."""

from __future__ import annotations


class MoEOperatorError(Exception):
    """Anything that this package raises on purpose. The text is a sentence for a person."""


class RetryableError(MoEOperatorError):
    """Trying again later can succeed without anybody changing the object."""


class PermanentError(MoEOperatorError):
    """Trying again is of no use before somebody changes the object or the installation."""


class ClusterUnavailableError(RetryableError):
    """The API server did not answer, was overloaded, or somebody else changed the object first."""


class ApplyRefusedError(PermanentError):
    """The API server refused an object that the operator rendered; it says why."""


class InvalidSpecError(PermanentError):
    """A MoEDeployment that got past the CRD's own checks cannot be understood."""


class InstallationError(PermanentError):
    """The operator cannot start: its CRDs or its peering object are missing."""
