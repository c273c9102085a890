"""`moe key`: makes an API key, and the line by which frontends know it."""

import hashlib
import secrets

import click

from moe_api.visible import one_line

_NAME_MOST = 128


@click.command()
@click.option("--name", default="", help="Name of the key, for the audit log. Default: none.")
def key(name: str) -> None:
    """Makes an API key of 256 random bits.

    Prints the key to stdout, for the client, and a line with its digest to stderr, for the Secret that
    spec.frontend.auth.apiKeysSecret names: it has an entry for each tenant, with a line for each of its keys.
    The digest does not tell the key.

    \b
    moe key > team-a.key 2> team-a.digest
    kubectl create secret generic api-keys --from-file=team-a=team-a.digest
    MOE_API_KEY=$(cat team-a.key) moe generate "A pod is"
    """
    made = f"moe-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(made.encode()).hexdigest()
    click.echo(made)
    click.echo(f"sha256:{digest} {one_line(name, _NAME_MOST)}".strip(), err=True)
