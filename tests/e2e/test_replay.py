"""Real workers of the example model die in the middle of streams; clients get every byte all the same."""

import asyncio
import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_api.inference.v1 import inference_pb2 as pb
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.transport.attempts import ROUTING_REPLAYED
from tests.e2e.serving import EXAMPLE
from tests.frontend.conftest import bench  # noqa: F401 - a fixture
from tests.worker.serving import Worker

REVISION = "r1"
# Kernels whose sums do not depend on the batch: torch's float32 products do, in the last bit, and once in
# some thousand sampled tokens that bit decides, with or without a death.
FLAGS = ("--format", "w4a8", "--device", "cpu", "--context-length", "512", "--revision", REVISION)
TOKENS = 120
SAMPLINGS = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "seed": 2**64 - 1, "logprobs": 2},
    {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"presence_penalty": 1.0, "min_tokens": 60},
    {"temperature": 1.0, "seed": 11, "stop": ["\n\n", "the end of", "configuration"]},
]
PROMPTS = ["The kernel maps a page", "Zwei Größen — “naïve” façades:", "To install the package"]


def requests():
    for number, prompt in enumerate(PROMPTS):
        for sampling in SAMPLINGS:
            parameters = pb.SamplingParameters(**{"max_tokens": TOKENS + 7 * number, **sampling})
            yield pb.GenerateRequest(prompt=prompt, sampling=parameters)


class Heard:
    """Everything that a client was told in one stream."""

    def __init__(self):
        self.text = ""
        self.tokens = []
        self.logprobs = []
        self.end = None

    def take(self, response):
        self.text += response.text
        self.tokens += response.tokens
        self.logprobs += [entry.logprob for entry in response.logprobs]
        if response.finish_reason:
            assert self.end is None
            self.end = (
                response.finish_reason,
                response.usage.prompt_tokens,
                response.usage.completion_tokens,
            )


async def listen(call, heard):
    async for response in call:
        heard.take(response)
    return heard


@contextlib.contextmanager
def running(count):
    """Real worker processes, started side by side."""
    workers = [Worker(EXAMPLE, *FLAGS) for _ in range(count)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as threads:
        list(threads.map(stack.enter_context, workers))
        for worker in workers:
            worker.wait_ready()
        yield workers


def kill_worker(worker):
    worker.process.kill()


def kill_engine(worker):
    os.kill(worker.engine_pid(), signal.SIGKILL)


@pytest.mark.timeout(600)
async def test_every_stream_is_byte_for_byte_what_it_would_have_been(bench):  # noqa: F811
    asked = list(requests())
    with running(3) as workers:
        b = await bench(workers=0, patience_s=120)
        b.extra = frozenset({Endpoint("w-2", f"127.0.0.1:{workers[2].port}", REVISION)})
        await b.publish()
        expected = [await listen(b.stub.Generate(request), Heard()) for request in asked]
        b.extra = frozenset(
            Endpoint(f"w-{number}", f"127.0.0.1:{worker.port}", REVISION)
            for number, worker in enumerate(workers)
        )
        await b.publish()
        heard = [Heard() for _ in asked]
        streams = [
            asyncio.create_task(listen(b.stub.Generate(request), one))
            for request, one in zip(asked, heard, strict=True)
        ]
        # The first dies while its streams are young, the second one when it has inherited some.
        for kill, number, tokens in ((kill_worker, 0, 5), (kill_engine, 1, 40)):
            while sum(len(one.tokens) >= tokens for one in heard) < len(asked) * 2 // 3:
                await asyncio.sleep(0.005)
            kill(workers[number])
        await asyncio.gather(*streams)
        replays = [span for span in b.spans.get_finished_spans() if ROUTING_REPLAYED in span.attributes]
        assert len(replays) >= len(asked) // 3
    for request, one, other in zip(asked, heard, expected, strict=True):
        assert one.text.encode() == other.text.encode(), request
        assert (one.tokens, one.end) == (other.tokens, other.end)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
