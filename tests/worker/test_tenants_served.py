"""One tenant has more streams than a real worker has slots: short requests of another one are served.

`python -m benchmarks.fairness` measures how long they take, through a frontend.
"""

import grpc
import pytest

from moe_api.tenancy import Tenancy
from tests.worker.serving import Worker, refused

CROWD, GUEST = Tenancy("crowd", salt="c").metadata(), Tenancy("guest", salt="9").metadata()
LONG = {"max_tokens": 4000}


@pytest.fixture
def crowded(endless):
    """A worker of 4 + 12 slots, and the 14 streams of a tenant that it takes of more; none of them ends."""
    with Worker(endless, "--max-batch-size", "4", "--max-queue", "12") as worker:
        worker.wait_ready()
        streams = [worker.generate(f"crowd {number}", metadata=CROWD, **LONG) for number in range(14)]
        worker.wait_load(running=4, queued=10)
        yield worker
        for stream in streams:
            stream.cancel()


def test_short_requests_of_another_tenant_are_served_while_every_place_of_the_batch_is_taken(crowded):
    error = refused(crowded.generate("one more", metadata=CROWD, **LONG))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the tenant's part of the queue is full (14 of its requests are active" in error.details()
    for number in range(5):
        parts = list(crowded.generate(f"guest {number}", metadata=GUEST, max_tokens=2, ignore_eos=True))
        assert sum(len(part.tokens) for part in parts) == 2
    crowded.wait_load(running=4, queued=10)  # the crowd's own have neither ended nor been preempted
