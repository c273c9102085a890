"""The options of `moe generate` that say how tokens are chosen; the server checks their ranges."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from moe_api.inference.v1 import inference_pb2
from moe_api.ranges import FiniteRange
from moe_client import calling

_Command = TypeVar("_Command", bound=Callable[..., Any])
_UINT32: Final = click.IntRange(0, 2**32 - 1)


class _Bias(click.ParamType[tuple[int, float]]):
    """``TOKEN:BIAS``."""

    name = "TOKEN:BIAS"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        token, _, bias = str(value).partition(":")
        try:
            number, added = int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not TOKEN:BIAS, a token id and a number (42:-100)", param, ctx)
        return int(_UINT32.convert(number, param, ctx)), FiniteRange().convert(added, param, ctx)


_OPTIONS: Final = (
    click.option(
        "--max-tokens",
        type=click.IntRange(1, 2**32 - 1),
        help="Maximum number of generated tokens. [server: 128]",
    ),
    click.option(
        "--temperature", type=FiniteRange(), help="0 selects the most likely token; 0 to 2. [server: 0]"
    ),
    click.option(
        "--top-p",
        type=FiniteRange(),
        help="Keep the most likely tokens up to this total probability, above 0 to 1. [server: 1]",
    ),
    click.option(
        "--top-k", type=_UINT32, help="Keep this many of the most likely tokens; 0 keeps all. [server: 0]"
    ),
    click.option(
        "--min-p",
        type=FiniteRange(),
        help="Drop tokens below this share of the likeliest one's probability, 0 to 1; try 0.05. [server: 0]",
    ),
    click.option(
        "--repetition-penalty",
        type=FiniteRange(),
        help="Above 1 makes tokens of prompt and text less likely, 0.1 to 10; try 1.1. [server: 1]",
    ),
    click.option(
        "--presence-penalty",
        type=FiniteRange(),
        help="Above 0 makes tokens of the text so far less likely, -2 to 2. [server: 0]",
    ),
    click.option(
        "--frequency-penalty",
        type=FiniteRange(),
        help="The same, once for each time a token was used, -2 to 2. [server: 0]",
    ),
    click.option(
        "--logit-bias",
        type=_Bias(),
        multiple=True,
        help="Make a token likelier or less likely: 42:-100 bans token 42, 42:100 forces it; may be "
        "repeated (`moe tokenize` prints ids).",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**64 - 1), help="Makes sampling repeatable. [server: random]"
    ),
    click.option("--stop", type=calling.TEXT, multiple=True, help="End before this text; may be repeated."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=_UINT32,
        multiple=True,
        help="End with this token; may be repeated.",
    ),
    click.option(
        "--ignore-eos", is_flag=True, default=None, help="Continue after the model's end-of-text token."
    ),
    click.option(
        "--min-tokens", type=_UINT32, help="Tokens to generate before the model may end. [server: 0]"
    ),
    click.option(
        "--logprobs",
        type=_UINT32,
        metavar="N",
        help="Print the log-probability of each token and of the N most likely ones (up to 20) to stderr. "
        "Default: none.",
    ),
)


def sampling_options(command: _Command) -> _Command:
    """Adds them; what is not given is None or empty, and left to the server."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def message(given: dict[str, Any]) -> inference_pb2.SamplingParameters:
    """What was given on the command line, and nothing else."""
    set_ = {name: value for name, value in given.items() if value is not None}
    return inference_pb2.SamplingParameters(**set_ | {"logit_bias": dict(given.get("logit_bias") or ())})


def logprob_lines(response: inference_pb2.GenerateResponse) -> list[str]:
    """One line for each token: its id and log-probability, and those of the likeliest."""
    lines = []
    for token, logprobs in zip(response.tokens, response.logprobs, strict=False):
        top = "".join(f"  {other.token} {other.logprob:.4f}" for other in logprobs.top)
        lines.append(f"token {token} {logprobs.logprob:.4f}" + (f"; likeliest:{top}" if top else ""))
    return lines
