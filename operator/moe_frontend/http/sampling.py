"""Sampling parameters of a request in the gRPC API's terms. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from moe_api.inference.v1 import inference_pb2
from moe_frontend.http.errors import invalid
from moe_frontend.http.schemas import Sampling

_SAME: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "min_tokens",
)
_SEEDS: Final = 2**64
_ALL: Final = -1
"""What vLLM's clients send as `top_k` to keep all tokens."""


def parameters(
    request: Sampling,
    *,
    most_tokens: int,
    samples: bool,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> inference_pb2.SamplingParameters:
    """The parameters of a request; fields that it does not set are OpenAI's defaults, or the checkpoint's.

    Args:
        request: as the client sent it.
        most_tokens: tokens to generate at most.
        samples: whether the checkpoint brings a temperature of its own; else it is 1, as OpenAI's.
        logprobs: log-probabilities to send for each token; None: none at all.
        prompt_logprobs: the same for each token of the prompt.
    """
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    if given["top_k"] == _ALL:
        given["top_k"] = 0
    if given["temperature"] is None and not samples:
        given["temperature"] = 1.0
    message = inference_pb2.SamplingParameters(
        max_tokens=most_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given
    )
    message.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    message.stop_token_ids.extend(request.stop_token_ids or ())
    for token, bias in (request.logit_bias or {}).items():
        message.logit_bias[token] = bias
    return message


def set_seeds(request: Sampling, texts: Iterable[inference_pb2.GenerateRequest]) -> None:
    """Gives each text a seed of its own, if the request has one: equal seeds would give equal texts."""
    if request.seed is not None:
        for index, text in enumerate(texts):
            text.sampling.seed = (request.seed + index) % _SEEDS


def set_priority(request: Sampling, texts: Iterable[inference_pb2.GenerateRequest]) -> None:
    """Gives all texts the priority of the request, if it has one."""
    if request.priority is not None:
        for text in texts:
            text.priority = request.priority


def include_usage(request: Sampling) -> bool:
    """Whether the last chunk of a stream tells how many tokens there were.

    Raises:
        ApiError: stream_options without a stream.
    """
    if request.stream_options is None:
        return False
    if not request.stream:
        raise invalid("stream_options", "is only for streams; set stream to true, or leave it out")
    return request.stream_options.include_usage


def refuse(fields: Mapping[str, object], remedy: str = "leave it out") -> None:
    """Refuses fields that are set and have no meaning here.

    Raises:
        ApiError: for the first of them.
    """
    for name, value in fields.items():
        if value is not None and value is not False:
            raise invalid(name, f"is not supported; {remedy}")
