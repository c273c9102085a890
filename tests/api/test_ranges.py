"""No option of a command takes NaN or infinity for a number."""

import click
import pytest
from click.testing import CliRunner

from moe_api.ranges import FiniteRange
from moe_cli.main import main as moe
from moe_frontend.main import main as frontend
from moe_worker.main import cli as worker


def commands(command, name):
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in command.list_commands(context):
            yield from commands(command.get_command(context, sub), f"{name} {sub}")


OPTIONS = [
    pytest.param(command, option, id=f"{name} {option.opts[-1]}")
    for root, title in ((moe, "moe"), (frontend, "moe-frontend"), (worker, "moe-worker"))
    for name, command in commands(root, title)
    for option in command.params
    if isinstance(option, click.Option) and isinstance(option.type, click.types.FloatParamType)
]


def test_there_are_such_options():
    assert len(OPTIONS) > 40


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_refuses_what_is_no_finite_number(command, option):
    for text in ("nan", "inf", "-inf", "1e400"):
        result = CliRunner().invoke(command, [f"{option.opts[-1]}={text}"])
        assert result.exit_code == 2
        assert f"Invalid value for '{option.opts[-1]}'" in result.output, result.output
        assert "is not a finite number" in result.output or "is not in the range" in result.output


def test_so_does_an_environment_variable():
    result = CliRunner().invoke(frontend, [], env={"MOE_OUTPUT_CACHE_TTL": "nan"})
    assert "nan is not a finite number; give one in the range x>0." in result.output


def test_a_timeout_is_no_longer_than_grpc_can_count():
    result = CliRunner().invoke(moe, ["generate", "--timeout", "1e12", "text"])
    assert "1000000000000.0 is not in the range 0<x<=1000000000.0." in result.output


def test_a_download_waits_for_a_day_at_most():
    result = CliRunner().invoke(worker, ["fetch", "--timeout", "1e300", "hf://a/b"])
    assert "is not in the range 1<=x<=86400." in result.output


def test_so_does_a_bias_of_a_token():
    result = CliRunner().invoke(moe, ["generate", "--logit-bias=42:nan", "text"])
    assert "nan is not a finite number; give one." in result.output


@pytest.mark.parametrize("text", ["0", "1e-3", "1"])
def test_a_number_in_the_range_passes(text):
    assert FiniteRange(0, 1).convert(text, None, None) == float(text)
