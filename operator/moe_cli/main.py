"""The command `moe`."""

import sys
from typing import Any

import click

from moe_cli.chat import chat
from moe_cli.experts import experts
from moe_cli.generate import generate
from moe_cli.key import key
from moe_cli.rollout import rollout
from moe_cli.status import status
from moe_cli.tokenize import tokenize
from moe_client import errors
from moe_tools.load.command import load
from moe_tools.replay.command import replay


class _Commands(click.Group):
    """Ctrl-C ends every command with 130; click itself would print "Aborted!" and exit with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(errors.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe-operator")
def main() -> None:
    """Uses and inspects Mixture-of-Experts models served by moe-operator.

    \b
    See what is deployed:    moe status
    Follow a change of it:   moe rollout status NAME
    See its experts' load:   moe experts --endpoint WORKER
    Reach it from here:      kubectl port-forward service/NAME-frontend 8000
    Ask it:                  moe generate "A pod is"
    Talk to a chat model:    moe chat "Which pods restart?"
    Make an API key:         moe key
    Play a recorded load:    moe load TRACE --speed 60
    Try scaling on a trace:  moe replay TRACE --plot F.png

    The address comes from --endpoint or MOE_ENDPOINT. Traces are sent when OTEL_EXPORTER_OTLP_ENDPOINT
    names an OpenTelemetry Collector.

    \b
    Exit codes: 0 success, 2 invalid request or options, 3 server not available (try again),
    4 too busy (try again), 5 out of time, 1 anything else, 130 stopped with Ctrl-C.
    """


main.add_command(chat)
main.add_command(generate)
main.add_command(tokenize)
main.add_command(status)
main.add_command(experts)
main.add_command(load)
main.add_command(rollout)
main.add_command(key)
main.add_command(replay)
