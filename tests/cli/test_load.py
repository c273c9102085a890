"""`moe load` against a real server, and what it makes of traces."""

import asyncio
import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_client.errors import CommandError
from moe_tools.load.report import Progress, summarise
from moe_tools.load.run import Arrivals, Outcome, Part, Tally, arrivals
from moe_tools.load.trace import RequestTrace, read
from tests.cli.conftest import MOE

NONE = np.zeros(0, np.int64)


def counts(numbers, interval_s=10.0):
    return RequestTrace(interval_s, np.array(numbers, float), np.zeros(0), NONE, NONE)


def requests(at_s, lengths):
    lengths = np.array(lengths, np.int64)
    return RequestTrace(0.0, np.zeros(0), np.array(at_s, float), lengths, lengths)


def test_every_request_of_the_trace_is_due_within_its_interval():
    due = arrivals(counts([3, 0, 2]), Part(0, None), share=1, speed=10, seed=1)
    assert np.histogram(due.at_s, [0, 1, 2, 3])[0].tolist() == [3, 0, 2]
    assert due.at_s.tolist() == sorted(due.at_s)


def test_a_part_of_a_trace_and_its_lengths():
    due = arrivals(requests([0, 5, 6, 9], [1, 2, 3, 4]), Part(5, 4), share=1, speed=2, seed=1)
    assert due.at_s.tolist() == [0, 0.5]
    assert due.input_tokens.tolist() == due.output_tokens.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("numbers", "share", "sentence"),
    [
        ([1e300, 1e300], 1, "the trace has 2e+300 requests, more than 100,000,000; give a part of it"),
        ([2, 3], 1e9, "this part and --share make 5e+09 requests, more than 10,000,000; lower --share"),
    ],
)
def test_more_requests_than_memory_holds_are_refused(numbers, share, sentence):
    with pytest.raises(CommandError) as refused:
        arrivals(counts(numbers), Part(0, None), share, speed=1, seed=1)
    assert sentence in str(refused.value.format_message())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 3), st.integers(0, 5))
def test_a_share_of_the_requests_is_sent_the_same_every_time(share, seed):
    trace = counts([200] * 20)
    first, again = (arrivals(trace, Part(0, None), share, 60, seed) for _ in range(2))
    assert first.at_s.tolist() == again.at_s.tolist()
    assert abs(len(first.at_s) - 4000 * share) < 200


def test_latencies_count_from_when_a_request_was_due():
    due = Arrivals(np.array([1.0, 2.0]), NONE, NONE)
    outcomes = [Outcome(0, 0.5, 0.75, 1.0, 5, "OK"), Outcome(1, 0.0, None, 3.0, 0, "UNAVAILABLE")]
    summary = summarise(outcomes, due)
    assert summary["requests"] == {"due": 2, "sent": 2, "ok": 1, "failed": {"UNAVAILABLE": 1}}
    assert summary["time_to_first_token_s"]["p50"] == 0.75
    assert summary["time_per_output_token_s"]["max"] == pytest.approx(0.0625)
    assert summary["duration_s"] == 5.0


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("time,requests\n0,5\n10,10\n20,5\n")
    return path


@pytest.fixture
def play(moe, worker):
    """`moe load` of a trace against the worker."""

    async def played(path, *options):
        return await moe("load", str(path), "--endpoint", worker.endpoint.address, *options)

    return played


async def test_a_trace_is_played_and_summed_up(play, worker, trace):
    done = await play(trace, "--speed", "30", "--prompt", "count 2", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["requests"] == {"due": 20, "sent": 20, "ok": 20, "failed": {}}
    assert worker.requests == 20
    assert 0.5 < summary["duration_s"] < 60
    table = await play(trace, "--speed", "60", "--prompt", "count 1")
    assert b"20 of 20 requests" in table.stdout
    assert b"first token" in table.stdout


async def test_a_slow_server_does_not_slow_the_load_down(play, worker, trace):
    """Each answer takes a second; in a closed loop twenty of them would take twenty."""
    done = await play(trace, "--speed", "30", "--prompt", "count 1 1", "--json")
    summary = json.loads(done.stdout)
    assert summary["requests"]["ok"] == 20
    assert summary["duration_s"] < 18
    assert worker.most_running > 5


async def test_failures_are_counted_by_their_status(play, trace):
    done = await play(trace, "--speed", "60", "--prompt", "full")
    assert done.returncode == 3
    assert b"0 ok, 20 RESOURCE_EXHAUSTED" in done.stdout


@pytest.fixture
async def garbled():
    """The address of a server whose every message is one that protobuf cannot decode."""

    async def generate(_, context):
        await context.write(b"\xff")

    async def get_model(*_):
        return b"\xff"

    handlers = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate),
        "GetModel": grpc.unary_unary_rpc_method_handler(get_model),
    }
    server = grpc.aio.server()
    name = "moe_api.inference.v1.InferenceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_requests_with_a_message_that_cannot_be_decoded_have_failed(moe, garbled, trace):
    done = await moe("load", str(trace), "--endpoint", garbled, "--speed", "60", "--prompt", "count 1")
    assert done.returncode == 3
    assert b"0 ok, 20 INTERNAL" in done.stdout
    done = await moe("load", str(trace), "--endpoint", garbled)
    assert done.returncode == 1
    assert b"describes no model: its message cannot be decoded" in done.stderr


async def test_what_is_wrong_is_one_sentence(moe, play, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("when,who\n1,2\n")
    done = await play(bad)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: " + os.fsencode(bad) + b": its first line is 'when,who'")
    done = await moe("load", str(bad.with_name("none.csv")))
    assert done.returncode == 2
    quiet = tmp_path / "quiet.csv"
    quiet.write_text("time,requests\n0,0\n10,0\n")
    done = await play(quiet)
    assert b"no request to send" in done.stderr


async def test_ctrl_c_ends_with_the_summary(worker, trace, environment):
    process = await asyncio.create_subprocess_exec(
        *(MOE, "load", str(trace), "--endpoint", worker.endpoint.address, "--prompt", "hold", "--json"),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    async with asyncio.timeout(60):
        while worker.requests < 2:
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    summary = json.loads(out)
    assert summary["requests"]["sent"] >= 2
    assert set(summary["requests"]["failed"]) == {"CANCELLED"}


SHARED = Path(__file__).parents[2] / "../shared/data/traces"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared traces are not here")
def test_lengths_of_a_recorded_trace_are_kept():
    recorded = read(SHARED / "azure2023_code.csv.gz")
    due = arrivals(recorded, Part(0, 600), share=1, speed=60, seed=0)
    assert len(due.at_s) == 1482
    assert due.input_tokens.max() > 1000
    assert due.at_s[-1] <= 10


def test_a_log_gets_lines_now_and_then_about_a_run():
    now, out = [0.0], io.StringIO()
    due = SimpleNamespace(at_s=[0.0] * 100)
    with Progress(due, out, lambda: now[0]) as progress:
        for now[0], sent in ((1.0, 10), (31.0, 40), (32.0, 50), (75.0, 90)):
            progress.show(Tally(sent=sent, ok=sent - 3, failed=1))
    assert out.getvalue() == (
        "sent 40 of 100 requests; 2 active, 1 failed\nsent 90 of 100 requests; 2 active, 1 failed\n"
    )
