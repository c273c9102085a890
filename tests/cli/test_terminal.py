"""What a terminal gets of texts that would act on it, on a real pseudo-terminal."""

import asyncio
import contextlib
import io
import os
import pty
import subprocess

import grpc
from rich.console import Console

from moe_api.inference.v1 import inference_pb2
from moe_cli.rendering import show
from tests.cli.conftest import MOE
from tests.frontend.fake_worker import FakeWorker

CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"
HOSTILE = f"one{CLIPBOARD}\x1b[2J\x1b]0;title\x1b\\\x9b31m\u202etwo\n\tthree\r"
SHOWN = "one\\x1b]52;c;cm0gLXJm\\x07\\x1b[2J\\x1b]0;title\\x1b\\\\x9b31m\\u202etwo\n\tthree\\x0d"


class Hostile(FakeWorker):
    async def Generate(self, request, context):
        if request.prompt == "error":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"no{CLIPBOARD}\nforged\x9b")
        for piece in HOSTILE:
            yield inference_pb2.GenerateResponse(text=piece, tokens=[1])
        yield inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_STOP)


@contextlib.asynccontextmanager
async def hostile():
    worker = Hostile("w")
    await worker.start()
    yield worker.endpoint.address
    await worker.server.stop(None)


async def on_terminal(environment, *arguments):
    """Everything that a terminal would be sent, on stdout and stderr."""
    return await asyncio.to_thread(run_on_terminal, environment, *arguments)


def run_on_terminal(environment, *arguments):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([MOE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    received = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 1 << 16):
            received += piece
    process.wait(30)
    os.close(ours)
    return received.decode().replace("\r\n", "\n")


def acting(text):
    return [c for c in text if (ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]


async def test_text_of_a_model_does_not_act_on_a_terminal(environment):
    async with hostile() as address:
        received = await on_terminal(environment, "generate", "x", "--endpoint", address)
    assert (received, acting(received)) == (f"{SHOWN}\n", [])


async def test_a_pipe_gets_it_as_it_is(moe):
    async with hostile() as address:
        result = await moe("generate", "x", "--endpoint", address)
    assert result.stdout.decode() == HOSTILE


async def test_an_error_of_a_server_acts_on_nothing(environment, moe):
    async with hostile() as address:
        received = await on_terminal(environment, "generate", "error", "--endpoint", address)
        piped = await moe("generate", "error", "--endpoint", address)
    assert received == "error: no\\x1b]52;c;cm0gLXJm\\x07 forged\\x9b\n", "one line, whatever was sent"
    assert piped.stderr.decode() == received


def test_what_a_cluster_holds_acts_on_nothing():
    hostile = f"a{CLIPBOARD}\x1b[2Jb"
    condition = {"type": hostile, "status": "False", "reason": hostile, "message": hostile}
    pod = {
        **dict.fromkeys(("name", "role", "revision", "phase", "node", "address"), hostile),
        "dataRank": 0,
        "current": False,
        "ready": False,
        "leaving": False,
        "restarts": 0,
        "load": None,
        "problem": {"reason": hostile, "message": hostile},
        "lastEnd": None,
    }
    report = {
        "namespace": hostile,
        "name": hostile,
        "generation": 1,
        "observedGeneration": 2,
        "model": {"servedName": hostile, "uri": hostile, "architecture": hostile, "format": hostile},
        "replicas": {"desired": 1, "ready": 0, "updated": 0, "there": 0},
        "revision": hostile,
        "scaling": None,
        "mesh": None,
        "caches": {},
        "conditions": [{**condition, "lastTransitionTime": hostile}],
        "pods": [pod, {**pod, "problem": None, "lastEnd": {"at": hostile, "exitCode": 1, "log": hostile}}],
        "decisions": [{"time": hostile, "type": hostile, "reason": hostile, "message": hostile}],
    }
    out = io.StringIO()
    show(report, Console(file=out, force_terminal=False, width=200))
    body = {
        "metadata": {"namespace": hostile, "name": hostile},
        "status": {"conditions": [{**condition, "type": "Ready", "lastTransitionTime": "x"}]},
    }
    show({"items": [body]}, Console(file=out, force_terminal=False, width=200))
    assert "\\x1b]52;c" in out.getvalue()
    assert acting(out.getvalue()) == []
