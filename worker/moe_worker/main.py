"""The command line. A command's module is imported on use, because torch takes seconds to load."""

import sys
from collections.abc import Mapping
from importlib import import_module

import click

from moe_api.visible import LOG_MOST, one_line
from moe_worker.errors import WorkerError

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("moe_worker.service.command:serve", "Serve a model over gRPC."),
    "fetch": ("moe_worker.fetch.command:fetch", "Download a checkpoint into a cache."),
    "train": ("moe_worker.train.cli:train", "Train a model on text."),
    "compress": ("moe_worker.recipe.cli:compress", "Compress a checkpoint by the steps of a recipe."),
    "bench": ("moe_worker.bench.cli:bench", "Measure how fast a model runs on this machine."),
    "explain": ("moe_worker.bench.explain:explain", "Show which kernels would compute a model, and why."),
    "routing": (
        "moe_worker.train.routing_cli:routing",
        "Measure how few experts a model needs, and allow them to be served.",
    ),
    "eval": ("moe_worker.train.evaluate_cli:evaluate", "Score a model on text, in bits per byte."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])


@click.group(cls=LazyGroup)
def cli() -> None:
    """Serve, train and evaluate Mixture-of-Experts language models."""


def main() -> None:
    """Runs the command line; after a failure, the last line on stderr is `error: ` and the reason."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except WorkerError as error:
        _fail(str(error), error.exit_code)


def _fail(sentence: str, exit_code: int) -> None:
    """Line breaks would hide the message from programs that read the last line."""
    click.echo(f"error: {one_line(' '.join(sentence.split()), LOG_MOST)}", err=True)
    sys.exit(exit_code)
