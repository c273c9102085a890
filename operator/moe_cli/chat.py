"""`moe chat`: a conversation in the terminal, over a frontend's HTTP port."""

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from typing import Any, Final

import click

from moe_api.address import check_address
from moe_client import errors, terminal
from moe_client.endpoint import Endpoint, access_options

_PATH: Final = "/v1/chat/completions"
_EVENT_MOST: Final = 4 * 2**20
_EXIT_CODES: Final = {
    **dict.fromkeys((400, 401, 404, 405, 413, 415), errors.WRONG),
    429: errors.BUSY,
    503: errors.ABSENT,
    504: errors.LATE,
}


@click.command()
@click.option(
    "--endpoint",
    default="127.0.0.1:8080",
    envvar="MOE_HTTP_ENDPOINT",
    show_default=True,
    show_envvar=True,
    metavar="HOST:PORT",
    help="HTTP port of a frontend.",
)
@click.option("--model", default="", help="Served name of the model; may be left out.")
@click.option("--system", help="System message of the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Maximum number of tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 selects the most likely token.")
@click.option("--seed", type=int, help="Makes answers repeatable.")
@click.option("--thinking/--no-thinking", default=None, help="Asks the chat template for reasoning, or none.")
@click.option("--show-reasoning", is_flag=True, help="Print reasoning to stderr.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds to wait for each part of an answer.",
)
@access_options
@click.argument("message", required=False)
def chat(
    endpoint: Endpoint,
    message: str | None,
    system: str | None,
    timeout: float,
    *,
    show_reasoning: bool,
    **given: Any,
) -> None:
    """Talks to a model: MESSAGE alone, or line by line from standard input.

    \b
    moe chat "Which pods restart?" --no-thinking
    moe chat                               # ends with Ctrl-D
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for text in [message] if message is not None else _lines():
        messages.append({"role": "user", "content": text})
        with _stream(endpoint, timeout, _request(messages, given)) as deltas:
            messages.append({"role": "assistant", "content": _print(deltas, show_reasoning=show_reasoning)})


def _lines() -> Iterator[str]:
    """What the user says, line by line; a terminal shows a prompt."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _request(messages: list[dict[str, str]], given: dict[str, Any]) -> dict[str, Any]:
    thinking = given["thinking"]
    fields = {
        "messages": messages,
        "stream": True,
        "model": given["model"] or None,
        "max_completion_tokens": given["max_tokens"],
        "temperature": given["temperature"],
        "seed": given["seed"],
        # Qwen3 and DeepSeek name it differently; templates ignore what they do not know.
        "chat_template_kwargs": None
        if thinking is None
        else {"enable_thinking": thinking, "thinking": thinking},
    }
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _stream(
    endpoint: Endpoint, timeout_s: float, request: dict[str, Any]
) -> Iterator[Iterator[dict[str, Any]]]:
    """The deltas of the answer, as they come.

    Raises:
        CommandError: there is no answer, or not all of it.
    """
    try:
        check_address(endpoint.address)
        connection = endpoint.connection(timeout_s)
    except ValueError as error:
        raise errors.CommandError(str(error), errors.WRONG) from error
    try:
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json", **dict(endpoint.metadata)}
            connection.request("POST", _PATH, json.dumps(request), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(response.status, response.read(_EVENT_MOST))
            yield _deltas(response)
    except TimeoutError as error:
        sentence = f"{endpoint} sent nothing for {timeout_s:g} s; try again, or raise --timeout"
        raise errors.CommandError(sentence, errors.LATE) from error
    except (OSError, http.client.HTTPException) as error:
        cause = str(error) or type(error).__name__
        sentence = f"{endpoint} does not answer HTTP: {cause}; is this the frontend's HTTP port?"
        raise errors.CommandError(sentence, errors.ABSENT) from error


def _deltas(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline(_EVENT_MOST):
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if data:
            yield _delta(data)
    raise errors.CommandError("answer is not complete: the connection was closed; ask again", errors.ABSENT)


def _delta(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
        if "error" in event:
            raise errors.CommandError(str(event["error"]["message"]), errors.FAILED)
        return dict(event["choices"][0]["delta"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise errors.CommandError("the server sent something else than a chat", errors.FAILED) from error


def _refused(status: int, body: bytes) -> errors.CommandError:
    try:
        sentence = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        sentence = f"the server answered with HTTP status {status}"
    return errors.CommandError(sentence, _EXIT_CODES.get(status, errors.FAILED))


def _print(deltas: Iterator[dict[str, Any]], *, show_reasoning: bool) -> str:
    """Prints the answer as it comes; gives it."""
    write, write_reasoning = terminal.writer(sys.stdout), terminal.writer(sys.stderr)
    said: list[str] = []
    for delta in deltas:
        if show_reasoning and (reasoning := delta.get("reasoning_content")):
            write_reasoning(str(reasoning))
            sys.stderr.flush()
        if content := delta.get("content"):
            said.append(str(content))
            write(said[-1])
            sys.stdout.flush()
    write("\n")
    return "".join(said)
