"""Checks requests once, at the edge. Pure: no gRPC context, no engine, no torch.

`oversize` reads lengths only and costs the same for any request, so it can run on the event loop.
`check_generate` takes time in proportion to what `oversize` accepts.
"""

from dataclasses import dataclass, replace

from moe_api import lengths
from moe_api.inference.v1 import inference_pb2
from moe_worker.engine.requests import length_violation, prompt_violations
from moe_worker.errors import TokenizerError
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.sampling.defaults import NEUTRAL
from moe_worker.sampling.output_format import OutputFormat, Tag, TaggedValues
from moe_worker.sampling.parameters import SamplingParameters, Violation, list_violation
from moe_worker.sampling.text import TextStream
from moe_worker.scheduler.plan import MOST_PRIORITY, Block

# stop texts, biases and stop tokens take about 20 KiB; names, numbers and unknown fields are few. Each
# character of a schema may take four bytes.
OTHER_FIELDS_BYTES = 64 * 1024 + 4 * max(lengths.FORMAT_MOST.values())


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the served model; `ends` are its end-of-text tokens.

    defaults: sampling values of fields that a request does not set.
    """

    vocab_size: int
    context_length: int
    ends: frozenset[int] = frozenset()
    defaults: SamplingParameters = NEUTRAL


@dataclass(frozen=True)
class Checked:
    """A request that can be computed.

    seed: the requested one, if any. written: its emitted tokens. output_format: has not been compiled.
    blocks: of the prompt that have names.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParameters
    seed: int | None = None
    written: tuple[int, ...] = ()
    output_format: OutputFormat | None = None
    priority: int = 0
    blocks: tuple[Block, ...] = ()

    @property
    def scored(self) -> bool:
        """Whether the response has the tokens of the prompt."""
        return self.sampling.prompt_logprobs is not None


def oversize(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, limits: RequestLimits
) -> list[Violation]:
    """Every field that is longer than any request allows; nothing else is checked then."""
    sampling, given = request.sampling, len(request.resume.tokens)
    elements = {
        "stop": len(sampling.stop),
        "stop_token_ids": len(sampling.stop_token_ids),
        "logit_bias": len(sampling.logit_bias),
    }
    lists = (list_violation(field, length) for field, length in elements.items())
    found = [Violation(f"sampling.{it.field}", it.description) for it in lists if it is not None]
    if wrong := lengths.of_list(given, limits.context_length - 1, "tokens"):
        found.append(Violation("resume.tokens", wrong))
    of_format = lengths.of_output_format(request.output_format)
    found += [Violation(field, wrong) for field, wrong in of_format if wrong is not None]
    return [*_oversize_prompt(request, tokenizer, limits), *found]


def largest_request_bytes(tokenizer: Tokenizer, vocab_size: int, context_length: int) -> int:
    """Size of the largest valid request in bytes; larger messages need not be received.

    The prompt as text or as token ids, the tokens of a resumed stream, and room for other fields.
    """
    id_bytes = -(-max(vocab_size - 1, 1).bit_length() // 7)  # varints hold 7 bits a byte
    characters = lengths.characters_for(context_length, tokenizer.characters_per_token)
    prompt = max(characters, id_bytes * context_length)
    return prompt + id_bytes * context_length + OTHER_FIELDS_BYTES


def size(request: inference_pb2.GenerateRequest) -> int:
    """Characters and token ids of a request, to which the time of checking it is proportional."""
    return len(request.prompt) + len(request.prompt_tokens.ids) + len(request.resume.tokens)


def oversize_text(field: str, text: str, tokenizer: Tokenizer, tokens: int) -> list[Violation]:
    """The problem of a text that certainly has more than `tokens` tokens, by its length alone."""
    wrong = lengths.of_text(len(text), tokens, tokenizer.characters_per_token)
    return [] if wrong is None else [Violation(field, wrong, too_long=True)]


def oversize_name(model: str) -> list[Violation]:
    """The problem with the length of the requested model name."""
    wrong = lengths.of_name(len(model))
    return [] if wrong is None else [Violation("model", wrong)]


def token_ids(
    field: str, text: str, tokenizer: Tokenizer, most: int, add_special_tokens: bool = True
) -> list[int] | Violation:
    """The token ids of a field's text, at most a few more than `most`, or why there are none."""
    try:
        ids = tokenizer.encode_unless_longer(text, most, add_special_tokens)
    except TokenizerError as error:
        return Violation(field, f"cannot be tokenized: {error}; change the text")
    return too_many(field, most) if ids is None else ids


def too_many(field: str, most: int) -> Violation:
    """A text of more than `most` tokens."""
    return Violation(field, f"has more tokens than fit; use {most} at most", too_long=True)


def _oversize_prompt(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, limits: RequestLimits
) -> list[Violation]:
    if request.WhichOneof("input") != "prompt_tokens":
        return oversize_text("prompt", request.prompt, tokenizer, limits.context_length - 1)
    wrong = length_violation("prompt_tokens", len(request.prompt_tokens.ids), limits.context_length)
    return [] if wrong is None else [wrong]


def check_generate(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, limits: RequestLimits
) -> Checked | list[Violation]:
    """The request for the engine, or all its violations.

    `oversize` must have accepted the request.
    """
    sampling = sampling_parameters(request.sampling, limits.defaults)
    found = [
        Violation(f"sampling.{violation.field}", violation.description)
        for violation in sampling.violations(limits.vocab_size)
    ]
    prompt = _prompt(request, tokenizer, limits)
    if isinstance(prompt, Violation):
        return [prompt, *found]
    field = request.WhichOneof("input") or "prompt"
    found = prompt_violations(field, prompt, limits.vocab_size, limits.context_length) + found
    if request.priority > MOST_PRIORITY:
        found.append(Violation("priority", f"is {request.priority}; use 0 to {MOST_PRIORITY}"))
    found += [replace(it, field=f"sampling.{it.field}") for it in sampling.prompt_violations(len(prompt))]
    written = tuple(request.resume.tokens)
    if written:  # the prompt has been scored before the first token
        sampling = replace(sampling, prompt_logprobs=None)
    if written and not found:
        room = min(sampling.max_tokens, limits.context_length - len(prompt))
        found = _resume_violations(written, room, sampling, tokenizer, limits)
    wanted = _output_format(request)
    if isinstance(wanted, OutputFormat):
        found = found + list(wanted.violations(sampling, limits.ends))
    if isinstance(wanted, Violation):
        return [*found, wanted]
    seed = _seed(request, sampling)
    return found or Checked(prompt, sampling, seed, written, wanted, request.priority)


def sampling_parameters(
    message: inference_pb2.SamplingParameters, defaults: SamplingParameters = NEUTRAL
) -> SamplingParameters:
    """The parameters, with `defaults` for fields that are not set."""
    repeated = {
        "stop": tuple(message.stop),
        "stop_token_ids": tuple(message.stop_token_ids),
        "logit_bias": tuple(sorted(message.logit_bias.items())),
    }
    return replace(defaults, **{field.name: value for field, value in message.ListFields()} | repeated)


def defaults_message(defaults: SamplingParameters) -> inference_pb2.SamplingParameters:
    """The defaults as a message for clients; fields without a default stay unset."""
    return inference_pb2.SamplingParameters(
        **{name: value for name, value in vars(defaults).items() if value is not None and value != ()}
    )


def _output_format(request: inference_pb2.GenerateRequest) -> OutputFormat | Violation | None:
    if not request.HasField("output_format"):
        return None
    given = request.output_format
    after = given.after
    match given.WhichOneof("kind"):
        case "json_object" if given.json_object:
            return OutputFormat("json_object", "", after)
        case "json_schema":
            return OutputFormat("json_schema", given.json_schema, after)
        case "regex":
            return OutputFormat("regex", given.regex, after)
        case "tagged":
            return _tagged(given.tagged, after)
    remedy = "set json_object, json_schema, regex or tagged, or leave it out"
    return Violation("output_format", f"is empty; {remedy}")


def _tagged(given: inference_pb2.TaggedValues, after: str) -> OutputFormat | Violation:
    if not given.tags:
        return Violation("output_format.tagged.tags", "is empty; give at least one")
    tags = tuple(Tag(tag.begin, tag.json_schema, tag.end) for tag in given.tags)
    values = TaggedValues(tags, given.before, given.between, given.behind, given.single)
    return OutputFormat("tagged", "", after, values)


def _seed(request: inference_pb2.GenerateRequest, sampling: SamplingParameters) -> int | None:
    resumed = request.resume.seed if request.resume.HasField("seed") else None
    return resumed if sampling.seed is None else sampling.seed


def _resume_violations(
    written: tuple[int, ...],
    room: int,
    sampling: SamplingParameters,
    tokenizer: Tokenizer,
    limits: RequestLimits,
) -> list[Violation]:
    """The problem with the tokens at the start of a text of up to `room` tokens."""
    field, ends = "resume.tokens", sampling.end_tokens(limits.ends)
    if len(written) >= room:
        return [Violation(field, f"holds {len(written)} tokens of a text of {room}; nothing is left of it")]
    text = TextStream(sampling.stop)
    for index, token in enumerate(written):
        if token >= limits.vocab_size:
            return [Violation(field, f"has token id {token}; ids are 0 to {limits.vocab_size - 1}")]
        text.push(tokenizer.token_bytes(token))
        if token in ends or text.stopped:
            return [Violation(field, f"ends the text with token {index}; nothing is left of it")]
    return []


def _prompt(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, limits: RequestLimits
) -> tuple[int, ...] | Violation:
    kind = request.WhichOneof("input")
    if kind is None:
        return Violation("prompt", "is missing; set either prompt or prompt_tokens")
    if kind == "prompt_tokens":
        return tuple(request.prompt_tokens.ids)
    if not request.prompt:
        return Violation("prompt", "is empty; give at least one character")
    most, adds = limits.context_length - 1, not request.without_special_tokens
    ids = token_ids("prompt", request.prompt, tokenizer, most, adds)
    return ids if isinstance(ids, Violation) else tuple(ids)
