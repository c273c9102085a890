"""Workers that lie or die: what the client is told, and how many calls one request costs."""

import asyncio
import contextlib

import grpc
import pytest

from moe_api import rich_status, transport
from moe_api.inference.v1 import inference_pb2 as pb
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.policy import routing

SERVICE = "moe_api.inference.v1.InferenceService"
STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
DIED = (grpc.StatusCode.UNAVAILABLE, "Socket closed")


def message(*tokens, text="x", **more):
    return pb.GenerateResponse(text=text, tokens=tokens, **more).SerializeToString()


class Scripted:
    """A worker that sends whatever bytes its script gives for (number of the call, request)."""

    def __init__(self, name, script):
        self.name, self.script, self.requests = name, script, []

    async def start(self):
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(self._answer, pb.GenerateRequest.FromString)
            for name in ("Generate", "Tokenize")
        }
        self.server = grpc.aio.server(options=transport.SERVER_OPTIONS)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return Endpoint(self.name, f"127.0.0.1:{port}")

    async def _answer(self, request, context):
        self.requests.append(request)
        for step in self.script(len(self.requests), request):
            if isinstance(step, bytes):
                yield step
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                await context.abort(*step)


@pytest.fixture
async def scripted(bench):
    """`await scripted(script, ...)` gives a bench and its scripted workers, w-0, w-1, ..."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*scripts, **options):
            b = await bench(workers=0, **options)
            workers = [Scripted(f"w-{number}", script) for number, script in enumerate(scripts)]
            b.extra = frozenset([await worker.start() for worker in workers])
            for worker in workers:
                stack.push_async_callback(worker.server.stop, None)
            await b.publish()
            return b, workers

        yield start


async def hear(bench, max_tokens=100, resume=()):
    """The tokens that a client gets, and the error that ends them, if any."""
    request = pb.GenerateRequest(
        prompt="p", sampling=pb.SamplingParameters(max_tokens=max_tokens), resume=pb.Resume(tokens=resume)
    )
    tokens = []
    try:
        async for response in bench.stub.Generate(request, timeout=60):
            tokens += response.tokens
    except grpc.aio.AioRpcError as error:
        return tokens, error
    return tokens, None


def is_final(error, reason):
    """Neither clients nor proxies take this for a reason to send the request again."""
    status = rich_status.from_error(error)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert rich_status.retry_delay(status) is None
    assert rich_status.reason(status) == reason
    return True


def counting(request, number, **last):
    """Honest tokens behind those of the request, the finish with the last one."""
    begun = len(request.resume.tokens)
    for token in range(begun, number):
        end = last if token == number - 1 else {}
        yield message(token, resumed=begun if token == begun else 0, **end)


LIES = {
    "sent a message after the end": lambda _, __: [message(1, finish_reason=STOP), message(2)],
    "sent more than max_tokens (100) tokens": lambda _, __: [message(n) for n in range(200)],
    "sent more than max_tokens": lambda _, __: [message(*range(200))],
    "ended the answer without a finish reason": lambda _, __: [message(1), message(2)],
    "sent an invalid GenerateResponse: ": lambda _, __: [message(1), b"\x0a\x02\xff\xfe"],
    "sent finish reason 9, which does not exist": lambda _, __: [message(1, finish_reason=9)],
    "; use worker and frontend images of the same version": lambda _, __: [b"\xff\xff\xff"],
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_answer_against_the_contract_ends_with_one_status_and_marks_the_worker(
    scripted, lie, caplog
):
    b, (liar, _) = await scripted(LIES[lie], lambda _, request: counting(request, 3, finish_reason=STOP))
    while not liar.requests:
        tokens, error = await hear(b)
    assert is_final(error, rich_status.REPLICA_BROKE_PROTOCOL)
    assert lie in error.details()
    assert "w-0" in error.details()
    assert len(tokens) <= 100
    assert set(tokens) <= set(range(100)), "nothing of the message that broke the contract passes"
    assert len(liar.requests) == 1
    # It is avoided for a while, even where the other one is busier.
    assert [await hear(b) for _ in range(5)] == [([0, 1, 2], None)] * 5
    assert len(liar.requests) == 1
    assert "Traceback" not in caplog.text


async def test_a_unary_answer_is_held_against_the_contract_too(scripted):
    b, _ = await scripted(lambda _, __: [b"\xff\xff"])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await b.stub.Tokenize(pb.TokenizeRequest(text="a"))
    assert is_final(caught.value, rich_status.REPLICA_BROKE_PROTOCOL)
    b, _ = await scripted(lambda _, __: [])
    with pytest.raises(grpc.aio.AioRpcError, match="sent no message"):
        await b.stub.Tokenize(pb.TokenizeRequest(text="a"))


async def test_a_worker_that_ignores_resume_shows_the_client_no_text_twice(scripted):
    def dies(_, __):
        return [*(message(n) for n in range(8)), DIED]

    def ignores(_, __):
        return [message(n, finish_reason=LENGTH if n == 19 else 0) for n in range(20)]

    b, workers = await scripted(dies, ignores)
    tokens, error = [], None
    while len(tokens) != 8:  # until the first one is asked first
        tokens, error = await hear(b)
    assert tokens == list(range(8))
    assert is_final(error, rich_status.REPLICA_BROKE_PROTOCOL)
    assert "restarted the text" in error.details()
    assert list(workers[1].requests[-1].resume.tokens) == tokens


async def test_an_earlier_workers_text_may_repeat_itself(scripted):
    """Without a word on `resume`, four equal tokens behind four equal tokens are a text like any other."""

    def script(_, request):
        if not request.resume.tokens:
            return [message(7, 7, 7, 7), DIED]
        return [message(7, 7, 7, 7), message(9, finish_reason=STOP)]

    b, _ = await scripted(script, script)
    assert await hear(b) == ([7] * 8 + [9], None)


async def test_a_worker_that_says_so_may_repeat_the_whole_text(scripted):
    def script(_, request):
        if not request.resume.tokens:
            return [message(1, 2, 3, 4, 5), DIED]
        return [message(1, 2, 3, 4, 5, resumed=5, finish_reason=STOP)]

    b, _ = await scripted(script, script)
    assert await hear(b) == ([1, 2, 3, 4, 5] * 2, None)


async def test_a_worker_that_goes_on_from_elsewhere_is_caught(scripted):
    def script(_, request):
        return [message(9, resumed=2)] if request.resume.tokens else [message(1, 2, 3), DIED]

    b, _ = await scripted(script, script)
    tokens, error = await hear(b)
    assert tokens == [1, 2, 3]
    assert "continues after 2 tokens, but 3 were emitted" in error.details()


async def test_a_worker_that_leaves_the_call_open_does_not_keep_the_client(scripted):
    b, _ = await scripted(lambda _, __: [message(1, finish_reason=STOP), 600.0])
    async with asyncio.timeout(60):
        assert await hear(b) == ([1], None)


async def test_only_named_metadata_of_an_error_come_back(scripted):
    said = (grpc.StatusCode.NOT_FOUND, "none", (("x-tenant", "a"), ("x-internal", "10.0.0.1")))
    b, _ = await scripted(lambda _, __: [said], keys=frozenset({"x-tenant"}))
    _, error = await hear(b)
    assert (error.code(), dict(error.trailing_metadata())) == (grpc.StatusCode.NOT_FOUND, {"x-tenant": "a"})


# Deaths.


async def test_a_request_that_kills_whatever_computes_it_kills_two_replicas(scripted):
    b, workers = await scripted(*[lambda _, __: [DIED]] * 5)
    tokens, error = await hear(b)
    assert tokens == []
    assert is_final(error, rich_status.REPLICAS_DIED)
    assert "2 times in a row" in error.details()
    assert sum(len(worker.requests) for worker in workers) == 2


async def test_so_does_one_that_kills_engines_behind_edges_that_live(scripted):
    status = rich_status.retry_later(
        grpc.StatusCode.UNAVAILABLE, "the engine process was killed", 1.0, rich_status.ENGINE_DIED
    )
    ended = (
        grpc.StatusCode.UNAVAILABLE,
        status.message,
        ((rich_status.DETAILS_KEY, status.SerializeToString()),),
    )
    b, workers = await scripted(*[lambda _, __: [ended]] * 5)
    _, error = await hear(b)
    assert is_final(error, rich_status.REPLICAS_DIED)
    assert sum(len(worker.requests) for worker in workers) == 2


async def test_one_that_kills_at_a_certain_token_kills_two(scripted):
    def script(_, request):
        return [*counting(request, 40), DIED] if len(request.resume.tokens) < 40 else [DIED]

    b, workers = await scripted(*[script] * 5)
    tokens, error = await hear(b)
    assert tokens == list(range(40))
    assert is_final(error, rich_status.REPLICAS_DIED)
    assert sum(len(worker.requests) for worker in workers) == 2


async def test_one_token_an_attempt_and_then_death_costs_three_calls(scripted):
    def script(_, request):
        begun = len(request.resume.tokens)
        return [message(begun, resumed=begun), DIED]

    b, workers = await scripted(*[script] * 4)
    tokens, error = await hear(b)
    assert tokens == [0, 1, 2]
    assert is_final(error, rich_status.REPLICAS_DIED)
    assert sum(len(worker.requests) for worker in workers) == routing.MOST_DEATHS


async def test_a_worker_that_hands_a_stream_on_after_each_token_is_bounded_too(scripted):
    handed_on = rich_status.retry_later(grpc.StatusCode.UNAVAILABLE, "draining; ask another", 1.0)

    def script(_, request):
        begun = len(request.resume.tokens)
        details = ((rich_status.DETAILS_KEY, handed_on.SerializeToString()),)
        return [message(begun, resumed=begun), (grpc.StatusCode.UNAVAILABLE, handed_on.message, details)]

    b, workers = await scripted(script, script, patience_s=60)
    _, error = await hear(b)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert sum(len(worker.requests) for worker in workers) == routing.MOST_CUTS


async def test_a_long_stream_survives_any_number_of_deaths_that_are_not_its_own(scripted):
    def script(_, request):
        begun = len(request.resume.tokens)
        last = min(begun + routing.WELL_TOKENS, 400)
        return [
            *counting(request, last, **({"finish_reason": LENGTH} if last == 400 else {})),
            *[DIED] * (last < 400),
        ]

    b, workers = await scripted(*[script] * 3)
    assert await hear(b, max_tokens=400) == (list(range(400)), None)
    assert sum(len(worker.requests) for worker in workers) == 400 / routing.WELL_TOKENS


async def test_replicas_that_cannot_be_reached_did_not_die_of_the_request(scripted):
    b, _ = await scripted(lambda _, request: counting(request, 3, finish_reason=STOP))
    b.extra |= {Endpoint("gone-0", "127.0.0.1:1"), Endpoint("gone-1", "127.0.0.1:2")}
    await b.publish()
    assert [await hear(b) for _ in range(4)] == [([0, 1, 2], None)] * 4
