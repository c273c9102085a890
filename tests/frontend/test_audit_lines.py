"""A reader of the audit log that stops or goes costs lines, which are counted, and no request its time."""

import os
import threading
import time

import pytest

from moe_api.backoff import Backoff
from moe_api.supervision import Supervisor
from moe_frontend.identity.audit import AuditLog
from moe_frontend.identity.lines import LineWriter

LINE = "x" * 1000


@pytest.fixture
def pipe():
    """Descriptors of both ends; a writer that still waits ends with the reading one."""
    ends = list(os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def writer(pipe, most=100):
    return LineWriter(Supervisor(backoff=Backoff(0.01, 0.02)), pipe[1], most)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_pipe_that_nobody_reads_stops_no_request_and_lines_that_do_not_fit_are_counted(pipe, caplog):
    lines = writer(pipe)
    log, done = AuditLog(lines.put), threading.Event()

    def serve():
        for number in range(1000):  # a pipe holds 64 KiB
            with log.request("grpc", "Generate", f"{number:01000}"):
                pass
        done.set()

    threading.Thread(target=serve, daemon=True).start()
    assert done.wait(60), "a request waits for the reader of the log"
    assert 700 < lines.dropped < 1000
    began = time.monotonic()
    lines.close(0.05)
    assert time.monotonic() - began < 30
    assert "audit log: the last lines are lost" in caplog.text


def test_after_a_pause_of_the_reader_lines_are_written_in_order_and_the_loss_is_told(pipe, caplog):
    lines = writer(pipe)
    for number in range(400):
        lines.put(f"{number} {LINE}")
    dropped = lines.dropped
    assert dropped > 0
    read = threading.Event()

    def reader():
        with os.fdopen(os.dup(pipe[0])) as file:
            found.extend(int(line.split()[0]) for line in file)
        read.set()

    found = []
    threading.Thread(target=reader, daemon=True).start()
    lines.close(10)
    os.dup2(pipe[0], pipe[1])  # closes the only writing end
    assert read.wait(60)
    assert found == sorted(found)
    assert len(found) == 400 - dropped
    assert f"audit log: {dropped} lines were dropped" in caplog.text


def test_a_reader_that_has_gone_fails_no_request_and_another_one_gets_the_next_lines(pipe):
    lines = writer(pipe)
    reading, writing = os.pipe()
    os.dup2(reading, pipe[0])  # closes the only reading end
    lines.put("lost")
    wait_until(lambda: lines.dropped == 1)
    os.dup2(writing, pipe[1])
    os.close(writing)
    lines.put("found")
    assert os.read(reading, 100) == b"found\n"
    lines.close()
    os.close(reading)
