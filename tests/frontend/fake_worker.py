"""A real gRPC server in a worker's place; the prompt says what it should do.

``count N [SECONDS]``: N messages, with a pause before each. ``hold``: one message, then nothing more.
``silent``: nothing at all. ``together N``: one message, once N requests run at once.
``flood N``: N messages of 64 KiB, as fast as they are taken.
``scored``: "né", whose "é" is of two tokens, with log-probabilities. ``echo``: the request, as text.
`scores`: (token, piece, log-probability) of the tokens of a prompt, sent before ``scored``.
`says`: texts to send, whatever is asked, as far as max_tokens allows.
``full``, ``bad``, ``loading``, ``crash``: the errors that a worker returns.
A stream of ``count`` is taken up where the request says so; after `most` messages it stops.
As a program (NAME [LISTEN]) it prints its address and serves until it is killed; FAKE_WORKER_MOST is `most`.
"""

import asyncio
import inspect
import math
import os
import signal
import sys

import grpc
from google.protobuf.empty_pb2 import Empty

from moe_api import rich_status
from moe_api.health import Health
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.rich_status import FieldViolation
from moe_api.server import create_server
from moe_api.worker.v1 import worker_pb2, worker_pb2_grpc
from moe_frontend.discovery.endpoints import Endpoint, Served

STOP = inference_pb2.FINISH_REASON_STOP
ERRORS = {
    "full": rich_status.retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 2.5),
    "bad": rich_status.invalid_argument([FieldViolation("sampling.top_p", "is 7; use a number in (0, 1]")]),
    "loading": rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, "the model is still loading", 4.0),
    "unknown-model": rich_status.build(grpc.StatusCode.NOT_FOUND, "no model of that name; this is m"),
}

_TOP = inference_pb2.TopLogprob
SCORED = inference_pb2.GenerateResponse(
    text="né",
    tokens=[1, 2, 3],
    logprobs=[
        inference_pb2.TokenLogprobs(logprob=-0.5, piece=b"n", top=[_TOP(token=5, logprob=-0.25, piece=b"m")]),
        inference_pb2.TokenLogprobs(logprob=-1, piece=b"\xc3", top=[_TOP(logprob=-1, piece=b"\xc3")]),
        inference_pb2.TokenLogprobs(logprob=-2, piece=b"\xa9"),
    ],
    finish_reason=STOP,
    usage=inference_pb2.Usage(prompt_tokens=9, completion_tokens=3, cached_tokens=4),
)


SHORT = inference_pb2.GenerateResponse(
    text="n",
    tokens=[1],
    logprobs=SCORED.logprobs[:1],
    finish_reason=inference_pb2.FINISH_REASON_LENGTH,
    usage=inference_pb2.Usage(prompt_tokens=9, completion_tokens=1),
)


def says_bytes(method, answers):
    """A WorkerService that knows one method; its answers are bytes, whatever the .proto file allows.

    answers: an async function (request, context), or an async generator for a stream.
    """
    streams = inspect.isasyncgenfunction(answers)
    handle = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
    return {method: handle(answers, Empty.FromString)}


class FakeWorker(inference_pb2_grpc.InferenceServiceServicer):
    """Counts what it sees."""

    def __init__(self, name, revision="", most=math.inf):
        self.name = name
        self.revision = revision
        self.most = most
        self.full = False
        self.requests = 0
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.sent = 0
        self.metadata = []
        self.asked = []
        self.says = []
        self.scores = []
        self.deadlines = []
        self.server = None
        self.health = None
        self.endpoint = None
        self.changed = asyncio.Condition()

    async def start(self, address="127.0.0.1:0", leaving=None, credentials=None):
        self.server = create_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self.server)
        if isinstance(leaving, dict):  # of says_bytes
            self.server.add_registered_method_handlers("moe_api.worker.v1.WorkerService", leaving)
        elif leaving is not None:
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(leaving, self.server)
        self.health = Health(["moe_api.inference.v1.InferenceService"])
        await self.health.register(self.server)
        if credentials is None:
            port = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, credentials)
        await self.server.start()
        await self.health.set_ready(ready=True)
        secure = credentials is not None
        self.endpoint = Endpoint(
            self.name, f"127.0.0.1:{port}", self.revision, 4096, served=Served("m", 4096), secure=secure
        )
        return self.endpoint

    async def allow(self, most):
        """Lets each stream of ``count`` have so many messages."""
        self.most = most
        await self._change()

    async def until(self, condition, most_s=60):
        """Waits until the condition holds for this worker."""
        async with asyncio.timeout(most_s), self.changed:
            await self.changed.wait_for(lambda: condition(self))

    async def _change(self, **differences):
        async with self.changed:
            for field, by in differences.items():
                setattr(self, field, getattr(self, field) + by)
            self.most_running = max(self.most_running, self.running)
            self.changed.notify_all()

    async def Generate(self, request, context):
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        if request.resume.revision not in ("", self.revision):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "of another revision")
        if self.full:
            await rich_status.abort(context, ERRORS["full"])
        context.set_trailing_metadata((("x-tenant", self.name), ("x-internal", "10.0.0.1")))
        await self._change(requests=1, running=1)
        try:
            at_once = self.says or self.scores or request.prompt in ("scored", "echo")
            behave = self._at_once if at_once else self._behave
            async for response in behave(request, context):
                yield response
                await self._change(sent=1)
        except (asyncio.CancelledError, GeneratorExit):  # which, depends on whether a message was being sent
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            async with self.changed:
                self.changed.notify_all()

    async def _behave(self, request, context):
        match request.prompt.split():
            case ["count", number, *pause]:
                steps = range(len(request.resume.tokens), int(number))
                async for response in self._count(steps, float(pause[0]) if pause else 0):
                    yield response
            case ["together", number]:
                await self.until(lambda worker: worker.most_running >= int(number))
                yield inference_pb2.GenerateResponse(text=f"{self.name} ", finish_reason=STOP)
            case ["flood", number]:
                for _ in range(int(number)):
                    yield inference_pb2.GenerateResponse(text="x" * 65536)
                yield inference_pb2.GenerateResponse(finish_reason=STOP)
            case ["hold"]:
                yield inference_pb2.GenerateResponse(text="first ")
                await asyncio.Event().wait()
            case ["silent"]:
                await asyncio.Event().wait()
            case ["crash"]:
                raise ValueError("a bug")
            case [error]:
                await rich_status.abort(context, ERRORS[error])

    async def _count(self, steps, pause_s):
        for i in steps:
            if i - steps.start >= self.most:
                await self.until(lambda worker, sent=i - steps.start: sent < worker.most, 3600)
            await asyncio.sleep(pause_s)
            resumed = steps.start if i == steps.start else 0
            yield inference_pb2.GenerateResponse(text=f"{self.name}:{i} ", tokens=[i], resumed=resumed)
        yield inference_pb2.GenerateResponse(
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=steps.stop),
        )

    async def _at_once(self, request, context):
        for token, piece, logprob in self.scores:
            top = [] if logprob is None else [_TOP(token=7, logprob=-0.25, piece=b"t")]
            scored = inference_pb2.PromptToken(token=token, piece=piece, logprob=logprob, top=top)
            yield inference_pb2.GenerateResponse(prompt=[scored])
        if self.scores:
            yield SCORED if request.sampling.max_tokens >= len(SCORED.tokens) else SHORT
            return
        answers = {
            "scored": SCORED,
            "echo": inference_pb2.GenerateResponse(text=str(request), finish_reason=STOP),
        }
        most = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else len(self.says)
        for number, text in enumerate(self.says[:most]):
            yield inference_pb2.GenerateResponse(text=text, tokens=[number])
        usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=min(most, len(self.says)))
        cut = most < len(self.says)
        reason = inference_pb2.FINISH_REASON_LENGTH if cut else STOP
        done = inference_pb2.GenerateResponse(finish_reason=reason, usage=usage)
        yield done if self.says else answers[request.prompt]

    async def Tokenize(self, request, context):
        return inference_pb2.TokenizeResponse(tokens=inference_pb2.TokenIds(ids=list(request.text.encode())))

    async def GetModel(self, request, context):
        if request.model not in ("", "m"):
            await rich_status.abort(context, ERRORS["unknown-model"])
        return inference_pb2.Model(name=self.name, vocabulary_size=256, revision=self.revision)


class Leaving(worker_pb2_grpc.WorkerServiceServicer):
    """Load and draining, as the real worker's."""

    def __init__(self, worker):
        self.worker = worker
        self.stop = asyncio.Event()

    async def GetLoad(self, request, context):
        return worker_pb2.Load(running=self.worker.running)

    async def Drain(self, request, context):
        self.stop.set()
        return worker_pb2.Drained(requests=self.worker.running)


async def serve():
    most = float(os.environ.get("FAKE_WORKER_MOST", "inf"))
    worker = FakeWorker(sys.argv[1], os.environ.get("MOE_WORKER_REVISION", ""), most)
    leaving = Leaving(worker)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.stop.set)
    endpoint = await worker.start(*sys.argv[2:], leaving=leaving)
    print(endpoint.address, flush=True)
    await leaving.stop.wait()
    await worker.health.set_ready(ready=False)
    await worker.until(lambda w: w.running == 0, 3600)
    await worker.health.close()
    await worker.server.stop(1)


if __name__ == "__main__":
    asyncio.run(serve())
