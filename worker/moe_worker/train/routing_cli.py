"""`moe-worker routing`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moe_api.ranges import FiniteRange
from moe_worker.config.engine import FORMATS
from moe_worker.config.routing_report import ROUTING_FILE

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("routing", context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", type=_FILE, required=True, help="Text to score, as for `moe-worker eval`.")
@click.option(
    "--mass",
    "masses",
    multiple=True,
    type=FiniteRange(0.001, 1),
    help="Masses to try. Default: ten from 1 to 0.5.",
)
@click.option(
    "--most-loss",
    type=FiniteRange(0, 1),
    default=0.005,
    help="Share of bits per byte that a mass may cost; the smallest such mass is allowed.",
)
@click.option(
    "--domains",
    type=_FILE,
    help="Labels of the documents, one a line: adds which experts each domain uses, for --learn-routing. "
    "Default: none.",
)
@click.option(
    "--margin",
    type=FiniteRange(0, 1, min_open=True),
    help="Also measure what evens out the loads of experts within this margin, for --routing-margin: "
    "eight more scores of the text. Default: none.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Tokens the model is given at most. Default: what the model allows.",
)
@click.option("--format", type=click.Choice(FORMATS), default="auto", help="Of weights.")
def routing(
    checkpoint: Path,
    data: Path,
    masses: tuple[float, ...],
    most_loss: float,
    domains: Path | None,
    margin: float | None,
    **options: Any,
) -> None:
    """Measure how few experts a checkpoint needs, and write routing.json into it.

    `moe-worker serve --routing-mass` refuses less than this file allows; --routing-margin takes the loads of
    experts from it. A run replaces what it measures. The domains, the balance (--margin) and, with --mass 1
    alone, the masses of an earlier run stay; delete routing.json after a change of the weights.

    \b
    Example:
      moe-worker routing runs/docs-routing --data valid.txt.zst
    """
    # torch takes seconds to load, which --help should not pay.
    from moe_worker.files import write_text  # noqa: PLC0415
    from moe_worker.train.routing_report import (  # noqa: PLC0415
        MASSES,
        Measured,
        check,
        earlier,
        even_out,
        learn_domains,
        measure,
        report,
    )

    check(checkpoint, data, domains, margin, options["context"])
    wanted = sorted({1.0, *(masses or MASSES)}, reverse=True)
    measured = []
    for mass in wanted:
        one = measure(checkpoint, data, mass, **options)
        click.echo(
            f"mass {mass:<5g} {one.bits_per_byte:.4f} bits per byte, {one.activated:.2f} experts a token, "
            f"utilisation {one.utilisation:.0%}"
        )
        measured.append(one)
    before = earlier(checkpoint, masses=len(wanted) > 1)
    found = report(measured, data.name, most_loss) | before
    if domains is not None:
        found["domains"] = learn_domains(checkpoint, data, domains, format=options["format"])
        fit = found["domains"]["fit"]
        click.echo(
            f"domains: {len(found['domains']['names'])}, fit {'unknown' if fit is None else f'{fit:.0%}'}"
        )

    def write() -> None:
        write_text(checkpoint / ROUTING_FILE, json.dumps(found, indent=2) + "\n")

    def with_balance(balance: dict[str, Any]) -> Measured:
        found["balance"] = balance
        write()
        return measure(checkpoint, data, 1.0, routing_margin=balance["margin"], **options)

    write()
    if margin is not None:
        one = even_out(measured[0].loads, margin, with_balance)
        click.echo(
            f"margin {margin:<5g} {one.bits_per_byte:.4f} bits per byte, utilisation {one.utilisation:.0%}"
        )
    click.echo(f"least mass: {found['least_mass']:g}")
