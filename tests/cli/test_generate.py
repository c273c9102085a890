"""`moe generate` and `moe tokenize` as a user runs them, against a real server."""

import asyncio
import re
import signal
import socket
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from moe_api import semconv
from moe_api.address import check_address
from moe_api.inference.v1 import inference_pb2
from moe_cli.generate import _describe_request
from moe_cli.timing import Timing, summary
from tests.cli.conftest import MOE
from tests.frontend.fake_worker import FakeWorker


async def start(environment, *args):
    return await asyncio.create_subprocess_exec(
        MOE, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


async def test_the_text_and_nothing_else_goes_to_stdout(worker, moe):
    result = await moe("generate", "count 3", "--endpoint", worker.endpoint.address)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"w:0 w:1 w:2 ", b"")


async def test_text_comes_out_while_it_is_generated(worker, environment):
    process = await start(environment, "generate", "hold", "--endpoint", worker.endpoint.address)
    assert await asyncio.wait_for(process.stdout.readexactly(6), 60) == b"first "
    assert process.returncode is None
    process.kill()
    await process.wait()


async def test_the_prompt_can_come_from_standard_input(worker, moe):
    result = await moe("generate", "-", stdin=b"count 1", MOE_ENDPOINT=worker.endpoint.address)
    assert result.stdout == b"w:0 "


async def test_only_what_was_asked_is_sent(moe):
    requests = []

    class Recording(FakeWorker):
        async def Generate(self, request, context):
            requests.append(request)
            async for response in super().Generate(request, context):
                yield response

    worker = Recording("w")
    await worker.start()
    address = worker.endpoint.address
    await moe("generate", "count 1", "--endpoint", address)
    options = ["--max-tokens", "7", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "0"]
    await moe(
        "generate", "count 1", "--endpoint", address, "--model", "m", *options, "--stop", "a", "--stop", "é"
    )
    more = ["--min-p", "0.25", "--repetition-penalty", "1.5", "--presence-penalty", "-0.5", "--ignore-eos"]
    more += ["--frequency-penalty", "0.5", "--logit-bias", "7:-100", "--logit-bias", "9:1.5"]
    more += ["--stop-token-id", "4", "--stop-token-id", "5", "--min-tokens", "0", "--logprobs", "2"]
    await moe("generate", "count 1", "--endpoint", address, *more)
    await worker.server.stop(None)
    plain, full, further = requests
    assert plain.sampling.ListFields() == []
    assert full.model == "m"
    sampling = full.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (7, 3, 0)
    assert (round(sampling.temperature, 6), round(sampling.top_p, 6)) == (0.5, 0.9)
    assert sampling.HasField("seed")
    assert list(sampling.stop) == ["a", "é"]
    assert further.sampling == inference_pb2.SamplingParameters(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={7: -100, 9: 1.5},
        stop_token_ids=[4, 5],
        ignore_eos=True,
        min_tokens=0,
        logprobs=2,
    )


async def test_log_probabilities_are_printed_next_to_the_text(moe):
    class Knowing(FakeWorker):
        async def Generate(self, request, context):
            top = [inference_pb2.TopLogprob(token=5, logprob=-0.25)]
            logprobs = [inference_pb2.TokenLogprobs(logprob=-1.5, top=top)]
            yield inference_pb2.GenerateResponse(text="a", tokens=[9], logprobs=logprobs, finish_reason=1)

    worker = Knowing("w")
    await worker.start()
    result = await moe("generate", "x", "--logprobs", "1", "--endpoint", worker.endpoint.address)
    await worker.server.stop(None)
    assert (result.stdout, result.stderr) == (b"a", b"token 9 -1.5000; likeliest:  5 -0.2500\n")


@pytest.fixture
async def answering():
    """`await answering(message, ...)` gives the address of a worker that sends these; a number is a pause."""
    started = []

    async def start(*answer):
        class Answering(FakeWorker):
            async def Generate(self, request, context):
                for step in answer:
                    if isinstance(step, inference_pb2.GenerateResponse):
                        yield step
                    else:
                        await asyncio.sleep(step)

        started.append(Answering("w"))
        return (await started[0].start()).address

    yield start
    for worker in started:
        await worker.server.stop(None)


def part(text, finish_reason=0):
    return inference_pb2.GenerateResponse(text=text, tokens=[1], finish_reason=finish_reason)


async def test_a_finish_reason_of_a_newer_server_is_shown_by_its_number(moe, answering):
    result = await moe("generate", "x", "--stats", "--endpoint", await answering(part("a", 99)))
    assert (result.returncode, result.stdout) == (0, b"a")
    assert b"generated (99)" in result.stderr


async def test_an_answer_without_an_end_is_an_error(moe, answering):
    result = await moe("generate", "x", "--endpoint", await answering(part("a")))
    assert (result.returncode, result.stdout) == (1, b"a")
    assert re.fullmatch(rb"error: answer is not complete: [^\n]*\n", result.stderr)


async def test_text_behind_the_end_is_not_printed_and_the_call_is_left(moe, answering):
    result = await moe("generate", "x", "--endpoint", await answering(part("a", 1), part("b"), 3600))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"a", b"")


def test_every_choice_has_a_name_in_the_trace_and_a_value_that_attributes_can_hold(caplog):
    sampling = inference_pb2.SamplingParameters(stop=["a"], stop_token_ids=[4], logit_bias={7: -100})
    for field in sampling.DESCRIPTOR.fields:
        if not field.is_repeated:
            setattr(sampling, field.name, 1)
    span = TracerProvider().get_tracer("test").start_span("call")
    _describe_request(span, inference_pb2.GenerateRequest(sampling=sampling))
    assert set(semconv.SAMPLING_ATTRIBUTES.values()) <= set(span.attributes)
    assert span.attributes["moe.request.logit_bias"] == ("7:-100",)
    assert caplog.records == [], "the SDK warns of values that it drops"


async def test_stats_go_to_stderr(worker, moe):
    result = await moe("generate", "count 5 0.05", "--stats", "--endpoint", worker.endpoint.address)
    line = result.stderr.decode()
    assert line.startswith("3 prompt tokens, 5 generated (length), TTFT ")
    ttft, tpot = (float(x) for x in re.search(r"TTFT ([\d.]+) ms, TPOT ([\d.]+) ms", line).groups())
    assert ttft >= 50
    assert 40 < tpot < 5000


async def test_a_trace_id_is_printed_and_sent(worker, moe):
    result = await moe("generate", "count 1", "--trace-id", "--endpoint", worker.endpoint.address)
    trace_id = re.fullmatch(rb"trace: ([0-9a-f]{32})\n", result.stderr)[1].decode()
    assert worker.metadata[0]["traceparent"].split("-")[1] == trace_id
    assert worker.metadata[0]["traceparent"].endswith(("-01", "-03")), "sampled"
    await moe("generate", "count 1", "--endpoint", worker.endpoint.address)
    assert "traceparent" not in worker.metadata[1]


async def test_ctrl_c_ends_the_call_and_is_silent(worker, environment):
    process = await start(environment, "generate", "hold", "--endpoint", worker.endpoint.address)
    await process.stdout.readexactly(6)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors) == (130, b"")
    await worker.until(lambda w: w.cancelled == 1)


async def test_a_reader_that_has_enough_is_no_error(worker, environment):
    process = await start(environment, "generate", "count 1000 0.01", "--endpoint", worker.endpoint.address)
    await process.stdout.readexactly(4)
    process._transport.get_pipe_transport(1).close()
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors) == (0, b"")
    await worker.until(lambda w: w.cancelled == 1)


@pytest.mark.parametrize(
    ("prompt", "code", "sentence"),
    [
        ("bad", 2, "error: sampling.top_p: is 7; use a number in (0, 1]\n"),
        ("full", 4, "error: the queue is full (retry after 2.5 s)\n"),
        ("loading", 3, "error: the model is still loading (retry after 4 s)\n"),
        ("unknown-model", 2, "error: no model of that name; this is m\n"),
    ],
)
async def test_errors_are_one_sentence_and_an_exit_code(worker, moe, prompt, code, sentence):
    result = await moe("generate", prompt, "--endpoint", worker.endpoint.address)
    assert (result.returncode, result.stderr.decode(), result.stdout) == (code, sentence, b"")


async def test_a_deadline_keeps_what_arrived(worker, moe):
    result = await moe("generate", "hold", "--timeout", "0.5", "--endpoint", worker.endpoint.address)
    assert (result.returncode, result.stdout) == (5, b"first ")
    assert b"within --timeout" in result.stderr


async def test_nobody_there_is_explained(moe):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    result = await moe("generate", "x", "--endpoint", address)
    assert result.returncode == 3
    assert f"error: cannot connect to {address}" in result.stderr.decode()
    assert "port-forward" in result.stderr.decode()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["generate", "x", "--endpoint", "localhost"], "'localhost' is not HOST:PORT"),
        (["generate", "x", "--max-tokens", "0"], "0 is not in the range"),
        (["generate", "x", "--top-k", "-1"], "-1 is not in the range"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", b"\xe9"], "not UTF-8: byte 0xe9 at 0"),
        (["generate", "x", "--stop", b"a\xff"], "not UTF-8: byte 0xff at 1"),
        (["generate", "x", "--logit-bias", "7"], "'7' is not TOKEN:BIAS"),
        (["generate", "x", "--logit-bias", "-7:1"], "-7 is not in the range"),
    ],
)
async def test_wrong_arguments_are_explained(moe, args, sentence):
    result = await moe(*args)
    assert result.returncode == 2
    assert sentence in result.stderr.decode()


async def test_standard_input_that_is_not_text_is_explained(moe):
    result = await moe("generate", "-", stdin=b"ab\x80")
    assert result.returncode == 2
    assert "not UTF-8: byte 0x80 at 2" in result.stderr.decode()


async def test_tokenize_prints_ids(worker, moe):
    result = await moe("tokenize", "né", "--endpoint", worker.endpoint.address)
    assert result.stdout == b"110 195 169\n"


async def test_help_teaches(moe):
    text = " ".join((await moe("--help")).stdout.decode().split())
    assert 'moe generate "A pod is"' in text
    assert "Exit codes: 0 success, 2 invalid request" in text


def test_rates_need_two_tokens():
    one = Timing(4, 1, "stop", 0.01, 0.01)
    assert one.per_token_s is None
    assert summary(one) == "4 prompt tokens, 1 generated (stop), TTFT 10.0 ms"
    many = Timing(4, 11, "length", 0.5, 1.5)
    assert many.per_token_s == pytest.approx(0.1)
    assert summary(many).endswith("TTFT 500.0 ms, TPOT 100.00 ms (10.0 tokens/s)")


@pytest.mark.parametrize("good", ["127.0.0.1:8000", "[::1]:0", "a-b.example:65535", " host:1 "])
def test_addresses(good):
    assert check_address(good) == good.strip()


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ":",
        "host",
        "host:",
        ":80",
        "::1:80",
        "host:65536",
        "host:-1",
        "host:1٣",
        "http://h:1",
        "a..b:1",
        "[a..b]:1",
        "x" * 64 + ":1",
    ],
)
def test_what_is_no_address(bad):
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        check_address(bad)


@given(st.from_regex(r"[a-z-]{1,9}(\.[a-z-]{1,9})?\.?", fullmatch=True), st.integers(0, 10**6))
def test_ports_end_at_65535(host, port):
    address = f"{host}:{port}"
    if port <= 65535:
        assert check_address(address) == address
    else:
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            check_address(address)
