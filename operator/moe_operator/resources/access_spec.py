"""Who may call the frontend, and how: TLS, API keys, tokens of an identity provider."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from moe_operator.resources.base import Model, object_name, rules

_SECRET_RULE = object_name("this is the name of a Secret in the same namespace")


class Tls(Model):
    """The certificate of the ports for clients."""

    secret_name: str = Field(
        description="Secret of type kubernetes.io/tls (tls.crt, tls.key), e.g. by cert-manager. A renewed "
        "certificate is used without a restart, for new connections. Required.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(_SECRET_RULE),
    )


class Jwt(Model):
    """Tokens of an identity provider (JSON Web Tokens)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.jwksUri) != has(self.jwksSecret)",
                "jwt takes its keys from exactly one of jwksUri and jwksSecret",
            )
        )
    )

    issuer: str = Field(
        description="The iss that a token must have, e.g. https://idp.example. Required.",
        min_length=1,
        max_length=512,
    )
    audience: str = Field(
        description="One of the aud that a token must have. Required.", min_length=1, max_length=512
    )
    jwks_uri: str | None = Field(
        default=None,
        description="Where the provider publishes its keys (a JSON Web Key Set); fetched every five minutes, "
        "and when a token names another key. Default: jwksSecret.",
        max_length=1024,
        json_schema_extra=rules(
            (
                "self.matches('^https://[A-Za-z0-9._~:/?#%&=+,;@!-]+$') && isURL(self)",
                "jwksUri is an https:// URL, e.g. https://idp.example/.well-known/jwks.json",
            )
        ),
    )
    jwks_secret: str | None = Field(
        default=None,
        description="Secret with the keys under jwks.json, instead of jwksUri. Default: jwksUri.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(_SECRET_RULE),
    )
    tenant_claim: str = Field(
        default="sub",
        description="Claim of the token that names the tenant. Default: sub.",
        min_length=1,
        max_length=128,
    )


class Auth(Model):
    """Which requests are accepted; with both, either of them suffices."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.apiKeysSecret) || has(self.jwt)", "auth needs apiKeysSecret, jwt or both")
        )
    )

    api_keys_secret: str | None = Field(
        default=None,
        description="Secret with API keys: an entry for each tenant, with the digest of a key on each line "
        "(sha256:..., see `moe key`). Changes apply without a restart. Default: no API keys.",
        min_length=1,
        max_length=253,
        json_schema_extra=rules(_SECRET_RULE),
    )
    jwt: Jwt | None = Field(
        default=None,
        description="Tokens of an identity provider (JSON Web Tokens). Default: none are accepted.",
    )
