"""Workers and frontends that die, vanish or drain, as real processes and connections."""

import asyncio
import contextlib
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_api import rich_status
from moe_api.inference.v1 import inference_pb2, inference_pb2_grpc
from moe_api.prefixes import names_of
from moe_api.worker.v1 import worker_pb2
from moe_frontend.discovery.endpoints import Endpoint
from moe_frontend.policy.balancing import ExactPrefixAffinity
from moe_frontend.policy.watched import Held

MOE_FRONTEND = Path(sys.executable).with_name("moe-frontend")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIMIT_S = 45
"""Ends a test that hangs; on a machine that does other things, too, a process may stand still for seconds."""


async def only(bench, *names):
    """Lets requests go to these processes alone, all of which run already: one takes seconds to start."""
    bench.known = getattr(bench, "known", frozenset()) | bench.extra
    bench.extra = frozenset(endpoint for endpoint in bench.known if endpoint.name in names)
    await bench.publish()


async def test_another_replica_goes_on_where_a_killed_worker_stopped(bench):
    b = await bench(workers=0)
    victim, _ = await b.add_process("victim", most=50), await b.add_process("heir")
    await only(b, "victim")
    call = b.generate("count 100 0.01")
    assert (await call.read()).text == "victim:0 "
    await only(b, "victim", "heir")
    victim.kill()
    rest = [message async for message in _rest(call)]
    assert [token for message in rest for token in message.tokens] == list(range(1, 100))
    texts = "".join(message.text for message in rest).split()
    assert [text.partition(":")[2] for text in texts] == [str(number) for number in range(1, 100)]
    assert texts[-1] == "heir:99"
    assert rest[-1].usage.completion_tokens == 100


async def test_a_stream_survives_one_death_after_the_other(bench):
    b = await bench(workers=0)
    for number in range(4):
        await b.add_process(f"w-{number}", most=60 if number < 3 else math.inf)
    await only(b, "w-0")
    call = b.generate("count 200 0.01")
    received = [(await call.read()).text]
    for number in range(1, 4):
        while len(received) < 40 * number:
            received.append((await call.read()).text)
        await only(b, f"w-{number - 1}", f"w-{number}")
        b.processes[f"w-{number - 1}"].kill()
        while received[-1].partition(":")[0] != f"w-{number}":
            received.append((await call.read()).text)
    received += [message.text async for message in _rest(call)]
    assert [text.strip().partition(":")[2] for text in received] == [*map(str, range(200)), ""]


async def test_a_stream_without_an_heir_ends_when_its_patience_is_over(bench):
    b = await bench(workers=0, patience_s=1.5)
    process = await b.add_process("victim", most=100)
    call = b.generate("count 1000 0.01")
    assert (await call.read()).text == "victim:0 "
    process.kill()
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in _rest(call)]
    assert 1 < time.monotonic() - started < LIMIT_S
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details().startswith("replica victim was lost in the middle of the answer")
    assert rich_status.retry_delay(rich_status.from_error(caught.value)) is not None


async def test_a_stream_waits_for_a_replica_to_come(bench):
    b = await bench(workers=0, patience_s=60)
    process = await b.add_process("victim", most=20)
    call = b.generate("count 50 0.01")
    await call.read()
    process.kill()
    await process_gone(process)
    b.extra = frozenset()
    await b.publish()
    await b.add_process("heir")
    assert [message.text async for message in _rest(call)][-2] == "heir:49 "


async def process_gone(process):
    await asyncio.to_thread(process.wait)


async def test_no_stream_goes_on_at_another_revision(bench):
    b = await bench(workers=0, patience_s=60)
    victim = await b.add_process("victim", "r1", most=20)
    call = b.generate("count 60")
    await call.read()
    victim.kill()
    await process_gone(victim)
    await b.add_process("newer", "r2")
    await b.add_process("heir", "r1")
    rest = {message.text.partition(":")[0] async for message in _rest(call)}
    assert rest <= {"victim", "heir", ""}
    assert "heir" in rest


async def test_a_worker_that_turned_out_to_be_of_another_revision_is_passed_over(bench):
    """Its pod was made again under the same name and address before anybody told the frontend."""
    b = await bench(workers=0)
    changed = await b.add_process("changed", "r2")
    (endpoint,) = b.extra
    b.extra = frozenset({Endpoint("changed", endpoint.address, "r1")})
    await b.add_process("steady", "r1")
    assert [await b.text("count 1") for _ in range(4)] == ["steady:0 "] * 4
    assert changed.poll() is None


async def test_a_request_whose_only_worker_is_killed_waits_for_one_to_come(bench):
    b = await bench(workers=0, patience_s=60)
    process = await b.add_process("victim", most=0)
    call = asyncio.create_task(b.text("count 2"))
    async with asyncio.timeout(LIMIT_S):
        while not any(running for _, running in b.replicas.routes()):
            await asyncio.sleep(0.01)
    process.kill()
    await process_gone(process)
    b.extra = frozenset()
    await b.publish()
    await b.add_process("heir")
    assert await call == "heir:0 heir:1 "


async def test_a_request_whose_worker_is_killed_before_its_first_token_is_answered_by_another(bench):
    b = await bench(workers=0)
    victim, _ = await b.add_process("victim", most=0), await b.add_process("heir")
    await only(b, "victim")
    call = asyncio.create_task(b.text("count 2"))
    async with asyncio.timeout(LIMIT_S):
        while not any(running for _, running in b.replicas.routes()):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # until it is there
    await only(b, "victim", "heir")
    victim.kill()
    assert await call == "heir:0 heir:1 "


async def test_twenty_streams_all_go_on_when_one_of_two_workers_is_killed(bench):
    b = await bench(workers=0, patience_s=30)
    victim = await b.add_process("victim", most=25)
    await b.add_process("survivor")
    calls = [b.generate("count 50 0.01") for _ in range(20)]
    firsts = [(await call.read()).text for call in calls]
    victim.kill()

    async def rest(call):
        return [token async for message in _rest(call) for token in message.tokens]

    ends = await asyncio.gather(*(rest(call) for call in calls))
    assert ends == [list(range(1, 50))] * 20
    assert sum(first.startswith("victim") for first in firsts) == 10


async def test_streams_leave_a_killed_worker_that_is_said_to_hold_their_prompts(bench):
    """Its watch has not ended yet, or what was sent counts as held: it is suspect all the same."""
    policy = ExactPrefixAffinity()
    b = await bench(workers=0, patience_s=30, policy=policy)
    victim = await b.add_process("victim", most=25)
    await b.add_process("survivor")
    prompt = f"count 50 0.01{' ' * 5000}"
    blocks = names_of(inference_pb2.GenerateRequest(prompt=prompt), "")
    held = {"victim": Held(), "survivor": Held()}
    policy.index.apply("survivor", held["survivor"], worker_pb2.CacheChange(sequence=1, reset=True))
    told = worker_pb2.CacheChange(sequence=1, reset=True, stored=blocks)
    policy.index.apply("victim", held["victim"], told)
    calls = [b.generate(prompt) for _ in range(20)]
    firsts = [(await call.read()).text for call in calls]
    assert sum(first.startswith("victim") for first in firsts) > 10
    victim.kill()

    async def rest(call):
        return [token async for message in _rest(call) for token in message.tokens]

    ending = asyncio.gather(*(rest(call) for call in calls))
    policy.index.forget("victim", held["victim"])
    assert await ending == [list(range(1, 50))] * 20


async def _end(call):
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return await call.code()


async def test_a_worker_that_shuts_down_with_streams_running_is_unavailable(bench):
    """Its grace period over, grpc ends what runs with CANCELLED, which would read as the client's doing."""
    b = await bench(workers=1)
    call = b.generate("hold")
    await call.read()
    stopping = asyncio.create_task(b.workers[0].server.stop(0.1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping


class CutOff:
    """Relays TCP until it is told to swallow everything, as a network that is gone does."""

    def __init__(self, target):
        self.target = target
        self.cut = False
        self.tasks = set()

    async def start(self):
        self.server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return "{}:{}".format(*self.server.sockets[0].getsockname())

    async def _relay(self, reader, writer):
        host, port = self.target.split(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        for pair in ((reader, far_writer), (far_reader, writer)):
            self.tasks.add(asyncio.create_task(self._pump(*pair)))

    async def _pump(self, reader, writer):
        while data := await reader.read(65536):
            if not self.cut:
                writer.write(data)

    async def stop(self):
        self.server.close()
        for task in self.tasks:
            task.cancel()


async def test_a_worker_that_is_cut_off_does_not_leave_the_stream_hanging(bench):
    b = await bench(workers=1)
    relay = CutOff(b.workers[0].endpoint.address)
    b.replicas.update(frozenset({Endpoint("far", await relay.start())}))
    call = b.generate("hold")
    await call.read()
    relay.cut = True
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - started < LIMIT_S, "pings are 5 s apart and answered within 5 s"
    await relay.stop()


# The command itself, as a pod would run it.


async def health(channel, service):
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def test_sigterm_lets_streams_finish_and_takes_no_more(bench, command):
    b = await bench(workers=1)
    b.workers[0].most = 1
    process, address = await command("--static", b.workers[0].endpoint.address, "--grace", "60")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(prompt="count 10"))
        await call.read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        assert await _refusal(stub) is grpc.StatusCode.UNAVAILABLE
        await b.workers[0].allow(math.inf)
        rest = [message async for message in _rest(call)]
        assert len(rest) == 10
        assert await call.code() is grpc.StatusCode.OK
        # A watch of health would hold it up for the grace period of 60 s.
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0


async def _refusal(stub):
    """The status of the first call that is not taken; health says so a moment before the door is shut."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await stub.GetModel(inference_pb2.GetModelRequest())
            except grpc.aio.AioRpcError as error:
                return error.code()


async def _rest(call):
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


async def test_streams_are_ended_when_the_grace_period_is_over(bench, command):
    b = await bench(workers=1)
    process, address = await command("--static", b.workers[0].endpoint.address, "--grace", "0.5")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(prompt="hold"))
        await call.read()
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), LIMIT_S)
        assert process.returncode == 0, errors.decode()
        assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await b.workers[0].until(lambda w: w.running == 0)


async def test_health_follows_the_workers(bench):
    b = await bench(workers=0)
    assert await health(b.channel, "") == NOT_SERVING
    assert await health(b.channel, "liveness") == SERVING
    b.extra = frozenset({Endpoint("w", "127.0.0.1:1")})
    await b.publish()
    assert await health(b.channel, "") == SERVING
    assert await health(b.channel, "moe_api.inference.v1.InferenceService") == SERVING
    b.extra = frozenset()
    await b.publish()
    assert await health(b.channel, "") == NOT_SERVING
    assert await health(b.channel, "liveness") == SERVING


async def test_the_gap_between_two_workers_turns_nobody_away(bench):
    b = await bench(workers=0, hold_s=1.0)
    watch = health_pb2_grpc.HealthStub(b.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == NOT_SERVING  # it never had one
    began = time.monotonic()
    for there in (True, False, True, False):
        b.extra = frozenset({Endpoint("w", "127.0.0.1:1")} if there else ())
        await b.publish()
    assert (await watch.read()).status == SERVING
    assert (await watch.read()).status == NOT_SERVING
    assert time.monotonic() - began > 0.9


async def test_reflection_names_the_services(bench):
    b = await bench(workers=0)
    stub = reflection_pb2_grpc.ServerReflectionStub(b.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    listed = {s.name for s in (await call.read()).list_services_response.service}
    assert {"moe_api.inference.v1.InferenceService", "grpc.health.v1.Health"} <= listed


async def test_an_unreachable_collector_costs_requests_nothing(bench, command):
    b = await bench(workers=1)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    process, address = await command("--static", b.workers[0].endpoint.address, env=environ)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        started = time.monotonic()
        for _ in range(50):
            call = stub.Generate(inference_pb2.GenerateRequest(prompt="count 1"))
            assert (await call.read()).text == "w-0:0 "
            await _end(call)
        assert time.monotonic() - started < LIMIT_S, (
            "50 requests; one wait for the collector each would take 100 s"
        )
    process.send_signal(signal.SIGTERM)
    _, errors = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0
    # One line for the traces, one for the metrics at most, whichever of them failed first.
    assert 1 <= errors.decode().count("do not reach the collector") <= 2


def run(*args):
    return subprocess.run([MOE_FRONTEND, *args], capture_output=True, text=True, timeout=60, check=False)


def test_help_teaches():
    result = run("--help")
    assert result.returncode == 0
    for text in ("--static", "--deployment", "least one worker is ready", "terminationGracePeriodSeconds"):
        assert text in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "no workers given"),
        (("--static", "a:1", "--deployment", "d"), "workers given twice"),
        (("--static", "nowhere"), "'nowhere' is not HOST:PORT"),
        (("--static", "127.0.0.1:99999"), "is not HOST:PORT"),
        (("--static", "127.0.0.1:1", "--listen", "x"), "'x' is not HOST:PORT"),
        (("--static", "127.0.0.1:1", "--forward-metadata", "authorization"), "is never forwarded"),
    ],
)
def test_wrong_options_are_explained(args, sentence):
    result = run(*args)
    assert result.returncode == 2
    assert sentence in result.stderr


def test_a_taken_port_is_explained_without_a_stack_trace():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        result = run("--listen", address, "--static", "127.0.0.1:1")
    assert result.returncode == 2
    assert f"error: cannot listen on {address}" in result.stderr
    assert "Traceback" not in result.stderr
