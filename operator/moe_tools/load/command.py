"""`moe load`: a recorded trace, played against a deployment."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from moe_api.ranges import FiniteRange
from moe_client import calling, errors
from moe_client.endpoint import Endpoint
from moe_client.errors import CommandError


@click.command()
@calling.model_options
@click.option(
    "--speed",
    type=FiniteRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How many times faster than recorded: at 60 an hour takes a minute, with all its requests.",
)
@click.option(
    "--share",
    type=FiniteRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Requests sent for each one of the trace; 0.01 sends one of a hundred.",
)
@click.option(
    "--skip",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds of the trace to leave out first.",
)
@click.option(
    "--duration",
    type=FiniteRange(min=0, min_open=True),
    help="Seconds of the trace to play. Default: all.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens to ask for, at most where the trace says how many there were.",
)
@click.option("--prompt", type=calling.TEXT, help="Prompt of every request. Default: random tokens.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the times within intervals and of the tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as a JSON document.")
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load(
    endpoint: Endpoint, model: str, timeout: float | None, trace: Path, *, as_json: bool, **choices: Any
) -> None:
    """Sends the requests of TRACE to a deployment at their times and reports the latencies.

    The load is open: a request is sent at its time whether or not earlier ones were answered, and its latency
    counts from then, so that a slow server cannot hide by slowing us down. TRACE is CSV or JSON lines, .gz or
    .xz or plain, with requests of each interval (time,requests) or one request a row.

    \b
    moe load azure2024_conv_10s.csv.gz --speed 60 --share 0.002 --duration 7200
    moe load mooncake_conversation.jsonl.gz --max-tokens 64 --json > summary.json

    Prompts are as long as the trace says, within what the model takes, and of random tokens, so that no cache
    helps; 16 tokens where the trace does not say. --prompt sends the same text every time instead.
    Ctrl-C ends it with the summary of what was sent.
    """
    # numpy and rich take half a second to import, which other commands should not pay.
    from moe_tools.load import report, run  # noqa: PLC0415
    from moe_tools.load.trace import read  # noqa: PLC0415
    from moe_tools.recorded import TraceError  # noqa: PLC0415

    try:
        recorded = read(trace)
    except TraceError as error:
        raise CommandError(str(error), errors.WRONG) from error
    part = run.Part(choices["skip"], choices["duration"])
    arrivals = run.arrivals(recorded, part, choices["share"], choices["speed"], choices["seed"])
    if not len(arrivals.at_s):
        raise CommandError("this part of the trace has no request to send", errors.WRONG)
    requests = run.Requests(model, choices["max_tokens"], choices["prompt"], choices["seed"], timeout)
    with report.Progress(arrivals, sys.stderr) as progress:
        outcomes, interrupted = asyncio.run(run.play(endpoint, arrivals, requests, progress.show))
    summary = report.summarise(outcomes, arrivals)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        report.show(summary)
    if interrupted:
        sys.exit(errors.INTERRUPTED)
    if not summary["requests"]["ok"]:
        sys.exit(errors.ABSENT)
