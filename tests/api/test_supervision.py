"""Background loops that fail go on; only a cancellation of the task itself ends one."""

import asyncio
import logging
import threading

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from moe_api.supervision import Backoff, Supervisor, is_being_cancelled

FAST = Backoff(0.001, 0.004)


class Failing:
    """Work that raises some errors, one a run, and then goes on until it is cancelled."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.steady = asyncio.Event()

    async def __call__(self):
        if self.errors:
            raise self.errors.pop(0)
        self.steady.set()
        await asyncio.Event().wait()


@pytest.fixture
async def supervisor():
    supervisor = Supervisor(backoff=FAST)
    yield supervisor
    await supervisor.close()


@pytest.mark.parametrize("error", [ValueError("bad"), asyncio.CancelledError(), grpc.RpcError(), KeyError(1)])
async def test_a_loop_goes_on_after_any_error(supervisor, error):
    work = Failing(error, error)
    task = supervisor.start("probe", work)
    await asyncio.wait_for(work.steady.wait(), 60)
    assert not task.done()
    assert supervisor.states[0].failures == 2


async def test_a_closed_channel_does_not_end_the_loop_that_calls_through_it(supervisor):
    """What ended autoscaling: close() raises CancelledError in the calls in flight."""
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    calling, went_on = asyncio.Event(), asyncio.Event()
    channels = []

    async def work():
        if channels:
            went_on.set()
            return
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        call = channels[0].unary_unary("/service/Method")(b"", wait_for_ready=True)
        calling.set()
        await call

    supervisor.start("poll", work)
    await calling.wait()
    await asyncio.sleep(0)
    await channels[0].close()
    await asyncio.wait_for(went_on.wait(), 60)
    silent.close()


async def test_cancelling_the_task_ends_it(supervisor):
    work = Failing()
    task = supervisor.start("probe", work)
    await work.steady.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert supervisor.states == ()


async def test_work_that_returns_has_finished(supervisor):
    runs = []

    async def work():
        runs.append(1)

    await supervisor.start("once", work)
    assert (runs, supervisor.states) == ([1], ())


def test_a_thread_goes_on_after_an_error_and_ends_when_told():
    supervisor, stopping, steady = Supervisor(backoff=FAST), threading.Event(), threading.Event()
    errors = [ValueError("one malformed line"), asyncio.CancelledError()]

    def work():
        if errors:
            raise errors.pop()
        steady.set()
        stopping.wait()

    thread = supervisor.start_thread("watch", work, stopping)
    assert steady.wait(60)
    stopping.set()
    thread.join(60)
    assert not thread.is_alive()


def exported(reader):
    return {
        metric.name: [(dict(point.attributes), point.value) for point in metric.data.data_points]
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


async def test_restarts_are_counted_from_zero():
    """`increase` of Prometheus takes no account of the value with which a series begins."""
    reader = InMemoryMetricReader()
    supervisor = Supervisor(MeterProvider(metric_readers=[reader]).get_meter("test"), FAST)
    stopping, running = threading.Event(), threading.Event()
    supervisor.start("probe", asyncio.Event().wait)
    supervisor.start_thread("watch", lambda: (running.set(), stopping.wait()), stopping)
    await asyncio.to_thread(running.wait, 60)
    values = sorted(exported(reader)["moe.background.restarts"], key=str)
    stopping.set()
    await supervisor.close()
    assert values == [({"moe.loop": "probe"}, 0), ({"moe.loop": "watch"}, 0)]


async def test_failures_are_logged_and_exported(caplog):
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    supervisor = Supervisor(meter, FAST)
    work = Failing(ValueError("bad line"))
    with caplog.at_level(logging.ERROR):
        supervisor.start("probe", work, "default/m")
        await asyncio.wait_for(work.steady.wait(), 60)
    values = exported(reader)
    await supervisor.close()
    assert values["moe.background.restarts"] == [({"moe.loop": "probe"}, 1)]
    assert values["moe.background.loops"] == [({"moe.loop": "probe", "moe.state": "running"}, 1)]
    assert "probe default/m failed (ValueError: bad line); restarting" in caplog.text


async def test_a_long_healthy_run_resets_the_pause():
    now, work = [0.0], Failing()
    supervisor = Supervisor(backoff=FAST, clock=lambda: now[0])
    runs = []

    async def fail_after_an_hour():
        runs.append(1)
        if len(runs) < 4:
            now[0] += 3600 if len(runs) == 3 else 0
            raise ValueError
        await work()

    supervisor.start("probe", fail_after_an_hour)
    await asyncio.wait_for(work.steady.wait(), 60)
    assert supervisor.states[0].failures == 1
    await supervisor.close()


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_pauses_stay_within_their_bounds(failures, chance):
    pause_s = Backoff(0.5, 30).pause_s(failures, chance)
    assert 0.25 <= pause_s <= 30


async def test_a_loop_may_have_pauses_of_its_own():
    supervisor, work = Supervisor(backoff=Backoff(3600, 3600)), Failing(ValueError("bad"))
    supervisor.start("probe", work, backoff=FAST)
    await asyncio.wait_for(work.steady.wait(), 60)
    await supervisor.close()


async def test_an_expected_error_is_told_without_a_traceback(caplog):
    supervisor = Supervisor(backoff=FAST, expected=(ConnectionError,))
    work = Failing(ConnectionError("the API server is away"), ValueError("a bug"))
    with caplog.at_level(logging.ERROR):
        supervisor.start("probe", work)
        await asyncio.wait_for(work.steady.wait(), 60)
    await supervisor.close()
    told = {record.message.partition(";")[0]: record.exc_info for record in caplog.records}
    assert told["probe failed (ConnectionError: the API server is away)"] is None
    assert "probe failed (ValueError: a bug)" in told


async def test_an_expected_error_that_repeats_is_told_once(caplog):
    supervisor = Supervisor(backoff=FAST, expected=(ConnectionError,))
    work = Failing(*[ConnectionError(f"attempt {number}") for number in range(3)])
    with caplog.at_level(logging.INFO):
        supervisor.start("probe", work)
        await asyncio.wait_for(work.steady.wait(), 60)
    await supervisor.close()
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "probe failed (ConnectionError: attempt 0)"
    ]


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError("a channel was closed")])
async def test_what_cannot_be_done_again_is_told_and_over(caplog, error):
    supervisor, work = Supervisor(backoff=FAST), Failing(error, error)
    await asyncio.wait_for(supervisor.start_once("forward", work, "7"), 60)
    assert "forward 7 failed" in caplog.text
    assert supervisor.states == ()
    assert not work.steady.is_set()


async def test_a_task_can_tell_its_own_cancellation_from_that_of_something_else():
    told = []

    async def work(awaited):
        try:
            await awaited
        except asyncio.CancelledError:
            told.append(is_being_cancelled())

    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    await work(cancelled)
    task = asyncio.create_task(work(asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert told == [False, True]
