"""The key of a request in the output cache. Pure."""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from moe_api.inference.v1 import inference_pb2
from moe_frontend.policy.salt import salt_of

_OPT_OUT: Final = ("no-store", "no-cache")


def key_of(
    request: inference_pb2.GenerateRequest,
    metadata: Iterable[Any] | None,
    revision: str,
    *,
    samples: bool,
    tenant: str = "",
) -> bytes | None:
    """The key of the answer to a request, 32 bytes; None if the answer is not cacheable.

    It is cacheable if it is determined (a seed is set, or the temperature is 0), the revision is known and
    matches the request, and the client did not send ``cache-control: no-store``. Scores of prompts are not
    cached: they take a hundred times the memory of the text.

    Args:
        request: as the client sent it.
        metadata: of the request, keys in lower case.
        revision: of the replicas; "" if it is not known.
        samples: whether the checkpoint has a default temperature above 0.
        tenant: whose request it is; "" if that is not known.
    """
    pairs = list(metadata or ())
    asked = request.resume.revision
    if not revision or asked not in ("", revision) or request.sampling.HasField("prompt_logprobs"):
        return None
    if _opts_out(pairs) or not _determined(request, samples):
        return None
    question = inference_pb2.GenerateRequest()
    question.CopyFrom(request)
    question.ClearField("resume")
    question.ClearField("priority")
    if not question.sampling.HasField("seed") and request.resume.HasField("seed"):
        question.sampling.seed = request.resume.seed
    digest = hashlib.sha256()
    for part in (salt_of(pairs, tenant), revision.encode(), question.SerializeToString(deterministic=True)):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _determined(request: inference_pb2.GenerateRequest, samples: bool) -> bool:
    sampling = request.sampling
    if sampling.HasField("seed") or request.resume.HasField("seed"):
        return True
    return sampling.temperature == 0 if sampling.HasField("temperature") else not samples


def _opts_out(metadata: list[Any]) -> bool:
    values = (str(value).lower() for key, value in metadata if key == "cache-control")
    return any(word in value for value in values for word in _OPT_OUT)
