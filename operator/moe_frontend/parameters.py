"""Types of the options of `moe-frontend`."""

from pathlib import Path
from typing import Final

import click

from moe_api.address import check_address
from moe_frontend.policy import tenants
from moe_frontend.transport import metadata


class Addresses(click.ParamType[tuple[str, ...]]):
    """``HOST:PORT[,HOST:PORT...]``."""

    name = "HOST:PORT,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The addresses."""
        try:
            return tuple(check_address(part) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MetadataKeys(click.ParamType[frozenset[str]]):
    """``KEY[,KEY...]``."""

    name = "KEY,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[str]:
        """The keys."""
        try:
            return value if isinstance(value, frozenset) else metadata.parse_keys(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Tenants(click.ParamType[tenants.TenantsConfig]):
    """JSON."""

    name = "JSON"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tenants.TenantsConfig:
        """What tenants may use."""
        try:
            return value if isinstance(value, tenants.TenantsConfig) else tenants.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class KeySet(click.ParamType[str]):
    """``https://...``, or an existing folder."""

    name = "URL|FOLDER"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The URL or the folder, as text."""
        text = str(value)
        if "://" not in text:
            return str(FOLDER.convert(text, param, ctx))
        try:
            # h11 and joserfc take a while to import, and few frontends need them.
            from moe_frontend.identity.provider import check_url  # noqa: PLC0415

            return check_url(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)


FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
