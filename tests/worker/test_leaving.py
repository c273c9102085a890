"""Workers that are told to leave, and engines that hang."""

import os
import signal
import subprocess

import grpc
import pytest
from grpc_health.v1 import health_pb2

from moe_api.worker.v1 import worker_pb2
from tests.worker.serving import DEADLINE_S, Worker, refused


def test_a_drained_worker_takes_no_requests_finishes_those_under_way_and_ends(endless):
    with Worker(endless) as worker:
        error = _refused_drain(worker)
        assert error is None or error.code() is grpc.StatusCode.UNAVAILABLE
        worker.wait_ready()
        with worker.halted():
            stream = worker.generate(max_tokens=100)
            worker.wait_load(queued=1)
            drained = worker.load.Drain(worker_pb2.DrainRequest(), timeout=DEADLINE_S)
            assert drained.requests == 1
            assert refused(worker.generate(max_tokens=1)).code() is grpc.StatusCode.UNAVAILABLE
            assert worker.status() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert sum(len(response.tokens) for response in stream) == 100
        assert worker.process.wait(DEADLINE_S) == 0


def _refused_drain(worker):
    """The error of a drain while the model loads; None where it was loaded already."""
    if worker.status() == health_pb2.HealthCheckResponse.SERVING:
        return None
    with pytest.raises(grpc.RpcError) as caught:
        worker.load.Drain(worker_pb2.DrainRequest(), timeout=DEADLINE_S)
    return caught.value


def test_an_engine_that_makes_no_step_ends_its_streams_and_the_worker_says_why(endless):
    with Worker(endless, "--stall-timeout", "2") as worker:
        worker.wait_ready()
        stream = worker.generate(max_tokens=3000)
        next(stream)
        os.kill(worker.engine_pid(), signal.SIGSTOP)
        error = refused(stream)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the engine made no step for 2 s with 1 requests in progress" in error.details()
        assert worker.process.wait(DEADLINE_S) != 0
        assert any(line.startswith("error: the engine made no step") for line in worker.lines)


def test_an_idle_engine_is_not_taken_for_hung(endless):
    with Worker(endless, "--stall-timeout", "0.5") as worker:
        worker.wait_ready()
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(2)
        assert list(worker.generate(max_tokens=3))
