"""Checks requests once, where they enter. Pure: no gRPC context, no engine, no torch."""

from dataclasses import dataclass

from moe_api.inference.v1 import inference_pb2
from moe_worker.engine.requests import prompt_violations
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.parameters import SamplingParameters, Violation


@dataclass(frozen=True)
class Limits:
    """What the served model allows."""

    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class Checked:
    """A request that can be computed."""

    prompt: tuple[int, ...]
    sampling: SamplingParameters


def check_generate(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, limits: Limits
) -> Checked | list[Violation]:
    """The request in the engine's terms, or all that is wrong with it. Tokenizes: slow for long texts."""
    sampling = sampling_parameters(request.sampling)
    found = [
        Violation(f"sampling.{violation.field}", violation.description)
        for violation in sampling.violations(limits.vocab_size)
    ]
    prompt = _prompt(request, tokenizer)
    if isinstance(prompt, Violation):
        return [prompt, *found]
    field = request.WhichOneof("input") or "prompt"
    found = prompt_violations(field, prompt, limits.vocab_size, limits.context_length) + found
    return found or Checked(prompt, sampling)


def sampling_parameters(message: inference_pb2.SamplingParameters) -> SamplingParameters:
    """The parameters, with defaults where a field is not set."""
    repeated = {
        "stop": tuple(message.stop),
        "stop_token_ids": tuple(message.stop_token_ids),
        "logit_bias": tuple(sorted(message.logit_bias.items())),
    }
    return SamplingParameters(**{field.name: value for field, value in message.ListFields()} | repeated)


def _prompt(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer) -> tuple[int, ...] | Violation:
    kind = request.WhichOneof("input")
    if kind is None:
        return Violation("prompt", "is missing; set either prompt or prompt_tokens")
    if kind == "prompt_tokens":
        return tuple(request.prompt_tokens.ids)
    if not request.prompt:
        return Violation("prompt", "is empty; give at least one character")
    return tuple(tokenizer.encode(request.prompt))
