"""What an error answer of the API server means: the type of our error says whether trying again can help."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from kubernetes.dynamic.exceptions import DynamicApiError

from moe_operator.errors import (
    ApplyForbiddenError,
    ApplyRefusedError,
    ChangedMeanwhileError,
    ClusterUnavailableError,
    HistoryExpiredError,
    MoEOperatorError,
    OwnerUnknownError,
    ReadForbiddenError,
)
from moe_operator.resources import names

_UNAUTHENTICATED, _FORBIDDEN, _GONE, _TIMED_OUT, _CONFLICT, _EXPIRED = 401, 403, 404, 408, 409, 410
_TOO_MANY, _SERVER = 429, 500
_DENIED: Final = re.compile(
    r"""^admission webhook ".*" denied the request|ValidatingAdmissionPolicy '.*' with .* denied request"""
)
"""What admission says. The code says nothing: a webhook's is any it likes, 400 where it names none; a
policy's is 422 where it gives no reason.
https://github.com/kubernetes/kubernetes/tree/master/staging/src/k8s.io/apiserver/pkg/admission/plugin
"""
_SENTENCE_MOST: Final = 2000
"""Characters that are kept of an answer; a webhook's may be of any length."""


def translated(error: DynamicApiError, method: str, path: str) -> MoEOperatorError:
    """The error to raise for an answer to `method` at `path`."""
    code, said, status = error.status, message(error.body), _status(error.body)
    if _DENIED.search(said):
        return ApplyForbiddenError(f"the API server forbids {path}: {said}")
    if code == _EXPIRED:
        return HistoryExpiredError(said)
    if code in (_CONFLICT, _GONE) or "metadata.uid" in _wrong_fields(status):
        return ChangedMeanwhileError(f"somebody else was faster at {path}: {said}")
    if code in (_UNAUTHENTICATED, _TIMED_OUT, _TOO_MANY) or code >= _SERVER:
        return ClusterUnavailableError(f"the API server could not serve {path}: {said}")
    return _refusal(status, said, method, path, forbidden=code == _FORBIDDEN)


def _refusal(
    status: Mapping[str, Any], said: str, method: str, path: str, *, forbidden: bool
) -> MoEOperatorError:
    if forbidden and f"RESTMapping for APIVersion {names.API_VERSION}" in said:
        return OwnerUnknownError(
            f"the API server has yet to notice that there are {names.PLURAL}, and lets them own nothing so "
            "far; it notices within 30 s of their installation"
        )
    if forbidden and method == "get":
        return ReadForbiddenError(f"the operator may not read {path}: {said}; grant it in its ClusterRole")
    if forbidden or not _is_wrong(status):
        return ApplyForbiddenError(f"the API server forbids {path}: {said}")
    return ApplyRefusedError(f"the API server refused {path}: {said}")


def _is_wrong(status: Mapping[str, Any]) -> bool:
    """Whether an object is wrong in itself, so that nothing but another object helps.

    The API server then says in which field (Invalid), or that it cannot read it (BadRequest). What admission
    refuses has neither, whatever its code, and can heal without an edit.
    """
    return status.get("reason") == "BadRequest" or bool(_wrong_fields(status))


def _wrong_fields(status: Mapping[str, Any]) -> list[str]:
    """Paths of the fields that the API server found wrong."""
    causes = (status.get("details") or {}).get("causes") or ()
    return [cause["field"] for cause in causes if cause.get("field")]


def _status(body: str | bytes | None) -> Mapping[str, Any]:
    """The Status object of an answer; empty where it is none."""
    try:
        found = json.loads(body or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def message(body: str | bytes | None) -> str:
    """The sentence in a Status object, or the body itself when it is none."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    said = str(_status(body).get("message") or text)
    return said if len(said) <= _SENTENCE_MOST else f"{said[:_SENTENCE_MOST]}..."
