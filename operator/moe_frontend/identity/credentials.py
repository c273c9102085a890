"""From the metadata of a request to its caller.

gRPC metadata and HTTP headers have the same form: ``authorization: Bearer CREDENTIAL``, with an API key or a
    token.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import grpc
from google.rpc import status_pb2

from moe_api import rich_status
from moe_frontend.identity.caller import ANONYMOUS, Caller
from moe_frontend.identity.keys import ApiKeys

CREDENTIAL_MOST: Final = 8 * 2**10
"""Characters of a credential; a longer one is refused before it costs anything."""
INVALID: Final = "INVALID_API_KEY"
"""Reason (google.rpc.ErrorInfo) of a request that is not authenticated."""
_HOW: Final = "send `authorization: Bearer` and your API key or token"


class RefusedError(Exception):
    """A request is not authenticated.

    Attributes:
        status: UNAUTHENTICATED, or UNAVAILABLE if that is not known at the moment.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


def refused(sentence: str) -> RefusedError:
    """The refusal of a credential. The sentence never quotes it."""
    detail = rich_status.error_info(INVALID)
    return RefusedError(rich_status.build(grpc.StatusCode.UNAUTHENTICATED, sentence, [detail]))


class Tokens(Protocol):
    """What verifies tokens: `tokens.TokenVerifier`."""

    async def caller(self, token: str) -> Caller:
        """The caller that a token proves. Raises RefusedError."""


class Authenticator:
    """Knows the callers of requests.

    Args:
        keys: the current API keys; None: there are none.
        tokens: verifies tokens; None: they are not accepted.
    """

    def __init__(self, keys: Callable[[], ApiKeys] | None = None, tokens: Tokens | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    @property
    def required(self) -> bool:
        """Whether requests must be authenticated; otherwise all callers are `ANONYMOUS`."""
        return self._keys is not None or self._tokens is not None

    async def caller(self, metadata: Iterable[Any] | None) -> Caller:
        """The caller of a request with this metadata, keys in lower case.

        Raises:
            RefusedError: it is not known.
        """
        if not self.required:
            return ANONYMOUS
        credential = _bearer(metadata)
        found = self._keys().caller(credential) if self._keys is not None else None
        if found is not None:
            return found
        if self._tokens is not None and (self._keys is None or credential.count(".") == 2):
            return await self._tokens.caller(credential)
        raise refused(
            "API key is not valid: no caller has it; check it, or ask the administrator for a new one"
        )


def _bearer(metadata: Iterable[Any] | None) -> str:
    """The credential of a request. Raises RefusedError."""
    given = [value for key, value in metadata or () if key == "authorization"]
    if not given:
        raise refused(f"credentials are missing: the request has no authorization header; {_HOW}")
    if len(given) > 1:
        raise refused(
            f"credentials are ambiguous: the request has {len(given)} authorization headers; send one"
        )
    scheme, _, credential = str(given[0]).partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or not credential:
        raise refused(f"credentials are not understood: the authorization header has another form; {_HOW}")
    if len(credential) > CREDENTIAL_MOST or not credential.isascii() or not credential.isprintable():
        raise refused(
            f"credentials are not accepted: use at most {CREDENTIAL_MOST} printable ASCII characters; {_HOW}"
        )
    return credential


NOBODY_ASKED: Final = Authenticator()
"""Of a frontend that does not authenticate."""
