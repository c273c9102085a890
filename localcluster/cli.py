"""The command line: `python -m localcluster`."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click

from localcluster import images
from localcluster.cluster import DEFAULT_DIRECTORY, DEFAULT_MOUNTS, Cluster, Ready
from localcluster.errors import ForwardError, LocalClusterError, NotRunningError
from localcluster.forward import Forward
from localcluster.images import Image
from localcluster.layout import Layout
from localcluster.progress import Reporter
from localcluster.settings import parse_mount


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DIRECTORY,
    help="State directory; one cluster each. Default: .local in the checkout.",
)
@click.pass_context
def cli(context: click.Context, directory: Path) -> None:
    """Run a real Kubernetes on this machine, without containers and without root.

    etcd, API server, controllers, scheduler and kubelet are the real ones; the pods' containers are local
    processes in namespaces of their own.

    \b
    Begin with:
      python -m localcluster up
      export KUBECONFIG=$PWD/.local/kubeconfig PATH=$PWD/.local/bin:$PATH
      kubectl get nodes
      python -m localcluster down
    """
    context.obj = directory.absolute()


@cli.command()
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="HOST:NODE",
    help="Show a directory, read-only, on the node below /mnt.",
)
@click.option(
    "--tool",
    "tools",
    multiple=True,
    metavar="NAME",
    help="Also build and link helm or grpcurl.",
)
@click.option(
    "--api-port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="The API server's port on 127.0.0.1. Default: a free one.",
)
@click.pass_obj
def up(directory: Path, mounts: tuple[str, ...], tools: tuple[str, ...], api_port: int) -> None:
    """Start the cluster and keep it running.

    The first time, this builds Kubernetes from source (5 to 8 minutes on 2 idle cores); later it takes some
    seconds. The checkout's examples/ is /mnt/models on the node. Ctrl-C at any moment removes everything
    again.
    """
    wanted = (*DEFAULT_MOUNTS, *map(parse_mount, mounts))
    cluster = Cluster(directory, mounts=wanted, extra_tools=tools, api_port=api_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` of `up` undoes everything too
    started = time.monotonic()

    with ExitStack() as building:
        reporter = building.enter_context(Reporter(sys.stderr))

        def show(ready: Ready) -> None:
            building.close()  # ends the build's last line
            click.echo(f"  {ready.component:<24} ready   {ready.seconds:5.1f} s")

        cluster.up(show, reporter.show)
    click.echo(f"The cluster is up after {time.monotonic() - started:.1f} s. To use it:")
    click.echo(f"  export KUBECONFIG={cluster.kubeconfig}\n  export PATH={directory / 'bin'}:$PATH")


@cli.command()
@click.pass_obj
def down(directory: Path) -> None:
    """Stop the cluster and delete everything but its logs. Also cleans up after a crash."""
    click.echo(
        "The cluster is down." if Cluster(directory).down() else f"No cluster was running in {directory}."
    )


@cli.command()
@click.pass_obj
def status(directory: Path) -> None:
    """Show the components: memory, age, restarts. Ends with code 1 when no cluster runs."""
    components = Cluster(directory).status()
    click.echo(f"{'COMPONENT':<24} {'MEMORY':>8} {'UP':>9} {'RESTARTS':>9}")
    for item in components:
        memory = f"{item['resident'] / 2**20:.0f} MB"
        click.echo(f"{item['name']:<24} {memory:>8} {item['seconds']:>7.0f} s {item['restarts']:>9}")
    click.echo(f"{'total':<24} {sum(item['resident'] for item in components) / 2**20:.0f} MB")


@cli.command()
@click.argument("target", metavar="NAMESPACE/SERVICE:PORT")
@click.option(
    "--local-port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="The port on 127.0.0.1. Default: a free one.",
)
@click.pass_obj
def forward(directory: Path, target: str, local_port: int) -> None:
    """Make a service reachable at a port of 127.0.0.1, until Ctrl-C.

    Each new connection goes to the next ready endpoint, so the forward survives restarts of pods. While no
    pod is ready, connections are reset, and the command says why.
    """
    service, _, port = target.rpartition(":")
    namespace, slash, name = service.partition("/")
    if not (slash and name and port):
        raise click.UsageError(
            f"{target}: expected NAMESPACE/SERVICE:PORT, like default/docs-moe-frontend:8000"
        )
    with Forward(directory, namespace, name, port, local_port) as opened:
        click.echo(f"{opened.address} leads to {target}; Ctrl-C ends it", err=True)
        click.echo(opened.address)
        for notice in opened.notices():
            click.echo(notice, err=True)
    raise ForwardError(
        "the cluster's network agent ended, and the forward with it; `python -m localcluster status` shows "
        "whether it is back"
    )


@cli.command("load-image")
@click.argument("name")
@click.option(
    "--path",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A directory to put before the PATH; may repeat.",
)
@click.option(
    "--content",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A directory that volumes of this image show, such as a model. Default: none.",
)
@click.option(
    "--user",
    type=click.IntRange(min=0),
    default=images.NONROOT,
    show_default=True,
    help="The user that the image declares; 0 is refused in pods that must not run as root.",
)
@click.option("--env", "environment", multiple=True, metavar="KEY=VALUE", help="A variable; may repeat.")
@click.option("--entrypoint", default="", help="The command of containers that name none. Default: none.")
@click.pass_obj
def load_image(
    directory: Path,
    name: str,
    paths: tuple[Path, ...],
    content: Path | None,
    user: int,
    environment: tuple[str, ...],
    entrypoint: str,
) -> None:
    """Define what an image NAME stands for: containers run this machine's programs, found along a PATH.

    \b
    Example, a second Python environment as an image:
      python -m localcluster load-image ghcr.io/me/worker:test --path ~/other/.venv/bin

    \b
    A model, for spec.model.uri oci://ghcr.io/me/model:1:
      python -m localcluster load-image ghcr.io/me/model:1 --content ~/model
    """
    file = Layout(directory).images
    if not file.exists():
        raise NotRunningError(f"no cluster runs in {directory}; start one with `python -m localcluster up`")
    pairs = [text.partition("=") for text in environment]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise click.UsageError(f"--env {wrong[0]}: expected KEY=VALUE")
    variables = {key: value for key, _, value in pairs}
    folders = tuple(str(path.absolute()) for path in paths)
    words = (entrypoint,) if entrypoint else ()
    shown = str(content.absolute()) if content else ""
    images.load(file, Image(images.normalize(name), folders, variables, words, user, shown))
    click.echo(f"{images.normalize(name)} is ready for pods.")


def main() -> None:
    """Runs a command; prints errors that a user can fix as one message."""
    try:
        cli.main(prog_name="python -m localcluster", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except LocalClusterError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
