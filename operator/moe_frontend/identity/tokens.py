"""Verifies JSON Web Tokens (RFC 7519) of an identity provider, as RFC 8725 advises.

Only signatures of asymmetric keys are accepted: neither "none" nor HMAC, for which a public key could be
    misused. A token must name the configured issuer and audience and must expire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from joserfc import jws, jwt
from joserfc.errors import (
    ClaimError,
    ExpiredTokenError,
    JoseError,
    MissingClaimError,
    UnsupportedAlgorithmError,
)

from moe_frontend.identity.caller import TENANT_FORM, Caller, is_tenant
from moe_frontend.identity.credentials import RefusedError, refused
from moe_frontend.identity.provider import Source

ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "Ed25519"),
)
LEEWAY_S: Final = 30
"""Tolerated difference between the clocks of the provider and of this machine."""
_NAME_MOST: Final = 128


class _Registry(jws.JWSRegistry):
    """Bounds the parts of a token; headers that nobody knows are passed over, as RFC 7515 says."""

    max_header_length = 2048

    def __init__(self) -> None:
        super().__init__(algorithms=ALGORITHMS, strict_check_header=False)


@dataclass(frozen=True)
class Trust:
    """Which tokens are accepted.

    issuer, audience: that a token must name.
    tenant_claim: the claim whose value is the tenant.
    """

    issuer: str
    audience: str
    tenant_claim: str = "sub"


class TokenVerifier:
    """From a token to its caller.

    Args:
        trust: which tokens are accepted.
        source: the provider's keys.
        now: seconds since the epoch; None: the machine's clock.
    """

    def __init__(self, trust: Trust, source: Source, now: Callable[[], int] | None = None) -> None:
        self._trust = trust
        self._source = source
        self._registry = _Registry()
        self._claims = jwt.JWTClaimsRegistry(
            now,
            LEEWAY_S,
            iss={"essential": True, "value": trust.issuer},
            aud={"essential": True, "value": trust.audience},
            exp={"essential": True},
        )

    async def caller(self, token: str) -> Caller:
        """The caller that a token proves.

        Raises:
            RefusedError: it proves none.
        """
        key = await self._source.find(self._kid(token))
        if key is None:
            raise refused(
                "token is not valid: its key (kid) is not one of the identity provider's; get a new one"
            )
        try:
            claims = jwt.decode(token, key, registry=self._registry).claims
            self._claims.validate(claims)
        except ClaimError as error:
            raise self._refused_claim(error) from error
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise _invalid(error) from error
        return self._caller(claims)

    def _kid(self, token: str) -> str | None:
        """The name of the key in an allowed header. Nothing of it is trusted yet."""
        try:
            header = jws.extract_compact(token.encode(), registry=self._registry).headers()
            self._registry.check_header(header)
            self._registry.get_alg(header["alg"])
            kid = header.get("kid")
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _invalid(error) from error
        if kid is not None and not isinstance(kid, str):
            raise refused("token is not valid: its key (kid) is no text; get a new one")
        return kid

    def _caller(self, claims: dict[str, Any]) -> Caller:
        name, tenant = self._trust.tenant_claim, claims.get(self._trust.tenant_claim)
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise refused(
                f"token names no tenant: its claim {name!r} must be {TENANT_FORM}; ask its administrator"
            )
        subject = claims.get("sub")
        return Caller(tenant, subject[:_NAME_MOST] if isinstance(subject, str) else "")

    def _refused_claim(self, error: ClaimError) -> RefusedError:
        claim = error.claim
        if isinstance(error, ExpiredTokenError):
            return refused("token is not valid: it has expired; get a new one")
        if isinstance(error, MissingClaimError):
            return refused(f"token is not valid: it has no {claim}; get one that names it")
        wanted = {"iss": self._trust.issuer, "aud": self._trust.audience}.get(claim)
        asked = f"; get one for {wanted!r}" if wanted else "; get a new one"
        return refused(f"token is not valid: its {claim} is not accepted{asked}")


def _invalid(error: Exception) -> RefusedError:
    if isinstance(error, UnsupportedAlgorithmError):
        return refused(f"token is not valid: its alg is not accepted; use one of {', '.join(ALGORITHMS)}")
    return refused("token is not valid: its form or its signature is wrong; get a new one")
