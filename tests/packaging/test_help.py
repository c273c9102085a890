"""--help of every command says what an option means, its default, its range and its variable."""

import re

import click
import pytest

import localcluster.cli
import moe_cli.main
import moe_frontend.main
import moe_worker.main

PROGRAMS = {
    "moe": moe_cli.main.main,
    "moe-frontend": moe_frontend.main.main,
    "moe-worker": moe_worker.main.cli,
    "python -m localcluster": localcluster.cli.cli,
}
DEFAULT = re.compile(r"\bdefault\b", re.IGNORECASE)
TIME = re.compile(r"timeout|interval|ttl|grace|\bhold\b|patience|skip|duration|stop-after|horizon")


def options(name, command, parent=None):
    context = command.make_context(name, [], parent, resilient_parsing=True)
    if isinstance(command, click.Group):
        for part in command.list_commands(context):
            yield from options(f"{name} {part}", command.get_command(context, part), context)
    for option in command.get_params(context):
        if isinstance(option, click.Option) and not option.is_eager:  # --help, --version
            yield f"{name} {option.opts[0]}", option, option.get_help_record(context)


def missing(option, record):
    """What its help does not say."""
    names, text = record
    switch = option.is_flag and not option.secondary_opts
    if not option.help:
        yield "meaning"
    if not (switch or option.required or option.multiple or DEFAULT.search(text) or "[server: " in text):
        yield "default"
    if isinstance(option.type, type(click.INT) | type(click.FLOAT)):
        if not isinstance(option.type, click.IntRange | click.FloatRange):
            yield "range"
        if TIME.search(option.opts[-1]) and not ("econds" in text or "SECONDS" in names):
            yield "unit"
    if option.envvar and f"env var: {option.envvar}" not in text:
        yield "variable"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_meaning_default_range_unit_and_variable_of_every_option(program):
    found = list(options(program, PROGRAMS[program]))
    assert len(found) >= 8
    assert {name: lacks for name, option, record in found if (lacks := [*missing(option, record)])} == {}
