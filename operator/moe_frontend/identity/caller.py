"""The caller of a request. Pure.

The edge that receives a request (gRPC or HTTP) authenticates it and calls `serve_as` in the task of the
request; what runs behind the edge reads `current`. Tasks that this task starts see the same caller.
"""

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/|-]{0,252}")
TENANT_FORM: Final = "1 to 253 letters, digits and any of ._:@/|-, the first a letter or digit"


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    tenant: the party that limits, fairness and caches distinguish; "" is the tenant of all callers that are
        not authenticated.
    name: of the API key, or the subject of the token; for logs. Never a credential.
    """

    tenant: str = ""
    name: str = ""


ANONYMOUS: Final = Caller()
"""The caller of all requests to a frontend that does not authenticate."""

_CURRENT: Final[ContextVar[Caller]] = ContextVar("moe_frontend_caller", default=ANONYMOUS)


def is_tenant(text: str) -> bool:
    """Whether the text may name a tenant (`TENANT_FORM`); it is then valid metadata as well."""
    return _TENANT.fullmatch(text) is not None


def current() -> Caller:
    """The caller of the running request."""
    return _CURRENT.get()


def serve_as(caller: Caller) -> None:
    """Makes `caller` the current one for the rest of the running task: a task serves one request."""
    _CURRENT.set(caller)
