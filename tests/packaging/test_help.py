"""--help of every command says what an option means, its default, its range and its variable.

Documents name only commands and options that there are.
"""

import re
from pathlib import Path

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
ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
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


def accepted(name, command, parent=None):
    """Each command with the options that it takes."""
    context = command.make_context(name, [], parent, resilient_parsing=True)
    yield (
        name,
        {text for option in command.get_params(context) for text in option.opts + option.secondary_opts},
    )
    if isinstance(command, click.Group):
        for part in command.list_commands(context):
            yield from accepted(f"{name} {part}", command.get_command(context, part), context)


def code(page):
    """The lines of the code blocks of a page, continued ones joined, and its inline code."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    yield from "\n".join(re.findall(r"(?s)```\w*\n(.*?)```", text)).splitlines()
    yield from (
        " ".join(each.split()) for each in re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_documents_name_commands_and_options_that_there_are(program):
    known = dict(accepted(program, PROGRAMS[program]))
    groups = {name for name in known if any(each.startswith(f"{name} ") for each in known)}
    names = "|".join(sorted(known, key=len, reverse=True))
    call = re.compile(rf"(?<![\w./-])(?P<name>{names})(?P<rest>(?: [^|&;#>]*)?)(?![\w-])")
    calls = [(page, found) for page in PAGES for line in code(page) for found in call.finditer(line)]
    assert len(calls) > 3
    unknown = {
        (page, found["name"], option)
        for page, found in calls
        for option in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", found["rest"])
        if option not in known[found["name"]]
    }
    wrong = {
        (page, found[0])
        for page, found in calls
        if found["name"] in groups and re.match(r" [a-z]", found["rest"])
    }
    assert (unknown, wrong) == (set(), set())
