"""Tokens that a request takes, as far as a frontend knows them before a worker says. Pure."""

from typing import Final

from google.protobuf.message import Message

from moe_api.inference.v1 import inference_pb2

MAX_TOKENS: Final = 128
"""Of a request that sets none, as inference.proto states it."""
_CHARACTERS_PER_TOKEN: Final = 4
"""Of English text, for the estimate of a prompt whose tokens are not known yet."""


def cost_of(request: Message) -> int:
    """Tokens that a request may use at most; those of a text prompt are estimated. 0: it generates none."""
    if not isinstance(request, inference_pb2.GenerateRequest):
        return 0
    sampling = request.sampling
    most = sampling.max_tokens if sampling.HasField("max_tokens") else MAX_TOKENS
    return max(1, prompt_tokens(request) + most)


def prompt_tokens(request: inference_pb2.GenerateRequest) -> int:
    """Tokens of the prompt, estimated for a text."""
    return len(request.prompt_tokens.ids) or -(-len(request.prompt) // _CHARACTERS_PER_TOKEN)
