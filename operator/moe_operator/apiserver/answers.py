"""Classifies error responses of the API server: the type of our error says whether a retry can help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from kubernetes.dynamic.exceptions import DynamicApiError

from moe_api import api_status
from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    HistoryExpiredError,
    MoEOperatorError,
    OwnerUnknownError,
    ReadForbiddenError,
    WebhookUnavailableError,
)
from moe_operator.resources import names

_UNAUTHENTICATED, _FORBIDDEN, _GONE, _TIMED_OUT, _CONFLICT, _EXPIRED = 401, 403, 404, 408, 409, 410
_TOO_MANY, _SERVER = 429, 500
_DENIED: Final = re.compile(
    r"""^admission webhook ".*" denied the request|ValidatingAdmissionPolicy '.*' with .* denied request"""
)
"""Messages of admission. The code is no criterion: a webhook may use any, 400 by default; a policy uses 422
without a reason.
https://github.com/kubernetes/kubernetes/tree/master/staging/src/k8s.io/apiserver/pkg/admission/plugin
"""
_UNASKED: Final = re.compile(r"failed calling webhook")
"""Message about a webhook that does not respond, with code 500."""
_REMEDIES: Final = (
    (re.compile("exceeded quota"), "raise the quota"),
    (_DENIED, "change the policy that denies it"),
    (_UNASKED, "repair the webhook, or set its failurePolicy to Ignore"),
    (re.compile(r'User ".*" cannot \w+ resource'), "grant the right to the operator's ServiceAccount"),
)
"""By what the message of a refused request says."""
_SENTENCE_MOST: Final = 2000
"""Maximum characters of a quoted response; a webhook's may have any length."""


def translated(error: DynamicApiError, method: str, path: str) -> MoEOperatorError:
    """The error to raise for an error response to `method` at `path`."""
    code, said, status = error.status, message(error.body), api_status.parse(error.body)
    if (refusal := _of_admission(code, said)) is not None:
        return refusal(f"the API server forbids {path}: {said}{_remedy(said)}")
    if code == _EXPIRED:
        return HistoryExpiredError(said)
    if code == _GONE and not (status.get("details") or {}).get("name"):
        # No object is missing, but the kind; often it is a plain "404 page not found".
        return ApplyForbiddenError(f"the API server does not know {path}; install the CRD of its kind")
    if code in (_CONFLICT, _GONE) or "metadata.uid" in _wrong_fields(status):
        return ChangedMeanwhileError(f"conflict: {path} was modified concurrently: {said}")
    if code in (_UNAUTHENTICATED, _TIMED_OUT, _TOO_MANY) or code >= _SERVER:
        return ClusterUnavailableError(f"the API server could not serve {path}: {said}")
    return _refusal(status, said, method, path, forbidden=code == _FORBIDDEN)


def _of_admission(code: int, said: str) -> type[ApplyForbiddenError] | None:
    """The error if admission refuses a request; None if it does not."""
    if _DENIED.search(said):
        return ApplyForbiddenError
    return WebhookUnavailableError if code >= _SERVER and _UNASKED.search(said) else None


def _refusal(
    status: Mapping[str, Any], said: str, method: str, path: str, *, forbidden: bool
) -> MoEOperatorError:
    if forbidden and f"RESTMapping for APIVersion {names.API_VERSION}" in said:
        return OwnerUnknownError(
            f"the API server does not accept {names.PLURAL} as owners yet: it learns of a new CRD within 30 s"
        )
    if forbidden and method == "get":
        return ReadForbiddenError(
            f"reading {path} is forbidden: {said}; grant the right to the operator's ServiceAccount"
        )
    if forbidden or not _is_wrong(status):
        return ApplyForbiddenError(f"the API server forbids {path}: {said}{_remedy(said)}")
    return ApplyRefusedError(f"the API server refused {path}: {said}")


def _remedy(said: str) -> str:
    """What lets the request succeed, as the end of a message; empty if that is not known."""
    return next((f"; {remedy}" for form, remedy in _REMEDIES if form.search(said)), "")


def _is_wrong(status: Mapping[str, Any]) -> bool:
    """Whether the object itself is invalid, so that only another object helps.

    The API server then says in which field (Invalid), or that it cannot read it (BadRequest). What admission
    refuses has neither, whatever its code, and can heal without an edit.
    """
    return status.get("reason") == "BadRequest" or bool(_wrong_fields(status))


def _wrong_fields(status: Mapping[str, Any]) -> list[str]:
    """Paths of the fields that the API server calls invalid."""
    causes = (status.get("details") or {}).get("causes") or ()
    return [cause["field"] for cause in causes if cause.get("field")]


def message(body: str | bytes | None) -> str:
    """The message of a Status object, or the body itself if it is none."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    said = str(api_status.parse(body).get("message") or text)
    return said if len(said) <= _SENTENCE_MOST else f"{said[:_SENTENCE_MOST]}..."
