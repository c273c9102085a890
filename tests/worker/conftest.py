import pytest

import moe_worker
from moe_worker.mesh import pulse
from tests.checkpoints import write_checkpoint
from tests.frontend.collector import running_collector
from tests.worker.mesh_ranks import PATIENT_S
from tests.worker.serving import Worker


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random model with room for long texts."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """The same model without an end-of-text token: every text goes on to its limit."""
    directory = tmp_path_factory.mktemp("endless")
    return write_checkpoint(directory, max_position_embeddings=4096, eos_token_id=None)


@pytest.fixture(scope="session")
def engine(checkpoint):
    return moe_worker.Engine(checkpoint, context_length=512, threads=1)


@pytest.fixture(scope="session")
def worker(endless):
    """One worker for all tests that leave it as it was: 2 slots, and 2 places in the queue."""
    with Worker(endless, "--max-batch-size", "2", "--max-queue", "2") as worker:
        worker.wait_ready()
        yield worker


@pytest.fixture
def patient(monkeypatch):
    """Ranks of a mesh that stand still for seconds are not taken for lost; ranks that end are."""
    monkeypatch.setattr(pulse, "SILENT_S", PATIENT_S)


@pytest.fixture(scope="session")
def collector(tmp_path_factory):
    with running_collector(tmp_path_factory.mktemp("collector")) as collector:
        yield collector
