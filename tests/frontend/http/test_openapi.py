"""What the port says of itself at /openapi.json holds for its answers."""

import jsonschema
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.frontend.chat.templates import QWEN3
from tests.frontend.http.test_chats import TOOLS, USER, chatting

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {
    "completion": (COMPLETION, {"prompt": "scored", "logprobs": 1, "n": 2}, 200),
    "no prompt": (COMPLETION, {}, 400),
    "chat": (CHAT, {"messages": [USER], "logprobs": True, "tools": TOOLS}, 200),
    "no messages": (CHAT, {"messages": []}, 400),
    "models": ("/v1/models", None, 200),
    "model": ("/v1/models/m", None, 200),
    "another model": ("/v1/models/x", None, 404),
    "version": ("/version", None, 200),
}


@pytest.mark.parametrize(("path", "body", "status"), ASKED.values(), ids=ASKED)
async def test_answers_are_what_the_description_says(http, path, body, status):
    h = await chatting(http, QWEN3, says=() if path == COMPLETION else ["<think>so</think>", CALL])
    document = (await h.client.get("/openapi.json")).json()
    described = document["paths"][path if path in document["paths"] else "/v1/models/{model}"]
    operation = described["get" if body is None else "post"]
    if body is not None:
        request = operation["requestBody"]["content"]["application/json"]["schema"]
        if status == 200:
            check(document, request, body)
    response = await h.client.request("GET" if body is None else "POST", path, json=body)
    assert response.status_code == status
    answer = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    check(document, answer, response.json())
    if status == 200 and body is not None:
        (Completion if path == COMPLETION else ChatCompletion).model_validate(response.json(), strict=True)


def check(document, schema, value):
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


async def test_the_description_is_a_schema_of_schemas_and_names_each_path_that_is_served(http):
    h = await http(workers=1)
    document = (await h.client.get("/openapi.json")).json()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, operations in document["paths"].items():
        for method in operations:
            asked = path.replace("{model}", "m")
            response = await h.client.request(method, asked, json={} if method == "post" else None)
            assert str(response.status_code) in operations[method]["responses"], path
