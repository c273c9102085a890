"""`moe chat`: a conversation in the terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

import click

from moe_api import telemetry
from moe_api.inference.v1 import chat_pb2, chat_pb2_grpc, inference_pb2
from moe_api.ranges import FiniteRange
from moe_client import calling, errors, terminal
from moe_client.endpoint import Endpoint

_UNFINISHED: Final = inference_pb2.FINISH_REASON_UNSPECIFIED


@click.command()
@calling.model_options
@click.option("--system", type=calling.TEXT, help="System message of the conversation. Default: none.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**32 - 1),
    help="Maximum number of tokens of an answer. [server: what the context holds]",
)
@click.option(
    "--temperature", type=FiniteRange(), help="0 selects the most likely token; 0 to 2. [server: 0]"
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes answers repeatable. [server: random]")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Asks the chat template for reasoning, or none. Default: as the template does without.",
)
@click.option("--show-reasoning", is_flag=True, help="Print reasoning to stderr.")
@click.argument("message", type=calling.TEXT, required=False)
def chat(
    endpoint: Endpoint,
    model: str,
    timeout: float | None,
    message: str | None,
    system: str | None,
    *,
    show_reasoning: bool,
    thinking: bool | None,
    **given: Any,
) -> None:
    """Talks to a model: MESSAGE alone, or line by line from standard input.

    \b
    moe chat "Which pods restart?" --no-thinking
    moe chat                               # ends with Ctrl-D
    """
    talk = chat_pb2.ChatRequest(model=model, sampling=_sampling(given))
    if thinking is not None:
        # Qwen3 and DeepSeek name it differently; templates ignore what they do not know.
        for name in ("enable_thinking", "thinking"):
            talk.template_arguments[name].flag = thinking
    if system:
        talk.messages.add(role="system", content=system)
    with calling.connected(endpoint) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        for text in [message] if message is not None else _lines():
            talk.messages.add(role="user", content=text)
            responses = stub.Chat(talk, timeout=timeout, metadata=telemetry.inject(endpoint.metadata))
            talk.messages.add(role="assistant", content=_print(responses, show_reasoning=show_reasoning))


def _sampling(given: dict[str, Any]) -> inference_pb2.SamplingParameters:
    return inference_pb2.SamplingParameters(
        **{name: value for name, value in given.items() if value is not None}
    )


def _lines() -> Iterator[str]:
    """What the user says, line by line; a terminal shows a prompt."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n").encode(errors="surrogateescape").decode(errors="replace")


def _print(responses: Iterable[chat_pb2.ChatResponse], *, show_reasoning: bool) -> str:
    """Prints the answer as it comes; gives it.

    Raises:
        CommandError: it has no end.
    """
    write, write_reasoning = terminal.writer(sys.stdout), terminal.writer(sys.stderr)
    said, reason = [], _UNFINISHED
    for response in responses:
        if show_reasoning and response.reasoning_content:
            write_reasoning(response.reasoning_content)
            sys.stderr.flush()
        said.append(response.content)
        write(response.content)
        sys.stdout.flush()
        reason = response.finish_reason
    write("\n")
    if reason == _UNFINISHED:
        sentence = "answer is not complete: the server ended it without a finish reason; ask again"
        raise errors.CommandError(sentence, errors.FAILED)
    return "".join(said)
