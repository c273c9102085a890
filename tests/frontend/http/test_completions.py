"""/v1/completions as clients see it: OpenAI's own client and raw HTTP, over real connections."""

import asyncio
import json

import httpx2
import openai
import pytest


def events(text):
    """The data of each server-sent event."""
    assert text.endswith("\n\n")
    lines = text.strip().split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def streamed(h, prompt, **fields):
    """The chunks of a stream, which ends with [DONE]."""
    response = await h.complete(prompt, stream=True, **fields)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


async def test_openais_client_gets_a_completion(http):
    h = await http()
    completion = await h.openai.completions.create(model="m", prompt="count 3", max_tokens=7)
    assert completion.object == "text_completion"
    assert completion.model == "m"
    assert completion.choices[0].text in ("w-0:0 w-0:1 w-0:2 ", "w-1:0 w-1:1 w-1:2 ")
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 3)
    assert completion.usage.total_tokens == 6


async def test_openais_client_reads_a_stream_while_it_is_generated(http):
    h = await http(workers=1)
    stream = await h.openai.completions.create(model="m", prompt="hold", stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].text == "first "
    assert first.usage is None
    assert h.bench.workers[0].running == 1
    await stream.close()
    await h.bench.workers[0].until(lambda worker: worker.cancelled == 1)


async def test_a_stream_ends_with_its_usage_where_that_is_asked_for(http):
    h = await http()
    chunks = await streamed(h, "count 2", stream_options={"include_usage": True})
    assert [chunk["choices"][0]["text"][4:] for chunk in chunks[:-1]] == ["0 ", "1 ", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert not any("usage" in chunk for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in await streamed(h, "count 2"))


async def test_log_probabilities_come_with_the_bytes_of_broken_characters(http):
    h = await http(workers=1)
    completion = await h.openai.completions.create(model="m", prompt="scored", logprobs=1)
    found = completion.choices[0].logprobs
    assert found.tokens == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.token_logprobs == [-0.5, -1, -2]
    assert found.top_logprobs == [{"m": -0.25, "n": -0.5}, {"bytes:\\xc3": -1}, {}]
    assert found.text_offset == [0, 1, 1]
    assert completion.usage.prompt_tokens_details.cached_tokens == 4
    (chunk,) = await streamed(h, "scored", logprobs=1)
    assert chunk["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -1, -2]


async def test_every_prompt_gives_n_texts_of_which_each_names_its_number(http):
    h = await http(workers=2)
    response = await h.complete(["count 1", "count 2"], n=2, seed=7)
    found = response.json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"].count(":") for choice in found["choices"]] == [1, 1, 2, 2]
    assert found["usage"]["prompt_tokens"] == 6  # of each prompt once
    assert found["usage"]["completion_tokens"] == 6
    chunks = await streamed(h, ["count 1", "count 2"], n=2)
    texts = [
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)
    ]
    assert [text.count(":") for text in texts] == [1, 1, 2, 2]


async def test_fields_reach_the_worker_with_openais_defaults(http):
    h = await http(workers=1)
    text = (await h.complete("echo")).json()["choices"][0]["text"]
    assert "max_tokens: 16" in text
    assert "temperature: 1" in text
    assert "logprobs" not in text
    fields = {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "stop": "halt",
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": -100},
        "logprobs": 2,
        "seed": -1,
        "top_k": 4,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 3,
        "user": "somebody",
    }
    text = (await h.complete("echo", **fields)).json()["choices"][0]["text"]
    for said in (
        *('model: "m"', "max_tokens: 5", "temperature: 0", "top_p: 0.5", 'stop: "halt"', "key: 5"),
        *("value: -100", "presence_penalty: 1", "frequency_penalty: -1", "logprobs: 2", "top_k: 4"),
        *(f"seed: {2**64 - 1}", "min_p: 0.25", "repetition_penalty: 1.5", "stop_token_ids: 9"),
        *("ignore_eos: true", "min_tokens: 3"),
    ):
        assert said in text, text
    assert "somebody" not in text


async def test_prompts_may_be_token_ids(http):
    h = await http(workers=1)
    for prompt in ([104, 105], [[104, 105]]):
        response = await h.complete(prompt)
        # The stand-in knows no ids: it was asked for them, and that is all.
        assert response.status_code == 500, response.text
    assert h.bench.workers[0].requests == 2


async def test_a_prompt_is_echoed_before_its_text(http):
    h = await http(workers=1)
    found = (await h.complete(["count 1", "count 2"], echo=True)).json()
    assert [choice["text"] for choice in found["choices"]] == ["count 1w-0:0 ", "count 2w-0:0 w-0:1 "]
    chunks = await streamed(h, "count 2", echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["count 2w-0:0 ", "w-0:1 ", ""]


SCORES = [(104, b"h", None), (105, b"\xc3", -0.5), (106, b"\xa9", -1.0)]


async def test_a_prompt_is_scored_where_it_is_echoed_with_log_probabilities(http):
    h = await http(workers=1)
    h.bench.workers[0].scores = SCORES
    fields = {"echo": True, "logprobs": 1}
    found = (await h.complete([104, 105, 106], **fields)).json()["choices"][0]
    assert found["text"] == "hén\u00e9"
    assert found["logprobs"] == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "n", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [None, -0.5, -1, -0.5, -1, -2],
        "top_logprobs": [
            None,
            {"t": -0.25, "bytes:\\xc3": -0.5},
            {"t": -0.25, "bytes:\\xa9": -1},
            {"m": -0.25, "n": -0.5},
            {"bytes:\\xc3": -1},
            {},
        ],
        "text_offset": [0, 1, 1, 2, 3, 3],
    }
    asked = h.bench.workers[0].asked[-1].sampling
    assert (asked.prompt_logprobs, asked.logprobs, asked.max_tokens) == (1, 1, 16)
    chunks = await streamed(h, [104, 105, 106], **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == found["text"]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert tokens == found["logprobs"]["tokens"]


async def test_a_prompt_alone_is_scored_without_a_text(http):
    h = await http(workers=1)
    h.bench.workers[0].scores = [(1, b"<s>", None), *SCORES[:1], *SCORES[1:]]
    found = (await h.complete("hé", echo=True, logprobs=0, max_tokens=0)).json()
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hé", "length")
    # What the tokenizer put before the prompt is a token, and no text.
    assert choice["logprobs"]["tokens"] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1]
    assert found["usage"]["completion_tokens"] == 0
    assert h.bench.workers[0].asked[-1].sampling.max_tokens == 1
    (ids,) = (await h.complete([104, 105, 106], echo=True, max_tokens=0)).json()["choices"]
    assert (ids["text"], ids["logprobs"]) == ("<s>hé", None)


async def test_scores_of_one_answer_are_bounded_together(http, monkeypatch):
    monkeypatch.setattr("moe_frontend.http.completions.SCORES_MOST", 9)
    h = await http(workers=1)
    h.bench.workers[0].scores = SCORES
    refused = await h.complete([[1], [2]], echo=True, logprobs=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "echo"
    assert "more than 9 log-probabilities of prompts" in refused.json()["error"]["message"]
    assert (await h.complete([1], echo=True, logprobs=1)).status_code == 200
    await streamed(h, [[1], [2]], echo=True, logprobs=1)


@pytest.mark.parametrize("lost", ["kill", "drain"])
async def test_a_stream_survives_the_loss_of_its_worker_to_the_byte(http, lost):
    h = await http(workers=0)
    processes = [await h.bench.add_process(name, "r1", most=40) for name in ("p-0", "p-1")]
    chunks = []
    async with h.client.stream(
        "POST", "/v1/completions", json={"prompt": "count 60 0.01", "max_tokens": 60, "stream": True}
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
            if len(chunks) == 20:
                first = chunks[0]["choices"][0]["text"].split(":")[0]
                dying = processes[int(first[-1])]
                dying.kill() if lost == "kill" else dying.terminate()
                if lost == "drain":
                    dying.kill()
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    numbers = [int(text.split(":")[1]) for text in texts if text]
    assert numbers == list(range(60))
    assert len({text.split(":")[0] for text in texts if text}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_64_streams_run_at_once(http):
    h = await http(workers=2)
    answers = await asyncio.gather(*(h.complete("together 32") for _ in range(64)))
    assert [answer.status_code for answer in answers] == [200] * 64


async def test_a_client_that_leaves_frees_its_worker(http):
    h = await http(workers=1)
    for fields in ({}, {"stream": True}, {"n": 3}):
        with pytest.raises(httpx2.ReadTimeout):
            await h.client.post(
                "/v1/completions", json={"prompt": "silent", **fields}, timeout=httpx2.Timeout(30, read=0.5)
            )
        await h.bench.workers[0].until(lambda worker: worker.running == 0 and worker.requests > 0)
    assert h.bench.workers[0].requests == 5


async def test_a_deadline_ends_a_request(http):
    h = await http(workers=1)
    headers = {"x-request-timeout": "0.3"}
    response = await h.client.post("/v1/completions", json={"prompt": "silent"}, headers=headers)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    response = await h.client.post(
        "/v1/completions", json={"prompt": "hold", "stream": True}, headers=headers
    )
    first, error, done = events(response.text)
    assert json.loads(first)["choices"][0]["text"] == "first "
    assert json.loads(error)["error"]["code"] == "deadline_exceeded"
    assert done == "[DONE]"
    for wrong in ("0", "-1", "nan", "inf", "soon", "1e9"):
        response = await h.client.post(
            "/v1/completions", json={"prompt": "count 1"}, headers={"x-request-timeout": wrong}
        )
        assert response.status_code == 400
        assert "x-request-timeout" in response.json()["error"]["message"]


async def test_requests_wait_for_a_first_replica(http):
    h = await http(workers=0, hold_s=30, from_zero=True)
    waiting = asyncio.create_task(h.complete("count 1"))
    while h.bench.hold.held == 0:
        await asyncio.sleep(0.01)
    await h.bench.add_process("late")
    assert (await waiting).json()["choices"][0]["text"] == "late:0 "


async def test_a_wait_for_a_first_replica_ends_with_the_deadline_or_the_client(http):
    h = await http(workers=0, hold_s=30, from_zero=True)
    late = await h.client.post(
        "/v1/completions", json={"prompt": "count 1"}, headers={"x-request-timeout": "0.2"}
    )
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    with pytest.raises(httpx2.ReadTimeout):
        await h.client.post("/v1/completions", json={"prompt": "count 1"}, timeout=0.3)
    async with asyncio.timeout(60):
        while h.bench.hold.held:
            await asyncio.sleep(0.01)


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(http):
    h = await http(workers=0, patience_s=0.5)
    process = await h.bench.add_process("only")
    stream = await h.openai.completions.create(model="m", prompt="hold", stream=True)
    parts = aiter(stream)
    assert (await anext(parts)).choices[0].text == "first "
    process.kill()
    with pytest.raises(openai.APIError, match="replica only was lost in the middle of the answer"):
        await anext(parts)


async def test_errors_are_openais(http):
    h = await http(workers=1)
    cases = [
        ("bad", openai.BadRequestError, 400, "top_p is 7; use a number in (0, 1]", "top_p", None),
        ("unknown-model", openai.NotFoundError, 404, "no model of that name", "model", "model_not_found"),
        ("full", openai.RateLimitError, 429, "the queue is full", None, "queue_full"),
        ("loading", openai.InternalServerError, 503, "still loading", None, "unavailable"),
        ("crash", openai.InternalServerError, 500, "a bug", None, None),
    ]
    for prompt, kind, status, message, param, code in cases:
        with pytest.raises(kind) as caught:
            await h.openai.completions.create(model="m", prompt=prompt)
        error = caught.value
        assert (error.status_code, error.param, error.code) == (status, param, code)
        assert message in error.message
        assert error.response.json().keys() == {"error"}
        assert error.response.json()["error"].keys() == {"message", "type", "param", "code"}
    response = await h.complete("full")
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2500"
    assert response.headers["x-should-retry"] == "true"
    assert (await h.complete("crash")).headers["x-should-retry"] == "false"


async def test_one_text_that_fails_ends_all(http):
    h = await http(workers=1)
    response = await h.complete(["silent", "silent", "bad"])
    assert response.status_code == 400
    await h.bench.workers[0].until(lambda worker: worker.running == 0)


async def test_requests_are_told_of_in_traces_and_metrics(http):
    h = await http(workers=1)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "x-request-id": "mine-1"}
    response = await h.client.post("/v1/completions", json={"prompt": "count 1"}, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    spans = {span.name: span for span in h.bench.spans.get_finished_spans()}
    server = spans["POST /v1/completions"]
    assert f"{server.context.trace_id:032x}" == trace_id
    assert server.attributes["http.response.status_code"] == 200
    inner = spans["moe_api.inference.v1.InferenceService/Generate"]
    assert inner.parent.span_id == server.context.span_id
    assert inner.attributes["moe.routing.replica"] == "w-0"
    seen = h.bench.workers[0].metadata[-1]
    assert seen["x-request-id"] == "mine-1"
    assert trace_id in seen["traceparent"]
    assert "authorization" not in seen
    (point,) = h.metrics("http.server.request.duration")
    assert dict(point.attributes) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert [point.value for point in h.metrics("http.server.active_requests")] == [0]
    forged = await h.client.post(
        "/v1/completions", json={"prompt": "count 1"}, headers={"x-request-id": "a b"}
    )
    assert forged.headers["x-request-id"] != "a b"


async def test_an_answer_from_the_output_cache_says_so(http):
    h = await http(workers=1, output_cache=2**20, revision="r1")
    first, again = [(await h.complete("count 3", model="m", temperature=0)).json() for _ in range(2)]
    assert first["choices"] == again["choices"]
    assert "cached" not in first["usage"]
    assert again["usage"]["cached"] is True
    assert h.bench.workers[0].requests == 1
